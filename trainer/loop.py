"""The training loop: read it from top to bottom, each line of a step is in sight.

The host never waits for the device inside a step: what a step measured rides on one all-reduce and is read a step late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import VernierError
from configs.load import micro_batch
from configs.schema import Config
from eval.losses import IGNORED
from eval.ranks import Ranks
from trainer.checkpoints import Clock
from trainer.data.shards import Windows
from trainer.engine import grad_norm_before_step, set_learning_rate
from trainer.metrics import memory_gib
from trainer.order import mixed_seed, share_of, windows_at
from trainer.schedule import learning_rate
from trainer.stop import Asked, Requests


@dataclass(frozen=True)
class Hooks:
    """What happens around steps: each is called on every rank, at the same step."""

    observe: Callable[[dict[str, Any]], None]  # a step's metrics, a step late
    snapshot: Callable[[Clock], None]
    checkpoint: Callable[[Clock], None]
    updated: Callable[[], None]  # the weights were updated; right after it, on the device's own time
    skipped: Callable[[Clock], None]  # the last batch of this clock was used up without an update
    saved: Callable[[Clock], None]  # a snapshot and a checkpoint that were asked for are on the disk


MOST_SKIPPED = 100  # updates in a row; fp16 finds its loss scale in far fewer


@dataclass
class Measured:
    """A step's figures on their way from the device."""

    line: dict[str, Any] | None  # None: the update was skipped, only the flags count
    sums: torch.Tensor  # fp64 [loss in nats, ranks asked to stop, by Ctrl-C, to save, gradient norm], on the CPU
    ready: Callable[[], Any]
    targets: int

    def read(self) -> tuple[dict[str, Any] | None, Asked]:
        """(metrics line, what any rank was asked for); waits for what was enqueued up to its own step."""
        self.ready()
        loss, stop, interrupt, save, norm = self.sums.tolist()
        line = self.line and {**self.line, "loss": loss / self.targets, "grad_norm": norm}
        return line, Asked(stop > 0, interrupt > 0, save > 0)


def train(
    engine: Any, config: Config, data: Windows, ranks: Ranks, clock: Clock, requests: Requests, hooks: Hooks
) -> tuple[Clock, bool, bool]:
    """Trains from `clock` to `config.steps`, or until asked to stop: gives (clock, stopped, by Ctrl-C)."""
    micro = micro_batch(config, ranks.world)
    accumulation = config.batch.global_ // (ranks.world * micro)
    pending: Measured | None = None
    asked = Asked()
    skipped = 0
    if clock.step == 0:
        hooks.snapshot(clock)
    while clock.step < config.steps and not asked.stop:
        started = time.perf_counter()
        step = clock.step + 1
        windows = windows_at(clock.position, batch=config.batch.global_, windows=len(data), seed=config.seed)
        # Of the whole global batch, known to every rank; a batch may be all masked.
        targets = max(1, int(data.target_counts(windows).sum()))
        rate = learning_rate(step, peak=config.optimizer.lr, steps=config.steps, schedule=config.schedule)
        set_learning_rate(engine, rate)

        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for ids_BT, target_BT, seed in micro_batches(data, windows, config, ranks, clock.position, micro):
            torch.manual_seed(seed)  # dropout is a function of the place in the data, not of rank or history
            loss = engine(ids_BT, target_BT)
            # DeepSpeed divides by accumulation and ranks; what is left is the mean over the global batch's targets.
            engine.backward(loss * (ranks.world * accumulation / targets))
            loss_sum += loss.detach()
            if engine.is_gradient_accumulation_boundary():
                norm = grad_norm_before_step(engine)
            engine.step()

        applied = engine.was_step_applied()  # not so where the gradient was not finite
        if applied:
            hooks.updated()
        clock = Clock(step if applied else clock.step, clock.position + 1, clock.tokens + targets)
        if pending is not None:
            asked |= _observe(pending, hooks)
        line = _line(step, clock, rate, time.perf_counter() - started, targets, ranks, micro) if applied else None
        norm = norm if norm is not None else engine.get_global_grad_norm()
        pending = _measure(line, loss_sum, norm, targets, requests.poll())
        skipped = 0 if applied else skipped + 1
        if not applied:  # the batch is used up, the step is made with the next
            hooks.skipped(clock)
            if skipped == MOST_SKIPPED:
                raise VernierError(
                    f"step {step}: the gradient was not finite {skipped} times in a row; lower optimizer.lr"
                )
            if asked.stop:
                hooks.checkpoint(clock)
            continue

        last = clock.step == config.steps
        saves = clock.step % config.checkpoint.every == 0 or last or asked.stop or asked.save
        shows = clock.step % config.snapshot.every == 0 or clock.step in config.snapshot.at or last or asked.save
        if saves or shows:  # the step's line is on disk before what follows from it
            asked |= _observe(pending, hooks)
            pending = None
            saves |= asked.stop or asked.save
            shows |= asked.save
        if shows:
            hooks.snapshot(clock)
        if saves:
            hooks.checkpoint(clock)
        if asked.save:
            hooks.saved(clock)
            asked = replace(asked, save=False)
    return clock, asked.stop and clock.step < config.steps, asked.interrupt


def micro_batches(
    data: Windows, windows: Any, config: Config, ranks: Ranks, position: int, micro: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """This rank's part of a global batch: (ids [B, T], targets [B, T], dropout seed), both int64 on the device."""
    for start, chosen in share_of(windows, rank=ranks.rank, world=ranks.world, micro=micro):
        rows, scored = data.rows(chosen)
        block = torch.from_numpy(rows)
        ids_BT, target_BT = block[:, :-1].contiguous(), block[:, 1:].contiguous()
        if scored is not None:
            target_BT[~torch.from_numpy(scored)] = IGNORED
        if ranks.device.type == "cuda":
            ids_BT, target_BT = (t.pin_memory().to(ranks.device, non_blocking=True) for t in (ids_BT, target_BT))
        yield ids_BT, target_BT, mixed_seed(config.seed, position, start)


def _measure(line: dict[str, Any] | None, loss_sum: torch.Tensor, norm: Any, targets: int, asked: Asked) -> Measured:
    flags = torch.tensor([asked.stop, asked.interrupt, asked.save], dtype=torch.float64)
    flags = flags.to(loss_sum.device, non_blocking=True)
    sums = torch.cat([loss_sum.reshape(1), flags])
    work = dist.all_reduce(sums, async_op=True)
    own = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64).reshape(1)
    if sums.device.type == "cpu":

        def arrived() -> None:
            work.wait()
            found[:-1] = sums

        found = torch.cat([torch.zeros(len(sums), dtype=torch.float64), own])
        return Measured(line, found, arrived, targets)
    work.wait()  # orders the stream behind the all-reduce; the host goes on
    on_host = torch.empty(len(sums) + 1, dtype=torch.float64, pin_memory=True)
    on_host.copy_(torch.cat([sums, own.to(sums.device, non_blocking=True)]), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Measured(line, on_host, event.synchronize, targets)


def _observe(pending: Measured, hooks: Hooks) -> Asked:
    line, asked = pending.read()
    if line is not None:
        hooks.observe(line)
    return asked


def _line(
    step: int, clock: Clock, rate: float, seconds: float, targets: int, ranks: Ranks, micro: int
) -> dict[str, Any]:
    return {
        "step": step,
        "position": clock.position - 1,
        "tokens": clock.tokens,
        "lr": rate,
        "step_s": round(seconds, 6),
        "tokens_per_s": round(targets / seconds, 1),
        "memory_gib": round(memory_gib(), 4),
        "ranks": ranks.world,
        "micro": micro,
    }
