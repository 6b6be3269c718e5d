"""What a run's twins differ by in their scores: the noise of training, measured.

Twins (`vernier twin`) are the run itself, trained on from one of its steps with weights moved by one unit in the last
place. Between them nothing differs that anybody would call a change, so a difference between two checkpoints that is no
larger than theirs says nothing about whatever else was changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from eval.compare.targets import Scale, most_scored, tables_of_run
from eval.curves.twins import GROWS, SETTLED, twins_of
from eval.tables import mean_loss, read_table


@dataclass(frozen=True)
class TwinSpread:
    """Scores of a run and its twins, `since` steps after step `at`: standard deviation in percent of their mean."""

    at: int
    since: int
    runs: int
    percent: float


@dataclass(frozen=True)
class TwinNoise:
    """Standard deviation of one checkpoint's score, in percent, by so many degrees of freedom; `since`: the most steps
    since a split that it rests on. Not `settled`: it grows still, and is a lower bound."""

    percent: float
    df: int
    since: int
    settled: bool = True
    rows: tuple[TwinSpread, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"percent": self.percent, "degrees_of_freedom": self.df, "steps": self.since, "settled": self.settled}


NOTHING = TwinNoise(math.nan, 0, 0)


def noise_of_run(run: Path, scale: Scale | None = None) -> TwinNoise:
    """What the twins of a run differ by, by the tables that were scored in one way.

    The earliest split counts: what chance does before a split is not in its twins. Of it the last half of what is
    scored, where the twins are farthest apart: the mean variance there, with as many degrees of freedom as there are
    twins (scores of one twin a few steps apart are not independent). Documents are the same for all, so little of their
    error is in it; what is makes it larger. `rows` has all splits.

    Args:
        scale: the way of scoring; None: that of most of the run's tables.
    """
    folders = twins_of(run)
    if not folders:
        return NOTHING
    problems: list[str] = []
    if scale is None:
        try:
            scale = most_scored(run)[0]
        except DataError:
            return TwinNoise(
                math.nan, 0, 0, problems=("the run is not scored, so scores of its twins are not compared",)
            )
    rows: list[TwinSpread] = []
    for at, twins in folders.items():
        try:
            rows += _spreads(at, [run, *twins], scale)
        except DataError as error:
            problems.append(str(error))
    if not rows:
        return TwinNoise(math.nan, 0, 0, problems=(*problems, "no two of these runs are scored at one step yet"))
    own = [row for row in rows if row.at == rows[0].at]
    late = [row for row in own if 2 * row.since >= own[-1].since]
    df, percent = max(row.runs for row in late) - 1, math.sqrt(float(np.mean([row.percent**2 for row in late])))
    doubts = _doubts(own, max(tables_of_run(run)[scale]))
    return TwinNoise(percent, df, own[-1].since, not doubts, tuple(rows), (*problems, *doubts))


def told(noise: TwinNoise) -> TwinNoise | None:
    """The noise where anything is known of it."""
    return noise if noise.df else None


def _spreads(at: int, runs: Iterable[Path], scale: Scale) -> list[TwinSpread]:
    losses: dict[int, list[float]] = {}
    for run in runs:
        try:
            tables = tables_of_run(run).get(scale, {})
        except DataError:  # not scored yet
            continue
        for step, path in tables.items():
            if step > at:
                losses.setdefault(step, []).append(mean_loss(read_table(path)))
    return [
        TwinSpread(at, step - at, len(of), 100 * float(np.std(of, ddof=1)) / float(np.mean(of)))
        for step, of in sorted(losses.items())
        if len(of) > 1
    ]


def _doubts(own: list[TwinSpread], last: int) -> list[str]:
    """Why what twins of one split differ by is less than the noise of a run whose last scored step is `last`."""
    at, since, bound = own[0].at, own[-1].since, "it is a lower bound"
    out = []
    if at:
        out.append(f"twins from step {at}: what chance did before is not in them, so {bound}")
    if since < SETTLED:
        out.append(f"twins of {since} steps: noise grows for longer than that, so {bound}")
    elif 2 * (at + since) < last:
        out.append(f"twins end at step {at + since} of {last}, so {bound}")
    before = [row.percent for row in own if 2 * row.since <= since]
    if before and own[-1].percent > GROWS * max(before):
        out.append(f"twins from step {at} still move apart after {since} steps: {bound}")
    return out
