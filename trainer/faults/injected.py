"""Forward passes with the faults that `configs.fault_injection` asks for: losses bent, memory that is short."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from configs.fault_injection import asked
from configs.schema import Config
from trainer.objectives.objective import rows_of

Inputs = dict[str, torch.Tensor]
Forward = Callable[[Inputs, int], torch.Tensor]


def forward_of(engine: Any, config: Config) -> Forward:
    """(inputs of a micro-batch, data position) → the loss in nats, a scalar; the engine's own where no fault is asked
    for."""
    faults = asked()
    if faults is None:
        return lambda inputs, position: engine(**inputs)

    def forward(inputs: Inputs, position: int) -> torch.Tensor:
        limit = math.inf if faults.windows is None or config.gradient_checkpointing else faults.windows
        rows = rows_of(inputs)
        if rows > limit:
            raise torch.OutOfMemoryError(f"VERNIER_FAULTS: {rows} windows are more than the {limit} that fit")
        factor = math.nan if position in faults.nan else 100.0 if position in faults.spike else 1.0
        loss: torch.Tensor = engine(**inputs) * factor
        return loss

    return forward
