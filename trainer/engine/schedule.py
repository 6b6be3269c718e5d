"""The learning rate of a step: a function of the step alone, so going on needs no scheduler state."""

from __future__ import annotations

import math

from configs.schema import ScheduleSettings, StageSettings

DECAY_RATIO, POWER, CYCLES = 0.1, 2.0, 4  # where the settings do not say
OPEN_ENDED = ("constant", "inverse_sqrt", "stages")  # whose rate at a step does not hang on the last one


def warmup_steps(steps: int, schedule: ScheduleSettings) -> int:
    """Steps of linear warm-up of a schedule that is drawn over so many."""
    return schedule.warmup_steps if schedule.warmup_ratio is None else math.ceil(schedule.warmup_ratio * steps)


def learning_rate(step: int, *, peak: float, steps: int, schedule: ScheduleSettings) -> float:
    """The rate of update `step` (1 is the first): linear warm-up, then the named way down to `min_ratio` at the end.

    wsd stays at the peak until the last `decay_ratio` of all steps, then falls linearly (Hu et al., arXiv 2404.06395,
    section 4). inverse_sqrt is peak · √(w/step), w the steps of warm-up (Vaswani et al., arXiv 1706.03762, section
    5.3). cyclical goes up and down in triangles (Smith, arXiv 1506.01186, section 3). cosine_restarts begins anew at
    the peak (Loshchilov and Hutter, arXiv 1608.03983, section 3).
    """
    warm = warmup_steps(steps, schedule)
    if step <= warm:
        return peak * step / warm
    after = min(1.0, (step - warm) / max(1, steps - warm))
    cycle = after * (schedule.cycles or CYCLES)
    within = 1.0 if after == 1.0 else cycle % 1
    shape = 1.0
    match schedule.name:
        case "cosine":
            shape = _cosine(after)
        case "linear":
            shape = 1 - after
        case "polynomial":
            shape = (1 - after) ** (schedule.power or POWER)
        case "wsd":
            falls = (schedule.decay_ratio or DECAY_RATIO) * steps
            shape = min(1.0, max(0.0, steps - step) / falls)
        case "cyclical":
            shape = 1 - abs(2 * within - 1)
        case "cosine_restarts":
            shape = _cosine(within)
        case "inverse_sqrt":
            return peak * max(schedule.min_ratio, math.sqrt(max(1, warm) / step))
        case "stages":
            return peak * _staged(step - warm, schedule.stages or [])
        case "constant":
            return peak
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _staged(step: int, stages: list[StageSettings]) -> float:
    """Rate ÷ peak so many steps after the warm-up: from stage to stage, then as the last one ends."""
    level = 1.0
    for stage in stages:
        if step <= stage.steps:
            done = step / stage.steps
            return level + (stage.to - level) * (done if stage.shape == "linear" else 1 - _cosine(done))
        step, level = step - stage.steps, stage.to
    return level
