"""The difference of two models' losses on the same items, with its error, test and interval.

Legend: `_N` one entry an item (sample), `_C` one a cluster (document).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

from configs.errors import DataError
from eval.statistics.clustered import Estimate, by_cluster, effective_number, ratio_of_sums, residual_se
from eval.statistics.resampling import SignFlip, sign_flip

Method = Literal["t", "sign flips"]
# Worth fewer documents of equal size than this, Student's t on a clustered error claims too much: .067 at 5 % with 20.
FEW_DOCUMENTS = 40
FLIPS = 9_999
MOST_FLIPS = 99_999  # half a second
MOST_FLIPPED = 100  # documents that are flipped one by one; more only make the table of flips large


@dataclass(frozen=True)
class PairedDifference:
    """B − A, in the unit of the losses and in percent of A. `t`, `p` and the interval are of the change in percent, so
    that they never contradict each other; `se` is that of `value`.

    `method`: what `p` and the interval come from. By sign flips a bound may be infinite, and no
    change, however large, gets a p below `smallest_p`.
    """

    a: Estimate
    b: Estimate
    value: float
    se: float
    percent: float
    se_percent: float
    ci95_percent: tuple[float, float]
    t: float
    t_unpaired: float
    p: float
    win_rate: float
    pairing_gain: float | None  # None where the paired error is zero
    clusters: int
    effective_clusters: float
    identical: bool
    method: Method = "t"
    smallest_p: float = 0.0


def two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|) under Student's t with `df` degrees of freedom; 0.0 below the smallest double.

    The lower tail is taken, 2·F(−|t|): 1 − F would lose everything below 1e-16.
    """
    return float(2.0 * stdtr(df, -abs(t)))


def t_quantile(level: float, df: float) -> float:
    """The |t| that is exceeded with probability 1 − `level`, both sides together."""
    return float(stdtrit(df, 0.5 + level / 2))


def paired_difference(
    a: ArrayLike, b: ArrayLike, m: ArrayLike, clusters: ArrayLike, *, flip_below: float = 0, level: float = 0.05
) -> PairedDifference:
    """Token-weighted difference D = Σ(b − a)/Σm, and 100·Σ(b − a)/Σa in percent.

    Errors are clustered and by the delta method, on residuals d_c − D·m_c and d_c − (Σd/Σa)·a_c (Miller,
    arXiv 2411.00640, paired differences and app. A). t is the change in percent over its error, with C − 1 degrees of
    freedom: p and the interval are of one test. Unpaired:
    sqrt(SE_a² + SE_b²), as if the two had been scored on different documents.

    Where the documents are worth fewer than `flip_below` of equal size, (Σm)²/Σm², p and the interval come from
    flipping the signs of documents instead (`sign_flip`); errors and t stay as they are.

    Args:
        a, b: [N] sums of loss of each item, above zero in total.
        m: [N] what they are sums over (targets, or bytes).
        clusters: [N] document ids.
        flip_below: 0 for Student's t always; verdicts take `FEW_DOCUMENTS`.
        level: what p will be held against: so many flips are drawn that p can fall below half of it.

    Raises:
        DataError: fewer than two documents, or a total loss of zero.
    """
    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    difference_N = b_N - a_N  # subtracted item by item and only then summed, all in fp64
    a_C, m_C = by_cluster(a_N, clusters), by_cluster(m, clusters)
    difference_C = by_cluster(difference_N, clusters)
    first, second = ratio_of_sums(a_C, m_C), ratio_of_sums(by_cluster(b_N, clusters), m_C)

    weight, total_a, total_difference = float(m_C.sum()), float(a_C.sum()), float(difference_C.sum())
    if total_a <= 0:
        raise DataError("the first table's total loss is not above zero: a change in percent of it has no meaning")
    value = total_difference / weight
    se = residual_se(difference_C - value * m_C, weight)
    relative = total_difference / total_a
    se_relative = residual_se(difference_C - relative * a_C, total_a)

    df = len(m_C) - 1
    half = t_quantile(0.95, df) * se_relative
    low, high = 100 * (relative - half), 100 * (relative + half)
    identical = not np.any(difference_N)
    effective = effective_number(m_C)
    method: Method = "sign flips" if effective < flip_below else "t"
    unpaired = math.hypot(first.se, second.se)
    t = _t(relative, se_relative)
    p, smallest = two_sided_p(t, df), 0.0
    if method == "sign flips" and not identical:
        found = _flipped(difference_C, a_C, level)
        p, smallest = found.p, found.smallest_p
        low, high = (100 * bound for bound in found.interval)
    return PairedDifference(
        a=first,
        b=second,
        value=value,
        se=se,
        percent=100 * relative,
        se_percent=100 * se_relative,
        ci95_percent=(low, high),
        t=t,
        t_unpaired=_t(value, unpaired),
        p=p,
        win_rate=float(np.mean(np.where(difference_N == 0, 0.5, difference_N < 0))),
        pairing_gain=unpaired / se if se > 0 else None,
        clusters=len(m_C),
        effective_clusters=effective,
        identical=identical,
        method=method,
        smallest_p=smallest,
    )


def _flipped(difference_C: NDArray[np.float64], a_C: NDArray[np.float64], level: float) -> SignFlip:
    """The change as a share of A, by flipping signs of documents."""
    # A document that A knows by heart weighs nothing; a ratio needs it to weigh a trace.
    weight_C = np.maximum(a_C, 1e-12 * float(a_C.mean()))
    if len(difference_C) > MOST_FLIPPED:
        # Few are large, or they would not be worth so few: the small ones go into bundles, which are clusters too.
        place_C = np.empty(len(weight_C), dtype=np.int64)
        place_C[np.argsort(-weight_C, kind="stable")] = np.arange(len(weight_C))
        alone = MOST_FLIPPED // 2
        bundle_C = np.where(place_C < alone, place_C, alone + place_C % alone)
        difference_C, weight_C = by_cluster(difference_C, bundle_C), by_cluster(weight_C, bundle_C)
    return sign_flip(difference_C, weight_C, flips=min(MOST_FLIPS, max(FLIPS, math.ceil(2 / level))))


def _t(value: float, se: float) -> float:
    """value/se; without any spread, no difference is 0 and any difference is infinitely clear."""
    if se > 0:
        return value / se
    return 0.0 if value == 0 else math.copysign(math.inf, value)
