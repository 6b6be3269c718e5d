"""What a callback may do, for parts of ours and for classes of the user's own (`callbacks: [module:Class]`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config


@dataclass(frozen=True)
class RunContext:
    """What a callback is made with.

    Attributes:
        config: the settings, as this start trains by them.
        directory: of the run.
        rank: of this process, from 0 to `world` − 1. Every rank has a callback of its own.
        step: optimizer steps made before this start, by which a log of one's own is cut: steps after it are made again.
        model: the module that is trained; under ZeRO-3 a rank holds only parts of its weights.
    """

    config: Config
    directory: Path
    rank: int
    world: int
    step: int
    model: Any


class Callback:
    """Every method is called on every rank at the same step, and does nothing here: override what you need.

    It runs in the training loop: what takes long holds training up. What it raises ends training with its name, or
    drops it with a caution where `callbacks_may_fail` is true.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def on_step_begin(self, step: int) -> None:
        """Optimizer step `step` (from 1) is about to be made; again with the next batch if that one makes no update."""

    def on_before_optimizer_step(self, step: int) -> None:
        """The gradients of the global batch are there, the weights not yet changed."""

    def on_after_optimizer_step(self, step: int) -> None:
        """The weights were updated."""

    def on_step_end(self, line: Mapping[str, Any]) -> None:
        """The figures of a step, as its line in `metrics.jsonl` has them (loss in nats per target): a step late, since
        the host does not wait for the device; but before a checkpoint of that step or a later one is begun."""

    def on_snapshot(self, step: int, directory: Path) -> None:
        """A snapshot is whole on the disk: weights to score and to use. Some steps late, as it is written meanwhile."""

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """A checkpoint is whole on the disk: all that is needed to go on. Some steps late."""

    def on_end(self, step: int) -> None:
        """Training ends well after `step` steps, at its last or since it was asked to stop. All is saved."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))
