"""Arithmetic of what a training holds in memory and puts on the disk, from its number of parameters: bytes, no files.

Weights, gradients, optimizer state, the copies that saving writes from, checkpoints and snapshots. Activations and
logits are not in it, nor the buffers that DeepSpeed sends through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from configs.memory.scoring import BYTES

FP32 = BYTES["fp32"]
MASTERS_AND_MOMENTS = 3 * FP32  # of a parameter: what Adam updates, and what a checkpoint holds


@dataclass(frozen=True)
class TrainingState:
    """Bytes that one rank holds throughout training; `on_host`: all but the weights is in host memory."""

    weights: int
    gradients: int
    optimizer: int
    average: int  # the moving average of the weights
    on_host: bool

    @property
    def device(self) -> int:
        """Bytes on the rank's device (on a CPU machine, that is the host too)."""
        return self.weights + (0 if self.on_host else self.gradients + self.optimizer + self.average)

    @property
    def host(self) -> int:
        """Bytes that `zero.offload` keeps in host memory."""
        return self.gradients + self.optimizer + self.average if self.on_host else 0


@dataclass(frozen=True)
class SavingCopy:
    """Bytes of host memory that one rank copies what it saves to, before it is written."""

    checkpoint: int
    snapshot: int
    average: int  # the snapshot of the moving average

    @property
    def most(self) -> int:
        """The most at one time: all of them.

        Each copy stays in its place for the next save, so from the first checkpoint and snapshot on all are there. And
        at the last step all are due at once.
        """
        return self.checkpoint + self.snapshot + self.average


def training_state(
    parameters: int, *, precision: str, stage: int, ranks: int, offload: bool = False, average: bool = False
) -> TrainingState:
    """What one of `ranks` ranks holds of weights, gradients and optimizer state, in bytes.

    Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (SC 2020), §3.1: with
    16-bit weights and gradients, Adam takes 2Ψ + 2Ψ + KΨ bytes for Ψ parameters, K = 12: fp32 masters and two moments.
    §5: stage 1 divides KΨ by the ranks, stage 2 the gradients too, stage 3 the weights too. In fp32 and amp weights and
    gradients take 4Ψ each and K = 8 at stage 0; from stage 1 on DeepSpeed keeps a master of what a rank updates even
    there, so K = 12.

    Args:
        parameters: trained ones, tied ones once.
        precision: fp32, amp, bf16 or fp16.
        stage: of ZeRO, 0 to 3.
        offload: optimizer state lives in host memory (`zero.offload: cpu`), and with it, in fp32, the gradients that
            a rank updates by.
        average: a moving average of the weights is kept (`ema.decay`): 4 bytes a parameter, divided by the ranks at
            every stage, beside the masters.
    """
    half = precision in ("bf16", "fp16")
    weight = BYTES[precision] if half else FP32
    optimizer = MASTERS_AND_MOMENTS if half or stage else 2 * FP32
    gradients = _part(FP32 * parameters, ranks) if offload else _part(weight * parameters, ranks if stage >= 2 else 1)
    return TrainingState(
        weights=_part(weight * parameters, ranks if stage >= 3 else 1),
        gradients=gradients,
        optimizer=_part(optimizer * parameters, ranks if stage >= 1 else 1),
        average=_part(FP32 * parameters, ranks) if average else 0,
        on_host=offload,
    )


def saving_copy(parameters: int, *, dtype: str, ranks: int, average: bool = False) -> SavingCopy:
    """What one of `ranks` ranks copies to host memory in order to save, in bytes: its part of a checkpoint or snapshot.

    Parts are equal but for whole tensors: at stage 0 checkpoints are dealt out by parameter, and a snapshot's files
    hold whole tensors.

    Args:
        dtype: of snapshots: fp32, bf16 or fp16.
        average: as in `training_state`; a snapshot then comes with one of the average.
    """
    snapshot = _part(snapshot_bytes(parameters, dtype), ranks)
    return SavingCopy(
        checkpoint=_part(checkpoint_bytes(parameters, average=average), ranks),
        snapshot=snapshot,
        average=snapshot if average else 0,
    )


def checkpoint_bytes(parameters: int, *, average: bool = False) -> int:
    """Bytes of a whole checkpoint on the disk, but for headers: fp32 masters, both moments, the moving average."""
    return parameters * (MASTERS_AND_MOMENTS + (FP32 if average else 0))


def snapshot_bytes(parameters: int, dtype: str) -> int:
    """Bytes of a snapshot's weights on the disk, but for headers and the tokenizer beside them."""
    return parameters * BYTES[dtype]


def checkpoints_kept(steps: int, *, every: int, keep: int, keep_every: int | None) -> int:
    """How many checkpoints there are at most at one time: those that stay, and one more before they are thinned.

    A checkpoint is taken at multiples of `every` and at the last step; the newest `keep` stay, and multiples of
    `keep_every`.
    """
    made = _multiples(steps, every)
    newest = _last(steps, every, (), keep)
    stay = len(newest) + _apart(steps, every, keep_every, newest)
    return min(stay + 1, made + (steps % every != 0))


def snapshots_kept(steps: int, *, every: int, at: Sequence[int], keep: int | None, keep_every: int | None) -> int:
    """How many snapshots there are at most at one time, where each is scored before the next is thinned out.

    A snapshot is taken at step 0, at multiples of `every`, at the steps `at` and at the last. Without `keep` all stay;
    with it the newest `keep`, the best, multiples of `keep_every`, and one more before they are thinned.
    """
    extra = {step for step in at if 0 < step < steps and step % every}
    made = 1 + _multiples(steps, every) + len(extra) + (steps % every != 0)
    if keep is None:
        return made
    newest = _last(steps, every, extra, keep)
    apart = 0
    if keep_every is not None:
        apart = 1 + _apart(steps, every, keep_every, newest)  # step 0 is a multiple of everything
        apart += sum(step % keep_every == 0 and step not in newest for step in extra)
    return min(made, len(newest) + apart + 1 + 1)


def _multiples(steps: int, every: int) -> int:
    """How many of 1 … `steps` are multiples of `every`."""
    return steps // every


def _last(steps: int, every: int, extra: Sequence[int] | set[int], keep: int) -> set[int]:
    """The newest `keep` of all steps at which something is saved (step 0 left out)."""
    multiples = range(steps // every * every, 0, -every)[:keep]
    return set(sorted({*multiples, *extra, steps}, reverse=True)[:keep])


def _apart(steps: int, every: int, keep_every: int | None, newest: set[int]) -> int:
    """Saved steps that stay for being multiples of `keep_every`, and not for being new."""
    if keep_every is None:
        return 0
    both = math.lcm(every, keep_every)
    stay = _multiples(steps, both) - sum(step % both == 0 for step in newest)
    return stay + (steps % every != 0 and steps % keep_every == 0 and steps not in newest)


def _part(size: int, ranks: int) -> int:
    """A rank's part of `size` bytes, rounded up."""
    return -(-size // ranks)
