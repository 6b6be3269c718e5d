"""Means of a series whose neighbours are alike, such as the differences of two runs' training losses by step.

Consecutive values are joined to blocks long enough to be about independent, and the blocks are then the units.

Legend: `_T` one entry a step, `_C` one a block; leading dimensions `…` are series of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import DataError
from eval.statistics.clustered import ratio_of_sums
from eval.statistics.paired import t_quantile, two_sided_p
from eval.statistics.resampling import SignFlip, sign_flip

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEAST_BLOCKS = 32  # with fewer, t with an estimated block length claims too much
WINDOW = 4  # correlation times, see `autocorrelation_time`
BENDS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of a stretch, where its slow trend may bend


@dataclass(frozen=True)
class BlockMean:
    """A mean over blocks with its error; `half95` is half its 95 % interval, t with blocks − 1 degrees of freedom."""

    value: float
    se: float
    half95: float
    t: float
    p: float
    blocks: int


def slow_trend(count: int) -> Floats:
    """Orthonormal columns [T, p] of a line with bends at 1/64, 1/32, … 1/2, 3/4 of the stretch, p ≤ 9.

    Training moves fast at first and slowly later, hence bends at ever larger distances. Few columns, since what they
    take away is missing from the correlations that are to be measured.
    """
    t_T = np.arange(count) / max(1, count)
    bends = [bend for bend in BENDS if bend * count >= 4]
    columns = [np.ones(count), t_T, *(np.maximum(t_T - bend, 0.0) for bend in bends)]
    return np.asarray(np.linalg.qr(np.stack(columns[: max(1, count)], axis=1))[0], dtype=np.float64)


def detrended(x: ArrayLike) -> Floats:
    """`x` [… T] without its slow trend, by least squares: linear in x, so of a difference the difference."""
    x_T = np.asarray(x, dtype=np.float64)
    trend_Tp = slow_trend(x_T.shape[-1])
    return np.asarray(x_T - (x_T @ trend_Tp) @ trend_Tp.T, dtype=np.float64)


def autocorrelation_time(x: ArrayLike) -> Floats:
    """τ = 1 + 2·Σ ρ_k of `x` [… T] about its slow trend, 1 or more; the mean of T values is worth T/τ independent ones.

    The sum stops at the first lag M ≥ 4·τ(M): farther lags add noise alone (Madras & Sokal, J. Stat. Phys. 50, 1988,
    app. C; Sokal, "Monte Carlo methods in statistical mechanics", 1996, section 3: about 4 where correlations decay
    exponentially). Taking off a trend of p columns lowers each ρ_k by about p·τ/T, so the sum is multiplied by
    1 + p·(2M + 1)/T (Wolff, Comput. Phys. Commun. 156, 2004, eq. 49, which has it for p = 1). A series without any
    spread has τ = 1.
    """
    residual_T = detrended(x)
    count, columns = residual_T.shape[-1], slow_trend(residual_T.shape[-1]).shape[1]
    # A residual at the level of rounding is a trend and nothing else.
    scale = np.abs(np.asarray(x, dtype=np.float64)).max(-1, keepdims=True, initial=0.0)
    residual_T = np.where(np.abs(residual_T).max(-1, keepdims=True, initial=0.0) > 1e-12 * scale, residual_T, 0.0)
    power = np.abs(np.fft.rfft(residual_T, 2 * count)) ** 2
    covariance_T = np.fft.irfft(power, 2 * count)[..., :count]
    variance = covariance_T[..., :1]
    correlation_T = np.where(variance > 0, covariance_T / np.where(variance > 0, variance, 1.0), 0.0)
    correlation_T[..., 0] = 1.0
    lag_T = np.arange(count)
    sums_T = (2 * np.cumsum(correlation_T, axis=-1) - 1) * (1 + columns * (2 * lag_T + 1) / count)
    # Where no lag does (a series far too short) the last one is taken, and with it the largest time seen.
    far_T = lag_T >= WINDOW * sums_T
    found = np.where(far_T.any(-1), far_T.argmax(-1), sums_T.argmax(-1))
    return np.maximum(np.take_along_axis(sums_T, found[..., None], axis=-1)[..., 0], 1.0)


def block_length(x: ArrayLike) -> int:
    """Steps a block of `x` [T] should have: 4 correlation times, over which Sokal's rule sums correlations.

    For noise of the first order with correlation ρ, neighbouring block means of L steps then correlate by
    ρ/((1−ρ²)·L), .06 at ρ = .5.
    """
    return round(WINDOW * float(autocorrelation_time(x)))


def block_ends(count: int, length: int) -> Integers:
    """[C + 1] borders, from 0 to `count`, of the ⌊count/length⌋ blocks of `length` steps or one or more above it.

    All steps belong to a block, so what is said of the blocks is said of the whole stretch.
    """
    blocks = max(1, count // max(1, length))
    return np.arange(blocks + 1, dtype=np.int64) * count // blocks


def block_sums(x: ArrayLike, borders: Integers) -> Floats:
    """Sums of `x` [… T] over each block; [… C]."""
    return np.asarray(np.add.reduceat(np.asarray(x, dtype=np.float64), borders[:-1], axis=-1), dtype=np.float64)


def block_means(x: ArrayLike, borders: Integers, weights: ArrayLike | None = None) -> Floats:
    """Means of `x` [… T] over each block, weighted by `weights` [T] (targets of each step); [… C]."""
    x_T = np.asarray(x, dtype=np.float64)
    weight_T = np.ones(x_T.shape[-1]) if weights is None else np.asarray(weights, dtype=np.float64)
    return block_sums(x_T * weight_T, borders) / block_sums(weight_T, borders)


def mean_over_blocks(y: ArrayLike, m: ArrayLike) -> BlockMean:
    """Σy/Σm with a t test over blocks: Student's t with C − 1 degrees of freedom on residuals y_c − D·m_c.

    As between documents (`clustered.ratio_of_sums`), a block in the place of a document: the method of batch means
    (Conway, Management Science 10, 1963; Law & Kelton, Simulation Modeling and Analysis, section 9.5). A drift of the
    mean within the stretch counts as spread, and makes the interval wider.

    Args:
        y: [C] sums by block, such as the difference in nats.
        m: [C] their weights, such as targets.

    Raises:
        DataError: fewer than two blocks.
    """
    y_C, m_C = np.asarray(y, dtype=np.float64), np.asarray(m, dtype=np.float64)
    if len(y_C) < 2:
        raise DataError(f"{len(y_C)} block: an error bar needs at least 2 blocks of steps")
    found, df = ratio_of_sums(y_C, m_C), len(y_C) - 1
    # Without any spread, no difference is 0 and any difference is infinitely clear.
    still = 0.0 if found.value == 0 else math.copysign(math.inf, found.value)
    t = found.value / found.se if found.se > 0 else still
    return BlockMean(found.value, found.se, t_quantile(0.95, df) * found.se, t, two_sided_p(t, df), len(y_C))


def sign_flip_blocks(x: ArrayLike, length: int, weights: ArrayLike | None = None, flips: int = 9999) -> SignFlip:
    """Test of a mean of zero by flipping the signs of whole blocks of `x` [T]; for few blocks or heavy tails.

    The signs of steps that are alike are flipped together, as those of a document's samples are (see
    `resampling.sign_flip`, which has the sources).

    Raises:
        DataError: fewer than two blocks, or values that are not finite.
    """
    x_T = np.asarray(x, dtype=np.float64)
    weight_T = np.ones(len(x_T)) if weights is None else np.asarray(weights, dtype=np.float64)
    borders = block_ends(len(x_T), length)
    if len(borders) < 3:
        raise DataError(f"{len(x_T)} steps are one block of {length}: flipping signs needs at least 2 blocks")
    return sign_flip(block_sums(x_T * weight_T, borders), block_sums(weight_T, borders), flips=flips)
