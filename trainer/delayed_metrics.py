"""What a step measured, read a step late: it rides on one small all-reduce, for which the host does not wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.stop_requests import Asked


@dataclass(frozen=True)
class Report:
    """What the ranks know of a step together.

    Attributes:
        line: the step's line for `metrics.jsonl`; None where it made no update.
        asked: what any rank was asked for.
        saves: the sum over ranks of saves that have ended.
    """

    line: dict[str, Any] | None
    asked: Asked
    saves: int


class DelayedMetrics:
    """Holds the figures of one step on their way from the device."""

    def __init__(self, *, adds: bool) -> None:
        """`adds`: the model adds something to its language loss, which is told apart."""
        self.adds = adds
        self._line: dict[str, Any] | None = None
        self._targets = 0
        self._read: Callable[[], list[float]] | None = None

    def push(
        self,
        line: dict[str, Any] | None,
        sums_2: torch.Tensor,
        norm: Any,
        targets: int,
        asked: Asked,
        saves: int,
    ) -> None:
        """Starts the all-reduce of a step; what was pushed before must have been popped. A collective.

        Args:
            line: what the host knows of the step; None where it made no update.
            sums_2: of this rank, [loss in nats, what was added to it], fp64 [2], on the device.
            norm: of the gradient, over all ranks; None where it is not known.
            targets: of the global batch.
            saves: that have ended on this rank.
        """
        self._line, self._targets = line, targets
        flags = torch.tensor([*astuple(asked), saves], dtype=torch.float64)
        sums = torch.cat([sums_2, flags.to(sums_2.device, non_blocking=True)])
        work = dist.all_reduce(sums, async_op=True)
        own = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64).reshape(1)
        if sums.device.type == "cpu":

            def read_cpu() -> list[float]:
                work.wait()
                return torch.cat([sums, own]).tolist()

            self._read = read_cpu
            return
        work.wait()  # orders the stream behind the all-reduce; the host goes on
        on_host = torch.empty(len(sums) + 1, dtype=torch.float64, pin_memory=True)
        on_host.copy_(torch.cat([sums, own.to(sums.device, non_blocking=True)]), non_blocking=True)
        event = torch.cuda.Event()
        event.record()

        def read_gpu() -> list[float]:
            event.synchronize()
            return on_host.tolist()

        self._read = read_gpu

    def pop(self) -> Report | None:
        """What was pushed last, None if nothing was; waits for what was enqueued up to its own step."""
        if self._read is None:
            return None
        loss, added, *flags, saves, norm = self._read()
        self._read = None
        line = self._line and {"loss": loss / self._targets, **self._line, "grad_norm": norm}
        if line and self.adds:
            line["auxiliary_loss"] = added / self._targets
        return Report(line, Asked(*(flag > 0 for flag in flags)), round(saves))
