"""The training loop: read it from top to bottom, each line of a step is in sight.

The host never waits for the device inside a step, unless a guard asks for it (stage 0 in fp32 and amp, and
`guards.on_spike: skip`): what a step measured rides on one all-reduce and is read a step late.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from configs.load import micro_batch
from configs.schema import Config
from eval.distributed.ranks import Ranks
from eval.scoring.losses import IGNORED
from trainer.checkpoint.checkpoint import Clock
from trainer.checkpoint.checkpointer import Due
from trainer.data.shards import Windows
from trainer.engine.build import grad_norm_before_step, set_learning_rate
from trainer.engine.schedule import learning_rate
from trainer.engine.zero_state import refuse_update
from trainer.faults.guards import Guard, bent, starve
from trainer.metrics import memory_gib
from trainer.model.dropout import WindowDropout
from trainer.order import share_of, window_seeds, windows_at
from trainer.stop_requests import Asked, Requests


@dataclass(frozen=True)
class Hooks:
    """What happens around steps: each is called on every rank, at the same step."""

    observe: Callable[[dict[str, Any]], None]  # a step's metrics, a step late
    save: Callable[[Clock, Due], None]  # copy what is due; it is written while training goes on
    before_update: Callable[[], None]  # waits until what is being saved is copied
    updated: Callable[[], None]  # the weights were updated; right after it, on the device's own time
    mark: Callable[[int], None]  # so many steps are made, the next begins


@dataclass
class Measured:
    """A step's figures on their way from the device."""

    line: dict[str, Any] | None  # None: the update was skipped, only the flags count
    sums: torch.Tensor  # fp64 [loss in nats, added to it, ranks asked to stop, by Ctrl-C, to save, gradient norm]; CPU
    ready: Callable[[], Any]
    targets: int
    adds: bool  # the model adds something to its language loss

    def read(self) -> tuple[dict[str, Any] | None, Asked]:
        """(metrics line, what any rank was asked for); waits for what was enqueued up to its own step."""
        self.ready()
        loss, added, stop, interrupt, save, norm = self.sums.tolist()
        line = self.line and {"loss": loss / self.targets, **self.line, "grad_norm": norm}
        if line and self.adds:
            line["auxiliary_loss"] = added / self.targets
        return line, Asked(stop > 0, interrupt > 0, save > 0)


def train(
    engine: Any,
    config: Config,
    data: Windows,
    ranks: Ranks,
    clock: Clock,
    requests: Requests,
    dropout: WindowDropout,
    guard: Guard,
    hooks: Hooks,
) -> tuple[Clock, bool, bool]:
    """Trains from `clock` to `config.steps`, or until asked to stop: gives (clock, stopped, by Ctrl-C)."""
    micro = micro_batch(config, ranks.world)
    accumulation = config.batch.global_ // (ranks.world * micro)
    pending: Measured | None = None
    asked = Asked()
    if clock.step == 0:
        hooks.save(clock, Due(snapshot=True))
    while clock.step < config.steps and not asked.stop:
        hooks.mark(clock.step)
        if guard.passes_over(clock.position):
            clock = replace(clock, position=clock.position + 1)
            continue
        started = time.perf_counter()
        step = clock.step + 1
        windows = windows_at(clock.position, batch=config.batch.global_, windows=len(data), seed=config.seed)
        targets = int(data.target_counts(windows).sum())  # of the whole global batch, known to every rank
        if targets == 0:  # all prompts: nothing to learn, and an update would only decay the weights
            guard.without_targets(clock)
            clock = replace(clock, position=clock.position + 1)
            continue
        rate = learning_rate(step, peak=config.optimizer.lr, steps=config.steps, schedule=config.schedule)
        set_learning_rate(engine, rate)

        loss_sum, added_sum = torch.zeros((2,), dtype=torch.float64, device=ranks.device)
        for ids_BT, target_BT, seeds in micro_batches(data, windows, config, ranks, clock.position, micro):
            hooks.mark(clock.step)
            starve(config, len(ids_BT))
            with dropout.windows(seeds):  # a function of each window's place in the data, not of rank or history
                loss = bent(engine(ids_BT, target_BT), clock.position)
            # DeepSpeed divides by accumulation and ranks; what is left is the mean over the global batch's targets.
            engine.backward(loss * (ranks.world * accumulation / targets))
            loss_sum += loss.detach()
            added = engine.module.added
            if added is not None:  # told apart: `loss` is the language's alone
                loss_sum -= added
                added_sum += added
            if engine.is_gradient_accumulation_boundary():
                norm = grad_norm_before_step(engine)
                hooks.before_update()
                if guard.refuses(clock, loss_sum, targets, norm):
                    refuse_update(engine)
            engine.step()

        applied = engine.was_step_applied()  # not so where the gradient was not finite, or the guard refused
        if applied:
            hooks.updated()
        idle = 0 if applied else clock.idle + 1
        clock = Clock(step if applied else clock.step, clock.position + 1, clock.tokens + targets, idle)
        if pending is not None:
            asked |= _observe(pending, hooks)
        seconds = time.perf_counter() - started
        line = _line(step, clock, windows, rate, seconds, targets, ranks, micro) if applied else None
        line = line and {**line, **guard.measured}  # the very loss that was decided on, where it is known by now
        norm = norm if norm is not None else engine.get_global_grad_norm()
        pending = _measure(line, loss_sum, added_sum, norm, targets, engine.module.adds, requests.poll())
        guard.after(applied, clock, loss_sum)
        if not applied:  # the batch is used up, the step is made with the next
            if asked.stop and clock.step:
                hooks.save(clock, Due(checkpoint=True))
            continue

        due = _due(clock, config, asked)
        if due:  # the step's line is written before what follows from it
            asked |= _observe(pending, hooks)
            pending = None
            due = _due(clock, config, asked)
            hooks.save(clock, due)
            asked = replace(asked, save=False)
    return clock, asked.stop and clock.step < config.steps, asked.interrupt


