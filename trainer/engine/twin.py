"""Twins: a run trained on from one of its steps with every weight moved by one unit in the last place.

All else is equal: data, order, dropout, optimizer state. So what twins come to differ by is the noise of training
itself, that of a change which nobody would call one. `vernier twin` makes their folders; `twin.json` says of one whose
it is, from which step, and the how manieth.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError, DataError
from configs.files.atomic import read_json
from configs.run.directory import RunDir, step_of


@dataclass(frozen=True)
class Twin:
    """The `number`-th twin of a run from step `at`, 0 being the weights that it began with."""

    at: int
    number: int

    def moved(self, name: str, start: int, weight: torch.Tensor) -> torch.Tensor:
        """fp32 weights, [length], each moved up or down by one unit in the last place.

        Which way is a function of the twin's number, the parameter's name and the place in it (`start` is that of the
        first), so it hangs neither on ranks nor on how ZeRO cuts the state.
        """
        place = torch.arange(start, start + weight.numel(), dtype=torch.int64, device=weight.device)
        mixed = place * 0x2545F491 + zlib.crc32(f"{self.number} {name}".encode())
        mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        up = ((mixed ^ (mixed >> 12)) >> 7) & 1 == 1
        towards = torch.where(up, torch.inf, -torch.inf).to(weight.dtype)
        return torch.nextafter(weight, towards.view_as(weight))

    @torch.no_grad()
    def move_model(self, model: Any) -> None:
        """Moves the weights of a model that is whole, in fp32, on this rank."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self.moved(name, 0, parameter.flatten()).view_as(parameter))


def read_twin(run: RunDir, checkpoint: Path | None) -> Twin | None:
    """The twin whose weights are to be moved now; None for a run that is no twin, or goes on after the step at which
    they were.

    Args:
        checkpoint: what the run goes on from, None: from the start.

    Raises:
        ConfigError: what the twin is to go on from is not there.
        DataError: its `twin.json` cannot be read.
    """
    if not run.twin.is_file():
        return None
    told = read_json(run.twin)
    if not isinstance(told, dict) or not all(type(told.get(key)) is int for key in ("at", "number")):
        raise DataError(f"{run.twin}: does not say the twin's step and number; make the twin again with vernier twin")
    twin = Twin(told["at"], told["number"])
    step = 0 if checkpoint is None else step_of(checkpoint.name)
    if step is not None and step < twin.at:
        raise ConfigError(f"{run.path}: is a twin from step {twin.at}, whose checkpoint is gone; delete its folder")
    return twin if step == twin.at else None
