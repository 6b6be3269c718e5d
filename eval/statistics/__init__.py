"""Small pure functions over numpy arrays: errors clustered by document, paired differences, power.

Knows nothing of files or models. `clustered` has estimates of one mean, `paired` the difference of two,
`power` what a set can show and what looking again costs, `multiple` many comparisons at once, `sequential` looking
while documents come in, `resampling` few documents, `distribution` the shape of losses and the size of subsets.
"""

from eval.statistics.clustered import Estimate, by_cluster, clustered_mean, clustered_ratio, effective_number
from eval.statistics.distribution import GaussianFit, gaussian_fit, subset_error, subset_error_resampled
from eval.statistics.multiple import benjamini_hochberg, holm
from eval.statistics.paired import PairedDifference, paired_difference
from eval.statistics.power import adjusted_p, detectable, samples_needed, spent_alpha
from eval.statistics.resampling import SignFlip, sign_flip
from eval.statistics.sequential import (
    ConfidenceSequence,
    allowed_looks,
    confidence_sequence,
    excludes,
    first_look,
    mixture_rho,
    mixture_width,
    obrien_fleming_bounds,
    obrien_fleming_constant,
)

__all__ = [
    "ConfidenceSequence",
    "Estimate",
    "GaussianFit",
    "PairedDifference",
    "SignFlip",
    "adjusted_p",
    "allowed_looks",
    "benjamini_hochberg",
    "by_cluster",
    "clustered_mean",
    "clustered_ratio",
    "confidence_sequence",
    "detectable",
    "effective_number",
    "excludes",
    "first_look",
    "gaussian_fit",
    "holm",
    "mixture_rho",
    "mixture_width",
    "obrien_fleming_bounds",
    "obrien_fleming_constant",
    "paired_difference",
    "samples_needed",
    "sign_flip",
    "spent_alpha",
    "subset_error",
    "subset_error_resampled",
]
