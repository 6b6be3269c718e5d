"""What a comparison came to, in one form for every kind: as JSON, in words, as rows, as pictures, for a gate."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from configs.errors import ConfigError, DataError
from launcher.compare.options import Options
from launcher.compare.report import power_words, print_comparison, print_leaderboard, print_run_table
from launcher.text import say

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.along_run import RunComparison
    from eval.compare.breakdown import Breakdown
    from eval.compare.leaderboard import Leaderboard
    from eval.compare.pair import Comparison
    from eval.compare.recipes import RecipeComparison
    from eval.compare.targets import Found
    from eval.curves.training import TrainingComparison
    from eval.tables import LossTable


class Result(Protocol):
    """A comparison that is made."""

    @property
    def gated(self) -> Comparison | RecipeComparison | None:
        """What a gate is held against; None where there is no one pair."""

    @property
    def notes(self) -> Sequence[str]:
        """What is said beside the JSON; in words it is said with the rest."""

    def to_json(self) -> dict[str, Any]: ...

    def show(self, console: Console) -> None:
        """Says it to people."""

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows, for `--parquet`."""

    def plot(self, folder: Path) -> list[Path]:
        """Draws it; gives the files. Raises DataError where they cannot be written."""

    def next_commands(self, targets: list[str]) -> list[str]:
        """What usually follows this comparison of `targets`, without the `vernier` before it."""


@dataclass(frozen=True)
class PairResult:
    """Two tables."""

    comparison: Comparison
    a: LossTable
    b: LossTable
    power_percent: float | None = None
    breakdowns: tuple[Any, ...] = ()
    changed: Any = None

    notes: tuple[str, ...] = ()

    @property
    def gated(self) -> Comparison:
        return self.comparison

    def to_json(self) -> dict[str, Any]:
        content = self.comparison.to_json()
        if self.breakdowns:
            content["breakdown"] = [one.to_json() for one in self.breakdowns]
        if self.changed is not None:
            content["changed"] = self.changed.to_json()
        return with_power(content, self.comparison, self.power_percent)

    def show(self, console: Console) -> None:
        from launcher.compare.breakdown import print_breakdown, print_changed

        print_comparison(self.comparison, console)
        say_power(self.comparison, self.power_percent, console)
        for one in self.breakdowns:
            print_breakdown(one, console)
        if self.changed is not None:
            print_changed(self.changed, console)

    def rows(self) -> list[dict[str, Any]]:
        from eval.compare.parquet import comparison_row

        return [comparison_row(self.comparison)]

    def plot(self, folder: Path) -> list[Path]:
        from eval.compare.plots import plot_pair

        return plot_pair(self.a, self.b, self.comparison, folder)

    def next_commands(self, targets: list[str]) -> list[str]:
        return [f"compare {shlex.join(targets)} --by source,length --changed 10"] if not self.breakdowns else []


@dataclass(frozen=True)
class RunResult:
    """A run's scored checkpoints; a gate is for the last against the one before."""

    comparison: RunComparison
    power_percent: float | None = None

    @property
    def gated(self) -> Comparison | None:
        return self.comparison.checkpoints[-1].versus_previous

    @property
    def notes(self) -> list[str]:
        return list(self.comparison.notes)

    def to_json(self) -> dict[str, Any]:
        return with_power(self.comparison.to_json(), self.gated, self.power_percent)

    def show(self, console: Console) -> None:
        print_run_table(self.comparison, console)
        say_power(self.gated, self.power_percent, console)

    def rows(self) -> list[dict[str, Any]]:
        from eval.compare.parquet import run_rows

        return run_rows(self.comparison)

    def plot(self, folder: Path) -> list[Path]:
        from eval.compare.plots import plot_run

        return plot_run(self.comparison, self.comparison.tables, folder)

    def next_commands(self, targets: list[str]) -> list[str]:
        steps = [point.step for point in self.comparison.checkpoints]
        best = self.comparison.best.step
        pair = steps[-2:] if best == steps[-1] else [best, steps[-1]]
        return [f"compare {shlex.join(f'{targets[0]}@{step}' for step in pair)}"] if len(steps) > 1 else []


@dataclass(frozen=True)
class LeaderboardResult:
    """Three tables and more."""

    board: Leaderboard
    gated: None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return self.board.to_json()

    def show(self, console: Console) -> None:
        print_leaderboard(self.board, console)

    def rows(self) -> list[dict[str, Any]]:
        from eval.compare.parquet import leaderboard_rows

        return leaderboard_rows(self.board)

    def plot(self, folder: Path) -> list[Path]:
        from eval.compare.plots import plot_leaderboard

        return plot_leaderboard(self.board, folder)

    def next_commands(self, targets: list[str]) -> list[str]:
        return [f"compare {shlex.join(targets)} --plots leaderboard"]


@dataclass(frozen=True)
class TrainingResult:
    """The training losses of two runs."""

    found: TrainingComparison
    gated: None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return self.found.to_json()

    def show(self, console: Console) -> None:
        from launcher.compare.training import print_training

        print_training(self.found, console)

    def rows(self) -> list[dict[str, Any]]:
        """Raises ConfigError: a curve has no rows of its own."""
        raise ConfigError("--parquet: training curves have no rows")

    def plot(self, folder: Path) -> list[Path]:
        from launcher.compare.training import PLOT, draw_training

        draw_training(self.found, folder / PLOT)
        return [folder / PLOT]

    def next_commands(self, targets: list[str]) -> list[str]:
        return [f"compare {shlex.join(targets)}"]


