"""Small pure functions over numpy arrays: errors clustered by document, paired differences, power.

Knows nothing of files or models. `clustered` has estimates of one mean, `paired` the difference of two,
`power` what a set can show and what looking again costs.
"""

from eval.statistics.clustered import Estimate, by_cluster, clustered_mean, clustered_ratio, effective_number
from eval.statistics.paired import PairedDifference, paired_difference
from eval.statistics.power import adjusted_p, detectable, samples_needed, spent_alpha

__all__ = [
    "Estimate",
    "PairedDifference",
    "adjusted_p",
    "by_cluster",
    "clustered_mean",
    "clustered_ratio",
    "detectable",
    "effective_number",
    "paired_difference",
    "samples_needed",
    "spent_alpha",
]
