"""Means and ratios with standard errors clustered by document.

Legend: `_N` one entry an item (sample), `_C` one a cluster (document).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from configs.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, in the same unit, and the number of clusters behind it."""

    value: float
    se: float
    clusters: int


def by_cluster(values: ArrayLike, clusters: ArrayLike) -> Floats:
    """Sums of `values` [N] within each cluster, in ascending order of the cluster ids [N]; f64 [C].

    One sort and one pass: a mask a cluster would be quadratic.
    """
    _, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index_N, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)


def residual_se(residual_C: Floats, total: float) -> float:
    """sqrt(C/(C−1) · Σ r_c²) / total: Miller, "Adding Error Bars to Evals", arXiv 2411.00640, app. A.

    The factor C/(C−1) is what makes clusters of one give sd/√n exactly.

    Raises:
        DataError: fewer than two clusters, from which no error can be told.
    """
    clusters = len(residual_C)
    if clusters < 2:
        raise DataError(f"{clusters} document: an error bar needs at least 2 documents in the reference set")
    return float(np.sqrt(clusters / (clusters - 1) * np.sum(residual_C**2)) / total)


def ratio_of_sums(y_C: Floats, m_C: Floats) -> Estimate:
    """R = Σy/Σm from sums by cluster; the error by the delta method, on residuals y_c − R·m_c."""
    total = float(np.sum(m_C))
    value = float(np.sum(y_C)) / total
    return Estimate(value, residual_se(y_C - value * m_C, total), len(y_C))


def clustered_ratio(y: ArrayLike, m: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Token-weighted mean (or bits per byte) R = Σy/Σm with its clustered error.

    Args:
        y: [N] sums, such as a sample's loss in nats.
        m: [N] what they are sums over, such as its scored targets; above zero in total.
        clusters: [N] document ids.

    Raises:
        DataError: fewer than two clusters.
    """
    return ratio_of_sums(by_cluster(y, clusters), by_cluster(m, clusters))


def clustered_mean(x: ArrayLike, clusters: ArrayLike) -> Estimate:
    """Plain mean of `x` [N] with its clustered error; the ratio with every m = 1."""
    return clustered_ratio(x, np.ones(np.shape(np.asarray(x))), clusters)


def effective_number(m_C: Floats) -> float:
    """(Σm)²/Σm²: how many clusters of equal weight are worth as much (Kish, Survey Sampling, 1965)."""
    return float(np.sum(m_C) ** 2 / np.sum(m_C**2))
