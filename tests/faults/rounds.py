"""Which training is killed how, as a function of a seed and a number: cards are dealt, nothing is started here.

In any 12 rounds in a row of a seed every combination of settings, every kind of process and every phase of a save
comes up: settings come round every 12 rounds and faults every 11, so in time each meets each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import Any, Literal

from configs.fault_injection import SAVE_POINTS

STAGES = (1, 2, 3)
PRECISIONS = ("fp32", "bf16")
ACCUMULATIONS = (1, 2)
RANKS = 2
WINDOWS_A_RANK = 4  # of a global batch; see torture.yaml

EVALUATION = ("evaluator", "evaluator's agent")  # may be killed without ending the training
PROCESSES = ("rank", "agent", "vernier", *EVALUATION)
FIRST_RANK_ONLY = ("told", "hashed", "renamed", "thinned")
FAULTS = (*PROCESSES, *SAVE_POINTS)
FAULTS_COME_ROUND = 11  # no divisor in common with the 12 combinations
STARTING_S = 6.0  # about what a process takes to the first thing it does for the run


@dataclass(frozen=True)
class Settings:
    """What is trained how."""

    stage: int
    precision: str
    accumulation: int
    placement: str = "separate"

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.precision}-x{self.accumulation}-{self.placement}"

    @property
    def reference(self) -> Settings:
        """The settings of the run to compare with: one that is not scored trains like one that is scored beside."""
        return replace(self, placement="separate") if self.placement == "none" else self

    def overrides(self) -> list[str]:
        return [
            f"zero.stage={self.stage}",
            f"precision={self.precision}",
            f"batch.micro={WINDOWS_A_RANK // self.accumulation}",
            f"eval.placement={self.placement}",
        ]


@dataclass(frozen=True)
class Kill:
    """One `kill -9`.

    "start": `seconds` after the process has appeared. "step": `seconds` after the step that lies at `fraction` of those
    still to be made. "point": where the rank comes to this phase of a save for the `nth` time.
    """

    process: str
    how: Literal["start", "step", "point"]
    rank: int = 0
    seconds: float = 0.0
    fraction: float = 0.0
    point: str = ""
    nth: int = 0

    @property
    def fault(self) -> str:
        """The card it was dealt for."""
        return self.point or self.process

    @property
    def ends_training(self) -> bool:
        return self.process not in EVALUATION

    def asked(self) -> str:
        """What `VERNIER_FAULTS` must say for it; empty for a kill from outside."""
        return f"kill={self.point}:{self.rank}:{self.nth}" if self.how == "point" else ""

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.process == "rank" else self.process
        if self.how == "point":
            return f"{who} at {self.point} ×{self.nth}"
        if self.how == "start":
            return f"{who} {self.seconds:.2f} s old"
        return f"{who} after {self.fraction:.0%} +{1000 * self.seconds:.0f} ms"


@dataclass(frozen=True)
class Round:
    """A training, and how it is killed."""

    seed: int
    number: int
    settings: Settings
    kills: tuple[Kill, ...]

    def facts(self) -> dict[str, Any]:
        """For a log."""
        return {
            "seed": self.seed,
            "number": self.number,
            "settings": self.settings.name,
            "kills": [str(kill) for kill in self.kills],
        }


def draw_round(seed: int, number: int, *, brief: bool = False) -> Round:
    """Round `number` (from 0) of a seed; always the same one.

    Args:
        brief: one kill (at times two) and four combinations of settings, for tests that must not take long.
    """
    random = Random(f"{seed} {number} {brief}")
    wanted = _dealt(seed, number)
    if not brief:
        wanted += random.choices(FAULTS, k=max(0, random.choice((1, 1, 2, 2, 3)) - len(wanted)))
    random.shuffle(wanted)
    scored_beside = any(fault in EVALUATION for fault in wanted)
    if brief:
        four = _four(seed)
        settings = four[0] if scored_beside else four[number % 4]
    else:
        cards = [Settings(*one) for one in product(STAGES, PRECISIONS, ACCUMULATIONS)]
        Random(f"{seed} settings").shuffle(cards)
        placement = "separate" if scored_beside else random.choice(("separate", "inline", "none"))
        settings = replace(cards[number % len(cards)], placement=placement)
    latest = 0.9 if brief else 1.0
    kills = tuple(
        _kill(random, fault, latest=latest if at == len(wanted) - 1 else 0.5) for at, fault in enumerate(wanted)
    )
    return Round(seed, number, settings, kills)


def _dealt(seed: int, number: int) -> list[str]:
    """The faults whose turn it is: the round may have more, not fewer."""
    cards = list(FAULTS)
    Random(f"{seed} faults").shuffle(cards)
    return cards[number % FAULTS_COME_ROUND :: FAULTS_COME_ROUND]


def _four(seed: int) -> list[Settings]:
    """Four settings with each stage, precision, accumulation and placement among them; the first is scored beside."""
    random = Random(f"{seed} four")
    stages = [*random.sample(STAGES, 3), random.choice(STAGES)]
    precisions, accumulations = list(PRECISIONS), list(ACCUMULATIONS)
    random.shuffle(precisions)
    random.shuffle(accumulations)
    pairs = list(product(precisions, accumulations))
    placements = ("separate", "inline", "separate", "none")
    return [Settings(s, *pair, p) for s, pair, p in zip(stages, pairs, placements, strict=True)]


def _kill(random: Random, fault: str, *, latest: float) -> Kill:
    if fault in SAVE_POINTS:
        rank = 0 if fault in FIRST_RANK_ONLY else random.randrange(RANKS)
        return Kill("rank", "point", rank, point=fault, nth=random.randint(1, 3))
    rank = random.randrange(RANKS) if fault == "rank" else 0
    if random.random() < 0.3:
        return Kill(fault, "start", rank, seconds=round(random.uniform(0, STARTING_S), 3))
    fraction = random.uniform(0, latest)  # one that others follow leaves them something to interrupt
    return Kill(fault, "step", rank, seconds=round(random.uniform(0, 0.05), 4), fraction=round(fraction, 3))
