"""The exponential moving average of the weights, kept in fp32 beside the masters that each rank owns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainer.engine import zero_state


class EmaWeights:
    """After each update: average = decay · average + (1 − decay) · master. It starts as the masters are now.

    Like the moments of Adam it is cut over the ranks, at any ZeRO stage, so it costs 4 bytes a parameter ÷ ranks.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._device = engine.device
        self._fragments = list(zero_state.fragments(engine))
        self._masters = [zero_state.master_view(engine, fragment) for fragment in self._fragments]
        self._held = [master.clone() for master in self._masters]
        self._place = {fragment.name: index for index, fragment in enumerate(self._fragments)}

    @torch.no_grad()
    def on_after_optimizer_step(self, step: int) -> None:
        """Takes the masters in; on their device, without a wait for it."""
        if self._held:  # a rank may own nothing of a small model
            torch._foreach_lerp_(self._held, self._masters, 1 - self.decay)

    def start(self) -> None:
        """Starts anew from the masters as they are now."""
        for held, master in zip(self._held, self._masters, strict=True):
            held.copy_(master)

    def restore(self, lookup: zero_state.Lookup) -> None:
        """Puts back what a checkpoint holds under the kind `ema`."""
        for fragment, held in zip(self._fragments, self._held, strict=True):
            held.copy_(lookup("ema", fragment.name, fragment.start, fragment.length))

    def fragments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, flat fp32 values) of what this rank owns, cut as `zero_state.fragments` are."""
        for fragment, held in zip(self._fragments, self._held, strict=True):
            yield fragment.name, held

    def whole(self, name: str, parameter: Any) -> torch.Tensor:
        """The whole average of a trained parameter, fp32, in its shape [...], on every rank (a collective)."""
        shape = zero_state.full_shape(parameter)
        flat = torch.zeros(math.prod(shape), dtype=torch.float32, device=self._device)
        index = self._place.get(name)
        if index is not None:
            fragment = self._fragments[index]
            flat[fragment.start : fragment.start + fragment.length] = self._held[index].to(self._device)
        dist.all_reduce(flat)  # exact: no two ranks own the same place
        return flat.view(shape)
