"""Test and interval of a paired difference where documents are too few for Student's t: flipping signs.

Legend: `_C` one entry a cluster (document), `_F` one a flip (a sign for each cluster).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import DataError

Floats = NDArray[np.float64]

ENUMERATED = 12  # up to so many clusters all 2^C flips are taken


@dataclass(frozen=True)
class SignFlip:
    """The ratio, its p-value and interval; `exact` where all `flips` = 2^C were taken.

    `smallest_p`: what the clearest difference would get, 2/2^C or one in the flips drawn.
    """

    value: float
    p: float
    interval: tuple[float, float]
    flips: int
    exact: bool
    smallest_p: float


def sign_flip(y: ArrayLike, m: ArrayLike, level: float = 0.95, flips: int = 9999, seed: int = 0) -> SignFlip:
    """Sign-flip (wild cluster, null imposed) test of Σy/Σm = 0, and its interval by inversion.

    p(D) = share of w ∈ {−1, 1}^C with |Σ w_c·(y_c − D·m_c)| ≥ |Σ(y_c − D·m_c)|. Exact for any number of clusters
    whose residuals are independent and symmetric about zero (Fisher, The Design of Experiments, 1935, section 21),
    and for clusters of any shape as each one's sum tends to a normal (Canay, Santos & Shaikh, "The wild bootstrap with
    a 'small' number of 'large' clusters", Rev. Econ. Stat. 103, 2021; weights: Cameron, Gelbach & Miller, Rev. Econ.
    Stat. 90, 2008, section III). Beyond 2^12, random flips with the data themselves counted as one, which stays exact
    (Hemerik & Goeman, TEST 27, 2018, theorem 2).

    Inversion needs no search. With A±, B± the sums of y and m over the kept and the flipped clusters, the inequality
    is (D·B₋ − A₋)·(A₊ − D·B₊) ≥ 0: a flip speaks for all D between A₋/B₋ and A₊/B₊, which always hold Σy/Σm between
    them. So p falls on both sides of the estimate, and {D: p(D) > α} is an interval between order statistics of these
    ends. It is unbounded below 6 clusters at 95 %: the smallest p there is 2/2^C.

    Args:
        y: [C] sums by cluster, such as the difference in nats.
        m: [C] their weights, each above zero (targets, bytes, or the first model's loss for a relative difference).
        level: of the interval.
        flips: random flips where not all are taken.
        seed: of the random flips.

    Raises:
        DataError: fewer than two clusters, or a sum that is not finite or a weight that is not above zero.
    """
    y_C, m_C = np.asarray(y, dtype=np.float64), np.asarray(m, dtype=np.float64)
    if len(y_C) < 2:
        raise DataError(f"{len(y_C)} document: an error bar needs at least 2 documents in the reference set")
    if not np.all(np.isfinite(y_C) & np.isfinite(m_C) & (m_C > 0)):
        raise DataError("a document's sum is not finite or its weight not above zero: it cannot take part in a ratio")
    exact = len(y_C) <= ENUMERATED
    flipped_FC = _all_flips(len(y_C)) if exact else _random_flips(len(y_C), flips, seed)
    y_flipped_F, m_flipped_F = flipped_FC @ y_C, flipped_FC @ m_C
    y_kept_F, m_kept_F = (1 - flipped_FC) @ y_C, (1 - flipped_FC) @ m_C

    # Ties count for the null; in floating point they are only nearly ties.
    tiny = 1e-12 * float(np.abs(y_C).sum())
    extreme_F = (y_flipped_F * y_kept_F < 0) | (np.minimum(np.abs(y_flipped_F), np.abs(y_kept_F)) <= tiny)

    whole_F = ~(flipped_FC.any(1) & (flipped_FC < 1).any(1))  # none or all flipped: these speak for every D
    first_F = y_flipped_F / np.where(whole_F, 1.0, m_flipped_F)
    second_F = y_kept_F / np.where(whole_F, 1.0, m_kept_F)
    low_F = np.where(whole_F, -math.inf, np.minimum(first_F, second_F))
    high_F = np.where(whole_F, math.inf, np.maximum(first_F, second_F))
    left_out = math.floor((1 - level) * len(low_F) + 1e-9)
    low, high = np.sort(low_F)[left_out], np.sort(high_F)[len(high_F) - 1 - left_out]
    return SignFlip(
        value=float(y_C.sum() / m_C.sum()),
        p=float(extreme_F.mean()),
        interval=(float(low), float(high)),
        flips=len(low_F),
        exact=exact,
        smallest_p=float(whole_F.mean()),
    )


def _all_flips(clusters: int) -> Floats:
    """[2^C, C] of 0 and 1: the binary digits of 0 … 2^C − 1."""
    return ((np.arange(2**clusters)[:, None] >> np.arange(clusters)) & 1).astype(np.float64)


def _random_flips(clusters: int, flips: int, seed: int) -> Floats:
    """[flips + 1, C] of 0 and 1, the first row without any flip."""
    drawn_FC = np.random.default_rng(seed).integers(0, 2, (flips + 1, clusters), dtype=np.int8)
    drawn_FC[0] = 0
    return drawn_FC.astype(np.float64)
