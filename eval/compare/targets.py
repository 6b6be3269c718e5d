"""What `compare` was given: a loss table, a snapshot, RUN@STEP, RUN@lastN or RUN; and which tables it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.errors import ConfigError, DataError
from configs.load import load_config
from configs.run.directory import RunDir, step_name, step_of
from configs.run.facts import read_reference_facts
from eval.tables import LossTable, mean_table, parse_table_name, read_table

_STEP = re.compile(r"(?:step-)?(\d+)")
_LAST = re.compile(r"last([1-9]\d{0,3})")


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
    """One thing to compare: `table` is a file, otherwise a run, at `step` where one was named, or the mean of the
    losses of its `last` scored steps."""

    text: str
    table: Path | None = None
    run: Path | None = None
    step: int | None = None
    last: int | None = None


@dataclass(frozen=True)
class Found:
    """The table that a target means: what to call it, where it lies, and its run and step where it is of one. `more`:
    tables of earlier steps of which the mean is meant with it."""

    text: str
    name: str
    path: Path
    run: Path | None
    step: int | None
    more: tuple[Path, ...] = ()

    def read(self) -> LossTable:
        """The losses that are meant.

        Raises:
            DataError: a table cannot be read, or they are not of the same samples.
        """
        tables = [read_table(path) for path in (*self.more, self.path)]
        for path, table in zip(self.more, tables, strict=False):
            if not np.array_equal(table.document, tables[-1].document):
                raise DataError(f"{path}: has other samples than {self.path}")
        return mean_table(tables)

    @property
    def caution(self) -> str | None:
        """What a reader should know of it."""
        if not self.more:
            return None
        steps = ", ".join(str(step_of(path.name)) for path in (*self.more, self.path))
        return f"{self.name}: the mean of the losses at steps {steps}, not the loss of averaged weights"


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


def way_of(run: Path, table: Path) -> Scale | None:
    """The way in which one of a run's whole tables was scored; None for any other file."""
    try:
        for scale, paths in tables_of_run(run).items():
            if any(path.resolve() == table.resolve() for path in paths.values()):
                return scale
    except DataError:
        return None
    return None


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
        last = _LAST.fullmatch(step)
        if last is not None:
            return Target(text, run=run, last=int(last[1]))
        match = _STEP.fullmatch(step)
        if match is None:
            raise DataError(f"{text}: {step!r} is not a step, or last3, say; {_have(tables_of_run(run).values())}")
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
    if target.last is not None:
        enough = {scale: {max(tables): tables[max(tables)]} for scale, tables in found.items() if _more(target, tables)}
        if not enough:
            raise DataError(f"{target.text}: fewer than {target.last} steps of it are scored; {_have(found.values())}")
        return enough
    if target.step is None:
        return found
    here = {scale: {target.step: by_step[target.step]} for scale, by_step in found.items() if target.step in by_step}
    if not here:
        raise DataError(f"{target.text}: step {target.step} of {target.run} is not scored; {_have(found.values())}")
    return here


def _more(target: Target, tables: dict[int, Path]) -> tuple[Path, ...] | None:
    """The tables besides the last that `target` means the mean of; None where there are too few."""
    if target.last is None:
        return ()
    steps = sorted(tables)[-target.last :]
    return tuple(tables[step] for step in steps[:-1]) if len(steps) == target.last else None


def _with_more(target: Target, path: Path) -> tuple[Path, ...]:
    if target.run is None or target.last is None:
        return ()
    found = tables_of_run(target.run).values()
    return next((_more(target, tables) or () for tables in found if path in tables.values()), ())


def resolve_scale(text: str, scale: Scale) -> Path:
    """The table that an argument means, scored in the way `scale`: of a run, its last step so scored.

    Raises:
        DataError: no such thing, or not scored so; names the ways there are.
    """
    target = parse_target(text)
    if target.last is not None:
        raise DataError(f"{text}: a mean of checkpoints is for vernier compare; name one step here")
    found = _options(target)
    tables = found.get(scale)
    if tables is None:
        raise DataError(f"{text}: is not scored as {scale.words}, but {', '.join(one.words for one in found)}")
    return tables[max(tables)]