@dataclass(frozen=True)
class RecipeResult:
    """Two groups of runs."""

    comparison: RecipeComparison
    notes: tuple[str, ...] = ()

    @property
    def gated(self) -> RecipeComparison:
        return self.comparison

    def to_json(self) -> dict[str, Any]:
        return self.comparison.to_json()

    def show(self, console: Console) -> None:
        from launcher.compare.recipes import print_recipes

        print_recipes(self.comparison, console)

    def rows(self) -> list[dict[str, Any]]:
        """Raises ConfigError: groups have no rows of their own."""
        raise ConfigError("--parquet: groups of runs have no rows")

    def plot(self, folder: Path) -> list[Path]:
        """Raises ConfigError: groups are not drawn."""
        raise ConfigError("--plots: groups of runs are not drawn")

    def next_commands(self, targets: list[str]) -> list[str]:
        return []


def compare_targets(targets: list[str], options: Options) -> Result:
    """Compares what `vernier compare` was given, but for a sweep.

    Raises:
        ConfigError, DataError: usage, or nothing that can be compared.
    """
    _ = options.power_percent, options.parts  # what is wrong with them is said before anything is read
    if options.against:
        from eval.compare.recipes import compare_groups

        return RecipeResult(compare_groups(targets, options.against, seeds_from=options.seeds_from))
    if options.training:
        return _training(targets, options)
    if len(targets) > 2:
        return _leaderboard(targets)
    if len(targets) == 1:
        return _along_run(targets[0], options)
    return compare_pair(targets, options)


def compare_pair(targets: list[str], options: Options) -> PairResult:
    """Compares two tables, with what else is asked of them.

    Raises:
        ConfigError: the reference set is needed and cannot be found.
    """
    from eval.compare.along_run import KnownNoise, with_noise
    from eval.compare.pair import compare_tables
    from eval.compare.targets import find_reference, find_tables

    found = find_tables(targets)
    a, b = (one.read() for one in found)
    comparison = compare_tables(a, b, names=(found[0].name, found[1].name))
    made = PairResult(with_noise(comparison, found[0], found[1], KnownNoise()), a, b, options.power_percent)
    parts = options.parts
    if not parts and options.changed is None:
        return made
    reference = find_reference(options.reference, a, found)
    a_name, b_name = found[0].name, found[1].name  # labels are but steps
    each = _breakdowns(made, parts, reference) if parts else ()
    breakdowns = tuple(replace(one, a=a_name, b=b_name) for one in each)
    changed = None
    if options.changed is not None:
        from eval.compare.most_changed import most_changed

        if reference is None:
            raise ConfigError("--changed: needs the texts, and no run here says where they are; give --reference REF")
        changed = replace(most_changed(a, b, reference, options.changed), a=a_name, b=b_name)
    return replace(made, breakdowns=breakdowns, changed=changed)


def _breakdowns(made: PairResult, parts: list[str], reference: Path | None) -> list[Breakdown]:
    from configs.run.facts import read_reference_facts
    from eval.compare.breakdown import breakdown
    from eval.reference.set import read_documents

    sources, length = None, None
    if "source" in parts:
        if reference is None:
            raise ConfigError("--by source: needs the sources of the texts; give --reference REF")
        sources = list(read_documents(reference)[0])
    if reference is not None:
        length = int(read_reference_facts(reference, "sequence_length")["sequence_length"])
    return [breakdown(made.a, made.b, one, sources=sources, sequence_length=length) for one in parts]


def _along_run(target: str, options: Options) -> RunResult:
    from eval.compare.along_run import compare_run
    from eval.compare.targets import parse_target

    parsed = parse_target(target)
    if parsed.run is None or parsed.step is not None:
        raise ConfigError(f"compare: {target} is one set of losses; give a second to compare it with, or a run")
    made = RunResult(compare_run(parsed.run), options.power_percent)
    for option, wanted in (("--gate", options.gate), ("--power", options.power)):
        if wanted is not None and made.gated is None:
            step = made.comparison.checkpoints[-1].step
            raise ConfigError(f"{option}: only step {step} of {target} is scored; it needs one before it")
    return made


def _leaderboard(targets: list[str]) -> LeaderboardResult:
    from eval.compare.along_run import KnownNoise, with_noise
    from eval.compare.leaderboard import leaderboard
    from eval.compare.targets import find_tables

    found: list[Found] = find_tables(targets)
    known = KnownNoise()
    board = leaderboard(
        [one.read() for one in found],
        [one.name for one in found],
        finish=lambda comparison, a, b: with_noise(comparison, found[a], found[b], known),
    )
    return LeaderboardResult(board)


def _training(targets: list[str], options: Options) -> TrainingResult:
    from eval.compare.targets import find_run
    from eval.curves.training import compare_training

    runs = [find_run(text) for text in targets]
    for text, run in zip(targets, runs, strict=True):
        if run is None:
            raise DataError(f"compare --training: {text} is not a run directory (or the name of one under runs/)")
    first, second = (run for run in runs if run is not None)
    return TrainingResult(compare_training(first, second, first=options.from_step, last=options.to_step))


def with_power(content: dict[str, Any], comparison: Comparison | None, wanted: float | None) -> dict[str, Any]:
    """JSON with what seeing a change of so many percent would take, where that was asked."""
    if wanted is None or comparison is None:
        return content
    power = comparison.power(wanted)
    return {**content, "power": power and power.to_json()}


def say_power(comparison: Comparison | None, wanted: float | None, console: Console) -> None:
    """The same in words."""
    if wanted is not None and comparison is not None:
        say(console, f"  {power_words(comparison.power(wanted), wanted)}")
