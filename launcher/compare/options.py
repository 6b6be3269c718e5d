"""What may be asked of `vernier compare` besides its targets, and which options go together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError

if TYPE_CHECKING:
    from eval.compare.gate import Gate, Question

BY = ("source", "length", "position")


@dataclass(frozen=True)
class Options:
    """Each named as its option is."""

    gate: str | None = None
    margin: str | None = None
    of: str | None = None
    against: tuple[str, ...] = ()
    seeds_from: tuple[str, ...] = ()
    power: str | None = None
    by: str | None = None
    changed: int | None = None
    reference: Path | None = None
    parquet: Path | None = None
    plots: Path | None = None
    training: bool = False
    from_step: int | None = None
    to_step: int | None = None
    advantage: str | None = None
    half_life: str | None = None
    age: str | None = None

    def given(self) -> list[str]:
        """The options that were given, as they are typed, those of the gate last."""
        empty = Options()
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(empty, f.name)]
        return [f"--{name.replace('_', '-')}" for name in sorted(names, key=lambda n: (n in ("gate", "margin"), n))]

    @property
    def power_percent(self) -> float | None:
        """Raises ConfigError where it is no percentage above 0."""
        if self.power is None:
            return None
        value = _percent(self.power)
        if not value >= 1e-9:  # below, the count of documents is beyond any number that could be meant
            raise ConfigError(f"--power: {self.power!r} is not a percentage above 0, such as 0.001%")
        return value

    @property
    def margin_percent(self) -> float:
        """Raises ConfigError where it is no percentage."""
        return parse_margin("0%" if self.margin is None else self.margin)

    @property
    def wanted_gate(self) -> Gate | None:
        """Raises ConfigError where there is no such gate."""
        if self.gate is None or self.gate == "better" or self.gate == "not-worse":
            return self.gate  # type: ignore[return-value]
        raise ConfigError(f"--gate: {self.gate!r} is not a verdict; use better or not-worse")

    @property
    def question(self) -> Question:
        """Of what a gate asks. Raises ConfigError where there is no such question."""
        if self.of is None or self.of == "weights":
            return "recipe" if self.of is None and self.against else "weights"
        if self.of == "run" or self.of == "recipe":
            return self.of  # type: ignore[return-value]
        raise ConfigError(f"--of: {self.of!r} is no question; use weights, run or recipe")

    @property
    def parts(self) -> list[str]:
        """What `--by` names. Raises ConfigError where it names something else."""
        wanted = [] if self.by is None else list(dict.fromkeys(word.strip() for word in self.by.split(",")))
        for word in wanted:
            if word not in BY:
                raise ConfigError(f"--by: {word!r} is none of {', '.join(BY)}")
        return wanted


_ALL = frozenset(f"--{field.name.replace('_', '-')}" for field in fields(Options))
_OF_TRAINING = frozenset(("--training", "--plots", "--from-step", "--to-step"))
_OF_ADVANTAGE = frozenset(("--advantage", "--half-life", "--age"))
Rule = tuple[frozenset[str], Callable[[frozenset[str], int], bool], str]
# (options, where they may stand: by what else is given and how many targets there are, what is said elsewhere).
RULES: tuple[Rule, ...] = (
    (
        _ALL - frozenset(("--against", "--seeds-from", "--gate", "--margin", "--of")),
        lambda given, count: "--against" not in given,
        "--against: compares groups of runs; it does not go with {option}",
    ),
    (
        frozenset(("--seeds-from",)),
        lambda given, count: "--against" in given,
        "--seeds-from: is about recipes; give --against too",
    ),
    (
        frozenset(("--by", "--changed", "--advantage")),
        lambda given, count: count == 2,
        "{option}: is about two; {count} given, expected A B",
    ),
    (
        frozenset(("--training",)),
        lambda given, count: count == 2,
        "--training: compares the training losses of two runs; {count} given",
    ),
    (
        _ALL - _OF_TRAINING,
        lambda given, count: "--training" not in given,
        "--training: does not go with {option}, which is about loss tables",
    ),
    (
        frozenset(("--from-step", "--to-step")),
        lambda given, count: "--training" in given,
        "{option}: is about training losses; give --training too",
    ),
    (
        frozenset(("--reference",)),
        lambda given, count: bool(given & {"--by", "--changed"}),
        "--reference: only --by and --changed read a reference set; a comparison needs the tables alone",
    ),
    (
        _OF_ADVANTAGE,
        lambda given, count: given >= _OF_ADVANTAGE,
        "{option}: --advantage, --half-life and --age go together",
    ),
    (
        _ALL - _OF_ADVANTAGE,
        lambda given, count: not given & _OF_ADVANTAGE,
        "--advantage: does not go with {option}; ask for the two one after the other",
    ),
    (
        frozenset(("--of",)),
        lambda given, count: "--gate" in given,
        "--of: says what a gate asks of; give --gate better or --gate not-worse too",
    ),
    (
        frozenset(("--margin",)),
        lambda given, count: "--gate" in given,
        "--margin: is how much a gate allows; give --gate better or --gate not-worse too",
    ),
    (
        frozenset(("--gate",)),
        lambda given, count: count <= 2 or "--against" in given,
        "--gate: holds one comparison; {count} targets given, expected A B or one run",
    ),
    (
        frozenset(("--power",)),
        lambda given, count: count <= 2,
        "--power: goes by the spread of one pair; {count} targets given, expected A B or one run",
    ),
)


def check_options(targets: list[str], options: Options) -> None:
    """Refuses what makes no sense together, in one line.

    Raises:
        ConfigError: names the option and what it goes with.
    """
    count, given = len(targets), options.given()
    if not targets:
        raise ConfigError("compare: expected two or more tables, snapshots, runs or RUN@STEPs, or one run; got none")
    for about, may_stand, words in RULES:
        option = next((one for one in given if one in about), None)
        if option is not None and not may_stand(frozenset(given), count):
            raise ConfigError(words.format(option=option, count=count))
    if options.changed is not None and options.changed < 1:
        raise ConfigError(f"--changed: {options.changed} is not a number of samples of 1 or more")


def parse_margin(text: str) -> float:
    """Percent in a margin such as `0.05%`, `0.05 %` or `0.05`.

    Raises:
        ConfigError: it is no percentage of 0 or more.
    """
    value = _percent(text)
    if not value >= 0:
        raise ConfigError(f"--margin: {text!r} is not a percentage of 0 or more, such as 0.05%")
    return value


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
