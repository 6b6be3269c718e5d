"""What `compare` was given: a loss table, a snapshot of a run, RUN@STEP or RUN; and which tables it means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from configs.errors import DataError
from configs.rundir import RunDir, step_name, step_of
from eval.tables import LossTable, parse_table_name, read_table

_STEP = re.compile(r"(?:step-)?(\d+)")


@dataclass(frozen=True)
class Scale:
    """A way of scoring: tables of one scale can be subtracted. `reference`: 8 digits of its fingerprint."""

    reference: str
    objective: str
    dtype: str
    folder: str = field(default="", compare=False)

    @property
    def words(self) -> str:
        return f"{self.folder or self.reference} ({self.objective}, {self.dtype})"


@dataclass(frozen=True)
class Target:
    """One thing to compare: `table` is a file, otherwise a run, at `step` where one was named."""

    text: str
    table: Path | None = None
    run: Path | None = None
    step: int | None = None


def tables_of_run(run: Path) -> dict[Scale, dict[int, Path]]:
    """Whole loss tables of a run's steps, by way of scoring.

    Raises:
        DataError: there is not one yet.
    """
    out: dict[Scale, dict[int, Path]] = {}
    for path in sorted(RunDir(run).losses.glob("*/step-*.parquet")):
        named, step = parse_table_name(path.name), step_of(path.name)
        if named is None or step is None or named[0] != step_name(step):
            continue  # a scoring that was stopped early, or not ours
        folder = path.parent.name
        scale = Scale(folder.rpartition("-")[2], named[1], named[2], folder)
        out.setdefault(scale, {})[step] = path
    if not out:
        raise DataError(
            f"{run}: nothing has been scored yet; score a snapshot with: "
            f"vernier eval {run}/snapshots/{step_name(0)[:-8]}… --reference REF"
        )
    return out


def most_scored(run: Path) -> tuple[Scale, dict[int, Path], list[Scale]]:
    """(the way of scoring with most tables, its tables by step, the other ways)."""
    found = tables_of_run(run)
    best = max(found, key=lambda scale: (len(found[scale]), max(found[scale])))
    return best, found[best], [scale for scale in found if scale is not best]


def find_run(text: str) -> Path | None:
    """The run directory that a path, or a bare name under `runs/`, means; None where there is none."""
    given = Path(text)
    for path in (given, Path("runs") / given) if len(given.parts) == 1 else (given,):
        if (path / "config.yaml").is_file() or (path / "losses").is_dir():
            return path
    return None


def parse_target(text: str) -> Target:
    """What a command-line argument means.

    Raises:
        DataError: nothing that could be compared; says what could.
    """
    path = Path(text)
    if path.is_file() or path.suffix == ".parquet":
        return Target(text, table=path)
    if path.parent.name == "snapshots" and step_of(path.name) is not None:
        run = find_run(str(path.parent.parent))
        if run is not None:
            return Target(text, run=run, step=step_of(path.name))
    run = find_run(text)
    if run is not None:
        return Target(text, run=run)
    name, at, step = text.rpartition("@")
    run = find_run(name) if at and name else None
    if run is not None:
        match = _STEP.fullmatch(step)
        if match is None:
            raise DataError(f"{text}: {step!r} is not a step; {_have(tables_of_run(run).values())}")
        return Target(text, run=run, step=int(match[1]))
    if (path / "config.json").is_file():
        raise DataError(
            f"{text}: a model directory is scored before it is compared: vernier eval {text} --reference REF"
        )
    raise DataError(f"{text}: no such loss table (.parquet), run, RUN@STEP or snapshot of a run")


def _have(tables: Iterable[dict[int, Path]]) -> str:
    steps = sorted({step for by_step in tables for step in by_step})
    shown = [str(s) for s in steps] if len(steps) <= 24 else [*map(str, steps[:8]), "…", *map(str, steps[-8:])]
    return f"scored steps: {', '.join(shown)}"


def _options(target: Target) -> dict[Scale, dict[int, Path]]:
    """Tables that `target` may mean, by way of scoring and step; a file stands at step −1."""
    if target.run is None:
        assert target.table is not None
        meta = read_table(target.table).meta
        scale = Scale(str(meta.get("reference"))[:8], str(meta.get("objective")), str(meta.get("dtype")))
        return {scale: {-1: target.table}}
    found = tables_of_run(target.run)
    if target.step is None:
        return found
    here = {scale: {target.step: by_step[target.step]} for scale, by_step in found.items() if target.step in by_step}
    if not here:
        raise DataError(f"{target.text}: step {target.step} of {target.run} is not scored; {_have(found.values())}")
    return here


def resolve_target(text: str) -> LossTable:
    """The table that an argument means by itself: of a run, its last step, as it was scored most often.

    Raises:
        DataError: no such thing, or not scored; names the steps that are.
    """
    found = _options(parse_target(text))
    tables = max(found.values(), key=len)
    return read_table(tables[max(tables)])


def resolve_pair(first: str, second: str) -> tuple[LossTable, LossTable, tuple[str, str]]:
    """The two tables to compare and what to call them.

    Where a run was scored in several ways, the one that fits the other side is taken. Two runs without a step
    mean their last step scored in both.

    Raises:
        DataError: no such thing, not scored, or no step in common.
    """
    a, b = parse_target(first), parse_target(second)
    found_a, found_b = _options(a), _options(b)
    last_in_both = a.run is not None and b.run is not None and a.step is None and b.step is None
    pairs = []
    for (scale_a, tables_a), (scale_b, tables_b) in product(found_a.items(), found_b.items()):
        common = set(tables_a) & set(tables_b)
        if last_in_both and not common:
            continue
        step_a, step_b = (max(common), max(common)) if last_in_both else (max(tables_a), max(tables_b))
        alike = (
            scale_a.reference == scale_b.reference,
            scale_a.objective == scale_b.objective,
            scale_a.dtype == scale_b.dtype,
            len(common) if last_in_both else len(tables_a) + len(tables_b),
        )
        pairs.append((alike, tables_a[step_a], tables_b[step_b]))
    if not pairs:
        raise DataError(
            f"compare: no step is scored in both; {first}: {_have(found_a.values())}; "
            f"{second}: {_have(found_b.values())}"
        )
    _, path_a, path_b = max(pairs, key=lambda pair: pair[0])
    return read_table(path_a), read_table(path_b), _names(a, b, path_a, path_b)


def _names(a: Target, b: Target, path_a: Path, path_b: Path) -> tuple[str, str]:
    """The shortest names that tell the two apart: the step; with its run; what the user wrote."""
    labels = [path.name.partition("@")[0] for path in (path_a, path_b)]
    if a.run is not None and b.run is not None and a.run.resolve() != b.run.resolve():
        labels = [f"{t.run.name}@{step_of(n)}" for t, n in zip((a, b), labels, strict=True) if t.run is not None]
    if labels[0] == labels[1] and path_a != path_b:
        return a.text, b.text
    return labels[0], labels[1]
