"""p-values of many comparisons at once, adjusted so that each may be held against α itself.

For a leaderboard's pairs. Looks along a run come one after another and have `power.adjusted_p`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def holm_shares(p: ArrayLike) -> Floats:
    """By what each of `p` [K] is multiplied to be Holm's, before it is cut at 1: of how many comparisons it bears the
    error. An interval at α over that leaves out zero just where Holm's p is below α."""
    p_K = _checked(p)
    order_K = np.argsort(p_K, kind="stable")
    factor_K, sorted_K = np.arange(len(p_K), 0, -1, dtype=np.float64), p_K[order_K]
    raised_K = np.maximum.accumulate(factor_K * sorted_K)
    return _put_back(np.divide(raised_K, sorted_K, out=factor_K, where=sorted_K > 0), order_K)


def holm(p: ArrayLike) -> Floats:
    """Holm's step-down p-values, in the order of `p` [K]: p̃_(j) = max_{i≤j} min(1, (K − i + 1)·p_(i)).

    Rejecting where p̃ ≤ α errs at all with probability ≤ α, however the tests depend on each other (Holm, "A simple
    sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979: the Bonferroni form).
    """
    p_K = _checked(p)
    order_K = np.argsort(p_K, kind="stable")
    factor_K = np.arange(len(p_K), 0, -1)
    return _put_back(np.minimum(1.0, np.maximum.accumulate(factor_K * p_K[order_K])), order_K)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Step-up p-values for the false discovery rate, in the order of `p` [K]: p̃_(j) = min_{i≥j} min(1, K·p_(i)/i).

    Of the differences claimed where p̃ ≤ α, at most the part α is false in expectation; proven for independent or
    positively dependent tests (Benjamini & Hochberg, J. R. Statist. Soc. B 57, 1995, section 3, theorem 1).
    """
    p_K = _checked(p)
    order_K = np.argsort(p_K, kind="stable")
    scaled_K = len(p_K) * p_K[order_K] / np.arange(1, len(p_K) + 1)
    return _put_back(np.minimum(1.0, np.minimum.accumulate(scaled_K[::-1])[::-1]), order_K)


def _checked(p: ArrayLike) -> Floats:
    p_K = np.asarray(p, dtype=np.float64)
    if p_K.ndim != 1 or not np.all((p_K >= 0) & (p_K <= 1)):  # a NaN fails this too
        raise ValueError("p: one list of numbers from 0 to 1 is expected")
    return p_K


def _put_back(sorted_K: Floats, order_K: NDArray[np.intp]) -> Floats:
    adjusted_K = np.empty_like(sorted_K)
    adjusted_K[order_K] = sorted_K
    return adjusted_K
