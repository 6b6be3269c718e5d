"""Forward passes with the faults that `configs.fault_injection` asks for: losses bent, memory that is short."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from configs.fault_injection import asked
from configs.schema import Config

Forward = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def forward_of(engine: Any, config: Config) -> Forward:
    """(ids [B, T], targets [B, T], data position) → the loss in nats, a scalar; the engine's own where no fault is
    asked for."""
    faults = asked()
    if faults is None:
        return lambda ids_BT, target_BT, position: engine(ids_BT, target_BT)

    def forward(ids_BT: torch.Tensor, target_BT: torch.Tensor, position: int) -> torch.Tensor:
        limit = math.inf if faults.windows is None or config.gradient_checkpointing else faults.windows
        if len(ids_BT) > limit:
            raise torch.OutOfMemoryError(f"VERNIER_FAULTS: {len(ids_BT)} windows are more than the {limit} that fit")
        factor = math.nan if position in faults.nan else 100.0 if position in faults.spike else 1.0
        loss: torch.Tensor = engine(ids_BT, target_BT) * factor
        return loss

    return forward
