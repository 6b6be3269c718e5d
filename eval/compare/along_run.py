"""Along the scored checkpoints of a run: each against the one before and the first, and the run's own wobble.

Prints nothing. A single pair is `eval.compare.pair`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.run.directory import RunDir, read_jsonl, step_name
from eval.compare.pair import ALPHA, Comparison, Side, compare_tables, finite, side_of
from eval.compare.provenance import ONE_RUN, provenance
from eval.compare.targets import Found, Scale, most_scored, tables_of_run, way_of
from eval.compare.twins import TwinNoise, noise_of_run, told
from eval.scored import planned_comparisons
from eval.statistics import by_cluster, clustered_ratio, holm, holm_shares, wobble_percent
from eval.tables import NATS, LossTable, read_table, unit_of


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A scored step of a run. `tokens`: trained on up to it, None where the run does not say."""

    step: int
    tokens: int | None
    side: Side
    versus_previous: Comparison | None
    versus_first: Comparison | None


@dataclass(frozen=True)
class RunComparison:
    """The scored checkpoints of a run in step order. `notes`: what was left out, for people.

    `wobble_percent`: the run's checkpoint-to-checkpoint noise, None where it has too few checkpoints. `tables`: where
    the loss table of each step lies. `worse_since`: the first step after the best from which on every one is worse than
    it (paired, Holm over those after it); None where the last is the best, or is not told apart from it.
    """

    run: str
    reference: str
    checkpoints: tuple[ScoredCheckpoint, ...]
    notes: tuple[str, ...] = ()
    wobble_percent: float | None = None
    twins: TwinNoise | None = None
    tables: dict[int, Path] = field(default_factory=dict)
    worse_since: int | None = None
    unit: str = NATS

    @property
    def best(self) -> ScoredCheckpoint:
        """That of the lowest loss, of equal ones the first."""
        return min(self.checkpoints, key=lambda point: point.side.loss)

    @property
    def sampling_percent(self) -> float | None:
        """Median standard error of the change from one checkpoint to the next; None with fewer than two."""
        errors = [p.versus_previous.difference.se_percent for p in self.checkpoints if p.versus_previous is not None]
        return float(np.median(errors)) if errors else None

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare RUN --json` prints (docs/design.md, section 2)."""
        return {
            "run": self.run,
            "reference": self.reference,
            "unit": self.unit,
            "wobble_percent": finite(self.wobble_percent),
            "twins": self.twins
            and {**self.twins.to_json(), "by_steps": [dataclasses.asdict(row) for row in self.twins.rows]},
            "sampling_percent": finite(self.sampling_percent),
            "best": {"step": self.best.step, "loss": finite(self.best.side.loss), "worse_since": self.worse_since},
            "checkpoints": [
                {
                    "step": point.step,
                    "tokens": point.tokens,
                    "loss": finite(point.side.loss),
                    "se": finite(point.side.se),
                    "versus_previous": point.versus_previous and point.versus_previous.to_json(),
                    "versus_first": point.versus_first and point.versus_first.to_json(),
                }
                for point in self.checkpoints
            ],
        }


def compare_run(run_dir: Path, *, alpha: float = ALPHA) -> RunComparison:
    """Compares every scored step of a run with the one before and with the first.

    Of a run that is over the rows are one family (Holm, for each of the two columns); while it trains α is shared by
    all that are planned (Bonferroni), so that no verdict changes when more come.

    Where it was scored in several ways (references, objectives, dtypes), that with most tables is taken.

    Raises:
        DataError: nothing is scored yet, or a table is broken.
    """
    scale, paths, others = most_scored(run_dir)
    trained = _tokens_by_step(RunDir(run_dir))
    points: list[ScoredCheckpoint] = []
    wobble = _Wobble()
    first = previous = None
    looks, over = planned_comparisons(RunDir(run_dir), len(paths))
    for at, (step, path) in enumerate(sorted(paths.items())):
        table = read_table(path)
        table = replace(table, meta={**table.meta, "label": step_name(step)})
        try:
            own = clustered_ratio(table.loss, table.tokens, table.cluster)
            before = None if previous is None else compare_tables(previous, table, looks=looks, alpha=alpha)
            start = before
            if at > 1 and first is not None:
                start = compare_tables(first, table, looks=looks, alpha=alpha)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        points.append(
            ScoredCheckpoint(step, _tokens_at(trained, step), side_of(table, step_name(step), own), before, start)
        )
        wobble.add(step, table)
        first, previous = first or table, table
    found, twins = wobble.percent(), noise_of_run(run_dir, scale)
    reference = str(previous.meta.get("reference")) if previous else ""
    notes = (
        [f"scored in other ways too; shown is {scale.words}, not {', '.join(o.words for o in others)}"]
        if others
        else []
    )
    return RunComparison(
        run=str(run_dir),
        reference=reference,
        checkpoints=tuple(_completed(points, found, told(twins), over)),
        notes=(*notes, *twins.problems),
        wobble_percent=found,
        twins=told(twins),
        tables=dict(sorted(paths.items())),
        unit=NATS if previous is None else unit_of(previous),
        worse_since=_worse_since(min(points, key=lambda point: point.side.loss), paths, alpha),
    )


def _worse_since(best: ScoredCheckpoint, paths: dict[int, Path], alpha: float) -> int | None:
    later = sorted(step for step in paths if step > best.step)
    if not later:
        return None
    lowest = read_table(paths[best.step])
    found = [compare_tables(lowest, read_table(paths[step]), alpha=alpha, pairs=len(later)) for step in later]
    p_holm = holm([one.difference.p for one in found])
    since = None
    for step, one, p in zip(reversed(later), reversed(found), reversed(p_holm), strict=True):
        if not (p < alpha and one.difference.value > 0):
            break
        since = step
    return since


def _completed(
    points: list[ScoredCheckpoint], wobble: float | None, twins: TwinNoise | None, over: bool
) -> Iterable[ScoredCheckpoint]:
    """The points with what is known once all are there: training noise and, of a run that is over, Holm's shares."""
    before, start = ([getattr(p, key) for p in points] for key in ("versus_previous", "versus_first"))
    if over:
        before, start = _in_one_family(before), _in_one_family(start)
    for at, point in enumerate(points):
        one_step = at > 0 and point.step == points[at - 1].step + 1
        about = {"wobble_percent": wobble, "twins": twins, "origin": ONE_RUN}
        yield replace(
            point,
            versus_previous=before[at] and replace(before[at], **about, one_step=one_step),
            versus_first=start[at] and replace(start[at], **about, one_step=one_step and at == 1),
        )


def _in_one_family(found: list[Comparison | None]) -> list[Comparison | None]:
    shares = iter(holm_shares([one.difference.p for one in found if one is not None]))
    return [one and replace(one, shares=float(next(shares))) for one in found]


class _Wobble:
    """Gathers what the wobble needs of one table after the other, so that not all have to be held."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.influence: list[NDArray[np.float64]] = []

    def add(self, step: int, table: LossTable) -> None:
        loss_C, tokens_C = by_cluster(table.loss, table.cluster), by_cluster(table.tokens, table.cluster)
        total = float(loss_C.sum())
        ratio = total / float(tokens_C.sum())
        self.steps.append(step)
        self.losses.append(ratio)
        self.influence.append((loss_C - ratio * tokens_C) / total if total > 0 else np.zeros_like(loss_C))

    def percent(self) -> float | None:
        if len({len(influence_C) for influence_C in self.influence}) != 1:
            return None  # not all are tables of one set
        return wobble_percent(self.steps, self.losses, np.stack(self.influence))


def wobble_of(run_dir: Path, scale: Scale) -> float | None:
    """The wobble of a run, in percent, from all its tables that were scored in one way.

    None where it cannot be told: too few tables, or a broken one among them.
    """
    wobble = _Wobble()
    try:
        for step, path in sorted(tables_of_run(run_dir)[scale].items()):
            wobble.add(step, read_table(path))
    except DataError:  # a table that nobody asked about does not stop a comparison
        return None
    return wobble.percent()


@dataclass(frozen=True)
class _OwnNoise:
    """What is known of the training noise of a run, from what was scored in one way."""

    wobble: float | None
    twins: TwinNoise | None


class KnownNoise:
    """Training noise by run and way of scoring, each told once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str], _OwnNoise] = {}

    def of(self, one: Found) -> _OwnNoise:
        if one.run is None:
            return _OwnNoise(None, None)
        path = one.path.resolve()
        way = path.parent, path.name.partition("@")[2]  # objective, dtype, a part or not
        if way not in self._known:
            scale = way_of(one.run, one.path)
            known = (None, None) if scale is None else (wobble_of(one.run, scale), told(noise_of_run(one.run, scale)))
            self._known[way] = _OwnNoise(*known)
        return self._known[way]


def with_noise(comparison: Comparison, a: Found, b: Found, known: KnownNoise) -> Comparison:
    """The comparison with the larger noise of the runs that its two tables are of, where they are of any, and with
    what the two have to do with each other."""
    both = [known.of(one) for one in (a, b)]
    wobbles = [one.wobble for one in both if one.wobble is not None]
    twins = [one.twins for one in both if one.twins is not None]
    same_run = a.run is not None and b.run is not None and a.run.resolve() == b.run.resolve()
    one_step = (
        same_run
        and not a.more
        and not b.more
        and a.step is not None
        and b.step is not None
        and abs(a.step - b.step) == 1
    )
    origin = provenance(a, b)
    caution = None if comparison.verdict in ("identical", "same weights") else origin.caution()
    return replace(
        comparison,
        wobble_percent=max(wobbles, default=None),
        twins=max(twins, key=lambda one: one.percent, default=None),
        one_step=one_step,
        origin=origin,
        cautions=(*comparison.cautions, *(c for c in (caution, a.caution, b.caution) if c is not None)),
    )


def _tokens_by_step(run: RunDir) -> tuple[list[int], list[int]]:
    """Steps in `metrics.jsonl`, ascending, and the tokens trained on up to each."""
    known = {line["step"]: line["tokens"] for line in read_jsonl(run.metrics) if "step" in line and "tokens" in line}
    steps = sorted(known)
    return steps, [int(known[step]) for step in steps]


def _tokens_at(trained: tuple[list[int], list[int]], step: int) -> int | None:
    steps, tokens = trained
    at = bisect_right(steps, step)
    if step == 0:
        return 0
    if not at or (steps[at - 1] != step and at < len(steps)):  # its line is missing among others: not known
        return None
    return tokens[at - 1]
