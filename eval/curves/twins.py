"""What twins of a run differ by in their training losses: how far a curve moves by chance alone.

Legend: `_T` one entry a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.run.directory import RunDir, step_of
from eval.curves.pairing import Curve, read_curve
from eval.statistics.paired import two_sided_p

SETTLED = 200  # steps since the split
GROWS = 1.5  # times


@dataclass(frozen=True)
class CurveNoise:
    """Standard deviation of one run's mean training loss over a stretch, in nats, by so many twins. Not `settled`: they
    move apart still, and it is a lower bound."""

    nats: float
    df: int
    settled: bool = True

    def p(self, difference: float) -> float:
        """Of a difference of two such means: Student's t of difference/(√2·sd)."""
        if not self.nats > 0:
            return 0.0 if difference else 1.0
        return two_sided_p(difference / (math.sqrt(2) * self.nats), self.df)

    def to_json(self) -> dict[str, Any]:
        return {"sd_nats": self.nats, "degrees_of_freedom": self.df, "settled": self.settled}


def twins_of(run: Path) -> dict[int, list[Path]]:
    """The folders of a run's twins, by the step that they were split off at."""
    found: dict[int, list[Path]] = {}
    for path in sorted(RunDir(run).twins.glob("step-*.*")):
        at = step_of(path.name.partition(".")[0])
        if at is not None and RunDir(path).twin.is_file():
            found.setdefault(at, []).append(path)
    return found


def curve_noise(runs: Iterable[Path], first: int, last: int) -> tuple[CurveNoise | None, list[str]]:
    """(what twins of these runs tell of a stretch of steps, pooled; which twins do not have all of it).

    A twin counts where it has made all of the steps, and was split off before the first; of a run those of the earliest
    such split.
    """
    variance, df, short, settled = 0.0, 0, [], True
    for run in dict.fromkeys(run.resolve() for run in runs):
        for at, folders in twins_of(run).items():
            curves = [curve for path in folders if (curve := _stretch(path, first, last)) is not None]
            own = _stretch(run, first, last)
            if at >= first or not curves or own is None:
                short.append(f"the twins of {run.name} from step {at} do not have all steps from {first} to {last}")
                continue
            means = [float(np.average(c.loss_T, weights=c.targets_T)) for c in (own, *curves)]
            variance += len(curves) * float(np.var(means, ddof=1))
            df += len(curves)
            settled = settled and at == 0 and last - at >= SETTLED and not _grows([own, *curves])
            break
    return (CurveNoise(math.sqrt(variance / df), df, settled) if df else None), ([] if df else short)


def _grows(curves: list[Curve]) -> bool:
    """Whether the last quarter of a stretch has them farther apart than the quarter before."""
    ends = np.linspace(0, len(curves[0].loss_T), 5).astype(int)[2:]
    means = [[float(c.loss_T[start:end].mean()) for c in curves] for start, end in pairwise(ends)]
    before, after = (float(np.std(of)) for of in means)
    return after > GROWS * before


def _stretch(run: Path, first: int, last: int) -> Curve | None:
    try:
        curve = read_curve(run)
    except DataError:
        return None
    part = curve.part((curve.step_T >= first) & (curve.step_T <= last))
    return part if len(part.step_T) == last - first + 1 and bool(np.all(np.isfinite(part.loss_T))) else None
