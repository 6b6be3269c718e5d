"""Small pure functions over numpy arrays: errors clustered by document, paired differences, power.

Knows nothing of files or models. `clustered` has estimates of one mean, `paired` the difference of two,
`power` what a set can show and what looking again costs, `multiple` many comparisons at once, `sequential` looking
while documents come in, `resampling` few documents, `wobble` a run's own noise, `long_run` series whose
neighbours are alike (training losses), `distribution` the shape of losses and the size of subsets.
"""

from eval.statistics.clustered import Estimate, by_cluster, clustered_mean, clustered_ratio, effective_number
from eval.statistics.distribution import GaussianFit, gaussian_fit, subset_error, subset_error_resampled
from eval.statistics.long_run import LongRunMean, long_run_mean, running_half, step_variance
from eval.statistics.multiple import benjamini_hochberg, holm, holm_shares
from eval.statistics.paired import PairedDifference, paired_difference
from eval.statistics.power import Power, detectable, power_for, samples_needed
from eval.statistics.resampling import SignFlip, sign_flip
from eval.statistics.sequential import (
    ConfidenceSequence,
    allowed_looks,
    confidence_sequence,
    excludes,
    first_look,
    mixture_rho,
    mixture_width,
)
from eval.statistics.wobble import wobble_percent

__all__ = [
    "ConfidenceSequence",
    "Estimate",
    "GaussianFit",
    "LongRunMean",
    "PairedDifference",
    "Power",
    "SignFlip",
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
    "holm_shares",
    "long_run_mean",
    "mixture_rho",
    "mixture_width",
    "paired_difference",
    "power_for",
    "running_half",
    "samples_needed",
    "sign_flip",
    "step_variance",
    "subset_error",
    "subset_error_resampled",
    "wobble_percent",
]
