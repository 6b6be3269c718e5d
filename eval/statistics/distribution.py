"""How losses are distributed, and how the error bar of a mean shrinks with the size of a subset.

Legend: `_N` one entry an item (sample), `_C` one a cluster (document), `_K` one a size of subset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from configs.errors import DataError
from eval.statistics.clustered import ratio_of_sums

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class GaussianFit:
    """Moments of a sample and the shares beyond 3 sd on either side, beside a normal's share on one side."""

    count: int
    mean: float
    sd: float
    skewness: float
    excess_kurtosis: float
    share_below: float
    share_above: float
    normal_share: float

    @property
    def unpaired_percent(self) -> float:
        """√2·sd/√n in percent of the mean: the error bar of a difference of two such means, drawn independently.

        As if samples were independent; infinite for a mean of zero.
        """
        return 100 * math.sqrt(2 / self.count) * self.sd / abs(self.mean) if self.mean else math.inf


def gaussian_fit(x: ArrayLike, beyond: float = 3.0) -> GaussianFit:
    """Mean, sd (divisor n − 1), skewness m3/m2^{3/2} and excess kurtosis m4/m2² − 3, m_r = Σ(x − x̄)^r/n.

    Joanes & Gill, "Comparing measures of sample skewness and kurtosis", The Statistician 47, 1998 (g1 and g2). All
    are 0 for a normal; without any spread they are given as 0. `share_below` counts x < x̄ − beyond·sd, `share_above`
    x > x̄ + beyond·sd; a normal has Φ(−beyond) on each side.

    Raises:
        DataError: fewer than two samples.
    """
    x_N = np.asarray(x, dtype=np.float64)
    if len(x_N) < 2:
        raise DataError(f"{len(x_N)} sample: a distribution needs at least 2")
    mean, sd = float(x_N.mean()), float(x_N.std(ddof=1))
    spread_N = x_N - mean
    variance = float(np.mean(spread_N**2)) if np.ptp(x_N) > 0 else 0.0  # a rounded mean leaves spread where none is
    return GaussianFit(
        count=len(x_N),
        mean=mean,
        sd=sd,
        skewness=float(np.mean(spread_N**3)) / variance**1.5 if variance > 0 else 0.0,
        excess_kurtosis=float(np.mean(spread_N**4)) / variance**2 - 3 if variance > 0 else 0.0,
        share_below=float(np.mean(spread_N < -beyond * sd)),
        share_above=float(np.mean(spread_N > beyond * sd)),
        normal_share=float(ndtr(-beyond)),
    )


def subset_error(y: ArrayLike, m: ArrayLike, documents: ArrayLike, finite: bool = True) -> Floats:
    """Standard error of Σy/Σm over c documents drawn from these C, by theory; [K].

    S/(√c·m̄)·sqrt(1 − c/C), S² the variance of the residuals y_c − R·m_c (divisor C − 1), m̄ the mean weight of all
    (Cochran, Sampling Techniques, 3rd ed. 1977, chapter 2: variance of a mean and of a ratio with the
    finite-population correction).

    Args:
        y: [C] sums by document.
        m: [C] their weights.
        documents: [K] sizes c, from 1 to C.
        finite: True: how far a subset lies from the whole set. False: how far it lies from the text the set was drawn
            from, that is without the factor sqrt(1 − c/C); sizes may then go beyond C.

    Raises:
        DataError: fewer than two documents, or a size that does not fit.
    """
    y_C, m_C = np.asarray(y, dtype=np.float64), np.asarray(m, dtype=np.float64)
    sizes_K = _sizes(documents, len(y_C) if finite else None)
    scaled_K = ratio_of_sums(y_C, m_C).se * np.sqrt(len(y_C) / sizes_K)
    return scaled_K * np.sqrt(1 - sizes_K / len(y_C)) if finite else scaled_K


def subset_error_resampled(
    y: ArrayLike, m: ArrayLike, documents: ArrayLike, draws: int = 1000, seed: int = 0
) -> Floats:
    """The same by drawing: root mean square of (subset's ratio − whole set's) over seeded draws of c documents; [K].

    Without replacement, hence `subset_error` with the finite-population factor is what it should come to. Each draw
    is one random order of the documents, of which every size takes the beginning: one size's draws are independent,
    different sizes' are not. Relative error of the result about 1/sqrt(2·draws).

    Raises:
        DataError: fewer than two documents, or a size that does not fit.
    """
    y_C, m_C = np.asarray(y, dtype=np.float64), np.asarray(m, dtype=np.float64)
    sizes_K = _sizes(documents, len(y_C))
    whole = ratio_of_sums(y_C, m_C).value
    residual_C = y_C - whole * m_C  # ratio of residuals is the difference of ratios
    rng = np.random.default_rng(seed)
    squares_K = np.zeros(len(sizes_K))
    for _ in range(draws):  # an order at a time: all at once would need draws × C of memory
        order_C = rng.permutation(len(y_C))
        found_K = np.cumsum(residual_C[order_C])[sizes_K - 1] / np.cumsum(m_C[order_C])[sizes_K - 1]
        squares_K += found_K**2
    return np.sqrt(squares_K / draws)


def _sizes(documents: ArrayLike, most: int | None) -> Integers:
    sizes_K = np.asarray(documents, dtype=np.int64)
    if np.any(sizes_K < 1) or (most is not None and np.any(sizes_K > most)):
        raise DataError(f"documents: a subset has from 1 to {most if most is not None else 'any number of'} documents")
    return sizes_K
