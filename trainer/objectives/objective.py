"""What the rest of training knows of an objective."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from configs.schema import Config
from trainer.data.examples import AnyWindows
from trainer.order import Int64s


class Objective(Protocol):
    """What is learnt. It needs a config with prepared data; its kind of model is `trainer.model.build.kind_of`'s."""

    scored_as: tuple[str, ...]  # objectives of reference sets that its snapshots can be scored on

    def __init__(self, config: Config) -> None: ...

    def count(self, data: AnyWindows, windows: Int64s, position: int) -> int:
        """Targets of a global batch, the windows [batch.global] at a data position: known to every rank, before it is
        cut over them."""

    def inputs(self, data: AnyWindows, windows: Int64s, position: int) -> dict[str, torch.Tensor]:
        """What `module` takes for some windows [n] of the batch at a position, each tensor [n, …], on the CPU."""

    def dry(self, rows: int) -> dict[str, torch.Tensor]:
        """Inputs of so many windows, tensors [rows, …] with no content, as large as they get."""

    def module(self, lm: Any) -> nn.Module:
        """The model with its loss, as DeepSpeed wants it: one module, one call, which gives a micro-batch's summed loss
        (a scalar). Its `lm` is the Hugging Face model, `added` [] what that added to the loss in the last pass, where
        it `adds` anything."""


def rows_of(inputs: dict[str, torch.Tensor]) -> int:
    """Windows of a micro-batch, whose tensors are [windows, …]."""
    return len(next(iter(inputs.values())))


def parameter_count(model: nn.Module) -> int:
    """Trainable parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