def find_tables(texts: Sequence[str]) -> list[Found]:
    """The tables that two or more targets mean together.

    Where a run was scored in several ways, the one that fits the others is taken. Runs without a step, if all are,
    mean their last step scored in all.

    Raises:
        DataError: no such thing, not scored, or no step in common.
    """
    targets = [parse_target(text) for text in texts]
    options = [_options(target) for target in targets]
    alone = [target.run is not None and target.step is None and target.last is None for target in targets]
    runs_alone = len(targets) > 1 and all(alone)
    paths = _best_paths(options, runs_alone=runs_alone)
    if paths is None:
        raise DataError(
            "compare: no step is scored in "
            + ("both" if len(targets) == 2 else f"all {len(targets)}")
            + "".join(f"; {text}: {_have(found.values())}" for text, found in zip(texts, options, strict=True))
        )
    return [
        Found(target.text, name, path, *_home(target, path), _with_more(target, path))
        for target, path, name in zip(targets, paths, _names(targets, paths), strict=True)
    ]


def _best_paths(options: list[dict[Scale, dict[int, Path]]], *, runs_alone: bool) -> list[Path] | None:
    """A table of each target, scored as alike as can be; None where runs without a step have none in common."""
    best: tuple[tuple[int, ...], list[Path]] | None = None
    for wanted in dict.fromkeys(scale for found in options for scale in found):
        chosen = [min(found, key=lambda scale: _alike(scale, wanted), default=wanted) for found in options]
        tables = [found[scale] for found, scale in zip(options, chosen, strict=True)]
        common = set.intersection(*(set(by_step) for by_step in tables))
        if runs_alone and not common:
            continue
        steps = [max(common) if runs_alone else max(by_step) for by_step in tables]
        rank = (
            *(-sum(parts) for parts in zip(*(_alike(scale, wanted) for scale in chosen), strict=True)),
            len(common) if runs_alone else sum(map(len, tables)),
        )
        if best is None or rank > best[0]:
            best = rank, [by_step[step] for by_step, step in zip(tables, steps, strict=True)]
    return None if best is None else best[1]


def _alike(scale: Scale, wanted: Scale) -> tuple[bool, bool, bool]:
    """What differs between two ways of scoring, the gravest first."""
    return scale.reference != wanted.reference, scale.objective != wanted.objective, scale.dtype != wanted.dtype


def _home(target: Target, path: Path) -> tuple[Path | None, int | None]:
    """The run and step of a table, also where the file itself was named."""
    run = target.run
    if run is None and path.resolve().parent.parent.name == "losses":
        run = find_run(str(path.resolve().parents[2]))
    return run, step_of(path.name) if run is not None else None


def _names(targets: Sequence[Target], paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell all apart: the step; with its run; what the user wrote."""
    labels = [
        path.name.partition("@")[0] if target.last is None else f"last{target.last}"
        for target, path in zip(targets, paths, strict=True)
    ]
    runs = [target.run for target in targets]
    if all(run is not None for run in runs) and len({run.resolve() for run in runs if run is not None}) > 1:
        steps = [label if label.startswith("last") else str(step_of(label)) for label in labels]
        labels = [f"{run.name}@{step}" for run, step in zip(runs, steps, strict=True) if run is not None]
    if len(set(labels)) < len(set(paths)):
        return [target.text for target in targets]
    return labels


def find_reference(given: Path | None, table: LossTable, found: list[Found]) -> Path | None:
    """The reference set that a table was scored on: the one given, or the one that a run's settings name.

    Raises:
        ConfigError: the one given is none, or another.
    """
    if given is not None:
        if not (given / "reference.json").is_file():
            raise ConfigError(f"--reference: {given} is not a reference set (it has no reference.json)")
        try:
            tokens = read_reference_facts(given, "fingerprints.tokens")["fingerprints"]["tokens"]
        except DataError as error:
            raise ConfigError(
                f"--reference: {given}/reference.json does not say which tokens it has ({error})"
            ) from None
        if tokens != table.meta.get("reference"):
            raise ConfigError(f"--reference: {given} is not the set that these tables were scored on")
        return given
    for run in dict.fromkeys(one.run for one in found if one.run is not None):
        try:
            directory = load_config(run / "config.yaml").reference_dir
            if read_reference_facts(directory, "fingerprints.tokens")["fingerprints"]["tokens"] == table.meta.get(
                "reference"
            ):
                return directory
        except (ConfigError, DataError):  # a run from elsewhere: its data may not be here
            continue
    return None
