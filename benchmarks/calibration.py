"""Whether error rates hold on real losses: documents of two real loss tables swapped at random, and quarters drawn.

Swapping A and B within random documents makes every difference a chance one, with all that is odd about real losses
kept. What is claimed then at 5 % should be 5 %. Legend: S simulations, C documents, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.statistics import by_cluster, effective_number
from eval.statistics.paired import t_quantile
from eval.tables import LossTable

DRAWS = 10_000
AT_ONCE = 500


@dataclass(frozen=True)
class Calibration:
    """Rates over DRAWS draws. `claims`: at 5 %, clustered by document; `claims_by_window`: the same swaps, every window
    taken for independent; `coverage`: how often the 95 % interval of a random part of the documents holds the whole
    set's difference."""

    documents: int
    effective: float
    claims: float
    claims_by_window: float
    part: int
    coverage: float


def calibrate(a: LossTable, b: LossTable, *, documents: int | None = None, part: int = 4, seed: int = 0) -> Calibration:
    """Error rates on the first `documents` documents of two tables of one reference set (default: all).

    Args:
        part: intervals are made from one `part`-th of the documents.
    """
    keep_N = a.document < (documents or a.document.max() + 1)
    difference_N, tokens_N, document_N = (x[keep_N] for x in (b.loss - a.loss, a.tokens.astype(np.float64), a.document))
    rng = np.random.default_rng(seed)
    clustered, by_window = _swaps(difference_N, tokens_N, document_N, rng)
    y_C, m_C = by_cluster(difference_N, document_N), by_cluster(tokens_N, document_N)
    size = len(y_C) // part
    return Calibration(len(y_C), effective_number(m_C), clustered, by_window, size, _coverage(y_C, m_C, size, rng))


def _swaps(
    difference_N: NDArray[np.float64],
    tokens_N: NDArray[np.float64],
    document_N: NDArray[np.int64],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """(claims at 5 % clustered by document, claims with every window by itself) under random swaps of documents."""
    y_C, m_C = by_cluster(difference_N, document_N), by_cluster(tokens_N, document_N)
    cross_C = by_cluster(difference_N * tokens_N, document_N)
    squares, weights, weight_squares = (difference_N**2).sum(), tokens_N.sum(), (tokens_N**2).sum()
    documents, windows = len(y_C), len(difference_N)
    claims = claims_by_window = 0
    for _ in range(DRAWS // AT_ONCE):
        sign_SC = rng.choice([-1.0, 1.0], (AT_ONCE, documents))
        mean_S = sign_SC @ y_C / weights
        residual_SC = sign_SC * y_C - mean_S[:, None] * m_C
        se_S = np.sqrt(documents / (documents - 1) * (residual_SC**2).sum(1)) / weights
        claims += int((np.abs(mean_S) > t_quantile(0.95, documents - 1) * se_S).sum())
        # Σ (s·d − D·m)² over windows, from sums by document: s² = 1.
        spread_S = squares - 2 * mean_S * (sign_SC @ cross_C) + mean_S**2 * weight_squares
        naive_S = np.sqrt(windows / (windows - 1) * spread_S) / weights
        claims_by_window += int((np.abs(mean_S) > t_quantile(0.95, windows - 1) * naive_S).sum())
    return claims / DRAWS, claims_by_window / DRAWS


def _coverage(y_C: NDArray[np.float64], m_C: NDArray[np.float64], size: int, rng: np.random.Generator) -> float:
    """How often an interval from `size` documents, with the finite-population factor, holds the whole set's value."""
    whole, factor = y_C.sum() / m_C.sum(), np.sqrt(1 - size / len(y_C))
    held = 0
    for _ in range(DRAWS // AT_ONCE):
        chosen_SC = np.argpartition(rng.random((AT_ONCE, len(y_C))), size, axis=1)[:, :size]
        y_SC, m_SC = y_C[chosen_SC], m_C[chosen_SC]
        mean_S = y_SC.sum(1) / m_SC.sum(1)
        residual_SC = y_SC - mean_S[:, None] * m_SC
        se_S = factor * np.sqrt(size / (size - 1) * (residual_SC**2).sum(1)) / m_SC.sum(1)
        held += int((np.abs(mean_S - whole) <= t_quantile(0.95, size - 1) * se_S).sum())
    return held / DRAWS
