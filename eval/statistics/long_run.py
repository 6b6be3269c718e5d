"""Means of a series whose neighbours are alike, such as the differences of two runs' training losses by step.

The error of such a mean rests on the slowest part of the series, of which a stretch shows little. It is measured by
the first few cosines over the stretch, and where even these grow towards the slowest, nothing is claimed.

Legend: `_T` one entry a step (or a block of as many steps each), `_K` one a look; leading dimensions `…` are series.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import DataError
from eval.statistics.paired import t_quantile, two_sided_p
from eval.statistics.sequential import mixture_rho, mixture_width

Floats = NDArray[np.float64]

COSINES = 8
SLOWEST = 3  # of these, against the rest of FARTHEST: has the series settled within the stretch?
FARTHEST = 32
SETTLED = 2.5  # white noise goes beyond it in 8 of 100 stretches
LEAST = 64  # entries; with fewer the guard has too little to compare with


@dataclass(frozen=True)
class LongRunMean:
    """A weighted mean with its error. `omega`: long-run standard deviation of one entry, in the unit of `y`; `df`: from
    how many cosines. `wanders`: the series moves as slowly as the stretch is long: `omega` is then of its slowest part,
    a lower bound, and there is no p (NaN)."""

    value: float
    omega: float
    df: int
    half95: float
    t: float
    p: float
    wanders: bool


def cosine_squares(x: ArrayLike, count: int) -> Floats:
    """Squares of the projections of `x` [… T] on √(2/T)·cos(πj(t − ½)/T), j = 1 … count; [… count].

    They do not see the mean; of white noise each is its variance in expectation.
    """
    x_T = np.asarray(x, dtype=np.float64)
    steps = x_T.shape[-1]
    place_T = (np.arange(steps) + 0.5) / steps
    cosine_jT = math.sqrt(2 / steps) * np.cos(np.pi * np.arange(1, count + 1)[:, None] * place_T)
    return np.asarray((x_T @ cosine_jT.T) ** 2, dtype=np.float64)


def long_run_mean(y: ArrayLike, m: ArrayLike, level: float = 0.95) -> LongRunMean:
    """D = Σy/Σm of a series, with a t test that allows for neighbours being alike.

    ω² is the mean square of the projections of the residuals y_t − D·m_t on the first 8 cosines, and t = D·Σm/(ω·√T)
    has Student's distribution with 8 degrees of freedom: equal-weighted cosines (Lazarus, Lewis, Stock & Watson, "HAR
    inference: recommendations for practice", J. Bus. Econ. Stat. 36, 2018, eq. 9–10; Müller, J. Econometrics 122,
    2004). On white noise the interval is 1.1 times that of independent steps.

    What wanders as slowly as the stretch is long cannot be told from a difference, by no test: where the first 3
    projections are above 2.5 times the 4th to 32nd in the mean, no p is given. That finds half of the stretches of 480
    steps with a part correlated by .99; the best test there is finds no more at as many false alarms
    (`tests/statistics/test_long_run.py`).

    Args:
        y: [T] sums of each step, such as the difference in nats.
        m: [T] their weights, such as targets; above zero in total.
        level: of the interval.

    Raises:
        DataError: fewer than 64 entries.
    """
    y_T, m_T = np.asarray(y, dtype=np.float64), np.asarray(m, dtype=np.float64)
    if len(y_T) < LEAST:
        raise DataError(f"{len(y_T)} steps are too few: the error of their mean needs {LEAST}")
    total = float(m_T.sum())
    value = float(y_T.sum()) / total
    squares_j = cosine_squares(y_T - value * m_T, FARTHEST)
    slow = float(squares_j[:SLOWEST].mean())
    wanders = slow > SETTLED * float(squares_j[SLOWEST:].mean())
    df = SLOWEST if wanders else COSINES
    # Of a part that wanders, the larger of the two: neither may be taken for less than it shows.
    variance = max(slow, float(squares_j[:COSINES].mean())) if wanders else float(squares_j[:COSINES].mean())
    # A spread at the level of rounding is none.
    omega = math.sqrt(variance) if variance > (1e-12 * float(np.abs(y_T).max(initial=0.0))) ** 2 else 0.0
    se = omega * math.sqrt(len(y_T)) / total
    still = 0.0 if value == 0 else math.copysign(math.inf, value)
    t = value / se if se > 0 else still
    p = math.nan if wanders and se > 0 else two_sided_p(t, df)
    return LongRunMean(value, omega, df, t_quantile(level, df) * se, t, p, wanders and se > 0)


def running_half(found: LongRunMean, weight: ArrayLike, looks: ArrayLike, t_opt: float, alpha: float = 0.05) -> Floats:
    """Half widths [K] around the running mean that hold at all looks together: ω·c·`mixture_width`(t)·t/Σm.

    The asymptotic confidence sequence of `sequential.mixture_width` with the long-run error in the place of that of
    independent terms (its Gaussian approximation holds for such series too: Waudby-Smith et al., arXiv 2103.06476,
    section 2.5). c = t₈/z makes it wider, since ω is measured from few cosines.

    Args:
        found: the mean over all entries so far.
        weight: [T] of each entry.
        looks: [K] ascending counts of entries.
        t_opt: the count at which the band shall be narrowest.
    """
    looks_K = np.asarray(looks, dtype=np.int64)
    sum_K = np.cumsum(np.asarray(weight, dtype=np.float64))[looks_K - 1]
    wider = t_quantile(1 - alpha, found.df) / t_quantile(1 - alpha, math.inf)
    return found.omega * wider * mixture_width(looks_K, mixture_rho(t_opt, alpha), alpha) * looks_K / sum_K


def step_variance(x: ArrayLike) -> float:
    """Variance of what is new in each step of `x` [T], whatever trend it is on: half the mean squared difference of
    neighbours (von Neumann, Ann. Math. Statist. 12, 1941)."""
    return float(np.mean(np.diff(np.asarray(x, dtype=np.float64)) ** 2)) / 2
