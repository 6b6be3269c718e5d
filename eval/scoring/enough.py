"""Whether a run has come to its end by its scores: no gain worth having is left, or patience is over.

Decided from loss tables alone, after each score. Never on one noisy value: see `StopSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from configs.files.atomic import write_json
from configs.run.directory import RunDir
from configs.schema import StopSettings
from eval.compare.pair import ALPHA, compare_tables
from eval.statistics.wobble import wobble_percent
from eval.tables import LossTable


def level_of(look: int) -> float:
    """The share of α that is the `look`-th one's, 1 is the first: α·6/(π²k²), which sum to α over all there may be."""
    return ALPHA * 6 / (math.pi * look) ** 2


def noise_percent(steps: Sequence[int], means: Sequence[float], looks: int) -> float:
    """A run's noise from score to score in percent, as far as its scores tell: what they scatter by around their local
    trend where there are twelve and more (`wobble_percent`), else around straight lines through `looks` + 1 of them."""
    known = wobble_percent(steps, means)
    if known is not None:
        return known
    found = []
    for last in range(looks + 1, len(means) + 1):
        x_K, y_K = np.arange(looks + 1.0), np.log(means[last - looks - 1 : last])
        left_K = y_K - np.polyval(np.polyfit(x_K, y_K, 1), x_K)
        found.append(float(left_K @ left_K) / max(1, looks - 1))
    return 100 * math.sqrt(float(np.mean(found))) if found else 0.0


def enough(
    steps: Sequence[int], means: Sequence[float], table: Callable[[int], LossTable], settings: StopSettings
) -> str | None:
    """Why a run with these scores may end; None where it goes on.

    `gain_below`: the gain over the last `looks` scores is below the margin as far as its whole interval goes. Upper
    ends hold together over all looks of a run with 95 % (`level_of`, one-sided), however often one looks. They are the
    documents' error and the run's own noise from score to score (`noise_percent`).
    `patience`: none of the last so many scores is below the best one before.

    Args:
        steps: of the scores, ascending.
        means: mean loss of each.
        table: gives that of a score, by its place.

    Raises:
        DataError: tables cannot be compared.
    """
    last = len(means) - 1
    look = last + 1 - settings.looks
    if settings.margin is not None and look >= 1:
        found = compare_tables(table(last - settings.looks), table(last), alpha=2 * level_of(look))
        gain, noise = -found.difference.percent, noise_percent(steps, means, settings.looks)
        quantile = float(norm.isf(level_of(look)))
        most = gain + math.hypot(-found.ci95_percent[0] - gain, quantile * math.sqrt(2) * noise)
        if most < settings.margin:
            return (
                f"the gain over the last {settings.looks} scores is {gain:.3f} %, at most "
                f"{most:.3f} %, which is below {settings.margin:g} %"
            )
    if settings.patience is not None and last >= settings.patience:
        best = min(range(len(means)), key=means.__getitem__)
        if last - best >= settings.patience:
            low, high = (-bound for bound in reversed(compare_tables(table(best), table(last)).ci95_percent))
            return (
                f"the last {settings.patience} scores are not below the best, which is all that patience knows: the "
                f"gain since that one is between {low:+.3f} % and {high:+.3f} %"
            )
    return None


def ask_to_end(run: RunDir, settings: StopSettings, why: str) -> None:
    """Asks the training of a run to end as if its next step were the last."""
    told: dict[str, Any] = {"key": "stop_when", "value": settings.model_dump(mode="json"), "why": why}
    write_json(run.end_request, told)
