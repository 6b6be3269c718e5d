"""A run's own checkpoint-to-checkpoint noise: how far its losses scatter around their local trend.

Sampling error is not it: on one reference set the same documents are met by every checkpoint. Nor does it tell what
another seed would give, which is more. Legend: `_K` one entry a checkpoint, `_I` one a residual, `_C` one a document.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FEWEST = 12  # checkpoints: with fewer the bend of a curve passes for noise (8 of a cosine schedule: .21 % of none)
NEIGHBOURS = 4
CLOSE = 0.1  # of the wider gap beside: checkpoints nearer to each other than this count as one
_MEDIAN_OF_CHI2 = 0.4549364231195724  # of one degree of freedom: makes the median of squares a normal's variance


def places(steps: ArrayLike) -> Integers:
    """Which checkpoints [K], by index in ascending order of step, can be scattered around a trend.

    Step 0 is left out: untrained weights lie on no trend. Of checkpoints that lie much nearer to each other than
    to those beside, such as two that are one optimizer step apart, only the last is kept: their weights are nearly the
    same, so they scatter together and would pass for a run without noise.
    """
    steps_K = np.asarray(steps, dtype=np.float64)
    order_K = np.argsort(steps_K, kind="stable")
    order_K = order_K[steps_K[order_K] > 0]
    while len(order_K) > 2:  # from the ends of a dense stretch inwards
        gaps_K = np.diff(steps_K[order_K])
        beside_K = np.maximum(np.append(0.0, gaps_K[:-1]), np.append(gaps_K[1:], 0.0))
        apart_K = np.append(gaps_K > CLOSE * beside_K, True)
        if apart_K.all():
            break
        order_K = order_K[apart_K]
    return order_K.astype(np.int64)


def local_contrasts(x: ArrayLike) -> Floats:
    """[I, K] rows that take from each inner point what a parabola through its 4 nearest neighbours in rank predicts.

    Least squares on the two points before and the two after (one and three next to an end), the point itself left
    out; each row is divided by sqrt(1 + Σw²), so that independent noise of sd s comes out with sd s, and a parabola as
    0. A pseudo-residual as in Gasser, Sroka & Jennen-Steinmetz, "Residual variance and residual pattern in nonlinear
    regression", Biometrika 73, 1986, section 2, with a parabola in the place of their line: a loss curve bends.

    Args:
        x: [K] strictly ascending, at least 5.
    """
    x_K = np.asarray(x, dtype=np.float64)
    count = len(x_K)
    rows_IK = np.zeros((count - 2, count))
    for row_K, at in zip(rows_IK, range(1, count - 1), strict=True):
        first = min(max(at - NEIGHBOURS // 2, 0), count - NEIGHBOURS - 1)
        around = [k for k in range(first, first + NEIGHBOURS + 1) if k != at]
        apart = (x_K[around] - x_K[at]) / (x_K[around[-1]] - x_K[around[0]])
        weights = np.linalg.pinv(np.vander(apart, 3, increasing=True))[0]
        row_K[around], row_K[at] = -weights, 1.0
        row_K /= math.sqrt(1 + float(weights @ weights))
    return rows_IK


def wobble_percent(steps: ArrayLike, losses: ArrayLike, influence: ArrayLike | None = None) -> float | None:
    """Standard deviation of a run's checkpoints around their local trend, in percent of the loss.

    Heineman et al., "Signal and Noise", arXiv 2508.13144, call the scatter of a run's late checkpoints, relative to
    their mean, its noise; here the trend is taken off locally (`local_contrasts`), so that a run still learning can be
    judged. On logarithms of loss and step, where a power law is a straight line. The variance is the median of the
    squared residuals over that of chi²_1: a spike, or the steep start, does not decide. With 12 checkpoints the result
    is itself uncertain by about half, with 100 by a sixth. Noise that neighbours share is not seen: correlated by .9, a
    third of it. From it goes the mean sampling variance of the same
    contrasts, which pairing has made small; what is left is 0 at least.

    Args:
        steps: [K] of the checkpoints, in any order.
        losses: [K] of each, above zero.
        influence: [K, C] of each document on each log loss, (y_c − R·m_c)/Σy; None: no sampling error is taken off.

    Returns:
        None with fewer than 12 checkpoints after `places`: noise cannot be told from the curve's bend.
    """
    kept_K = places(steps)
    losses_K = np.asarray(losses, dtype=np.float64)[kept_K]
    if len(kept_K) < FEWEST or not np.all(losses_K > 0):
        return None
    contrasts_IK = local_contrasts(np.log(np.asarray(steps, dtype=np.float64)[kept_K]))
    squares_I = (contrasts_IK @ np.log(losses_K)) ** 2
    sampling = 0.0
    if influence is not None:
        parts_IC = contrasts_IK @ np.asarray(influence, dtype=np.float64)[kept_K]
        clusters = parts_IC.shape[1]
        sampling = float(np.mean(clusters / (clusters - 1) * np.sum(parts_IC**2, axis=1)))
    return 100 * math.sqrt(max(0.0, float(np.median(squares_I)) / _MEDIAN_OF_CHI2 - sampling))
