"""The learning rate of a step: a function of the step alone, so going on needs no scheduler state."""

from __future__ import annotations

import math

from configs.schema import ScheduleSettings


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleSettings) -> float:
    """The rate of update `step` (1 is the first): linear warm-up, then the named decay to `min_ratio` at the end."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    after = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    after = min(1.0, after)
    if schedule.name == "constant":
        return peak
    shape = 1 - after if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * after))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)