def _due(clock: Clock, config: Config, asked: Asked) -> Due:
    last = clock.step == config.steps
    return Due(
        snapshot=clock.step % config.snapshot.every == 0 or clock.step in config.snapshot.at or last or asked.save,
        checkpoint=clock.step % config.checkpoint.every == 0 or last or asked.stop or asked.save,
        asked=asked.save,
    )


def micro_batches(
    data: Windows, windows: Any, config: Config, ranks: Ranks, position: int, micro: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """This rank's part of a global batch: (ids [B, T], targets [B, T], a seed a window), int64 on the device."""
    for chosen in share_of(windows, rank=ranks.rank, world=ranks.world, micro=micro):
        rows, scored = data.rows(chosen)
        block = torch.from_numpy(rows)
        # The targets are written to: of one window `contiguous` would copy nothing, and the ids would change with them.
        ids_BT, target_BT = block[:, :-1].contiguous(), block[:, 1:].clone()
        if scored is not None:
            target_BT[~torch.from_numpy(scored)] = IGNORED
        if ranks.device.type == "cuda":
            ids_BT, target_BT = (t.pin_memory().to(ranks.device, non_blocking=True) for t in (ids_BT, target_BT))
        yield ids_BT, target_BT, window_seeds(config.seed, position, chosen)


def _measure(
    line: dict[str, Any] | None,
    loss_sum: torch.Tensor,
    added_sum: torch.Tensor,
    norm: Any,
    targets: int,
    adds: bool,
    asked: Asked,
) -> Measured:
    flags = torch.tensor([asked.stop, asked.interrupt, asked.save], dtype=torch.float64)
    flags = flags.to(loss_sum.device, non_blocking=True)
    sums = torch.cat([loss_sum.reshape(1), added_sum.reshape(1), flags])
    work = dist.all_reduce(sums, async_op=True)
    own = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64).reshape(1)
    if sums.device.type == "cpu":

        def arrived() -> None:
            work.wait()
            found[:-1] = sums

        found = torch.cat([torch.zeros(len(sums), dtype=torch.float64), own])
        return Measured(line, found, arrived, targets, adds)
    work.wait()  # orders the stream behind the all-reduce; the host goes on
    on_host = torch.empty(len(sums) + 1, dtype=torch.float64, pin_memory=True)
    on_host.copy_(torch.cat([sums, own.to(sums.device, non_blocking=True)]), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Measured(line, on_host, event.synchronize, targets, adds)


def _observe(pending: Measured, hooks: Hooks) -> Asked:
    line, asked = pending.read()
    if line is not None:
        hooks.observe(line)
    return asked


def _line(
    step: int, clock: Clock, windows: Any, rate: float, seconds: float, targets: int, ranks: Ranks, micro: int
) -> dict[str, Any]:
    return {
        "step": step,
        "position": clock.position - 1,
        "windows": f"{zlib.crc32(windows.tobytes()):08x}",  # two runs saw the same ones where these are equal
        "tokens": clock.tokens,
        "targets": targets,
        "lr": rate,
        "step_s": round(seconds, 6),
        "tokens_per_s": round(targets / seconds, 1),
        "memory_gib": round(memory_gib(), 4),
        "ranks": ranks.world,
        "micro": micro,
    }
