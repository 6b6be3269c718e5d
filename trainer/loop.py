"""The training loop: read `Loop.run` from top to bottom, each line of a step is in sight.

The host never waits for the device inside a step, unless a guard asks for it (stage 0 in fp32 and amp, and
`guards.on_spike: skip`): what a step measured is read a step late (`trainer.delayed_metrics`).
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from configs.load import micro_batch
from configs.run.directory import RunDir
from configs.schema import Config, seconds_of
from eval.distributed.ranks import Ranks
from trainer.callbacks.dispatch import Callbacks
from trainer.callbacks.metrics import lines_up_to, memory_gib
from trainer.checkpoint.checkpoint import Clock
from trainer.checkpoint.checkpointer import Checkpointer, Due
from trainer.data.examples import AnyWindows
from trainer.delayed_metrics import DelayedMetrics
from trainer.engine.build import grad_norm_before_step, set_learning_rate
from trainer.engine.schedule import learning_rate
from trainer.engine.zero_state import refuse_update
from trainer.faults.adaptations import memory_errors
from trainer.faults.guards import Guard
from trainer.faults.injected import forward_of
from trainer.faults.watchdog import Watchdog
from trainer.model.dropout import WindowDropout
from trainer.objectives import Objective
from trainer.order import Int64s, share_of, window_seeds, windows_at
from trainer.stop_requests import Asked, Requests
from trainer.utilisation import Utilisation


class Outcome(NamedTuple):
    """How training ended: where it stands, whether it was asked to stop before its last step, and by Ctrl-C."""

    clock: Clock
    stopped: bool
    interrupted: bool


@dataclass(frozen=True)
class Batch:
    """A global batch: its place in the data, its windows, and how many targets all of them have together."""

    position: int
    windows: Int64s  # [batch.global]
    targets: int


@dataclass
class Loop:
    """What training steps need; `clock` is where they stand."""

    engine: Any
    config: Config
    objective: Objective
    data: AnyWindows
    ranks: Ranks
    clock: Clock
    requests: Requests
    dropout: WindowDropout
    guard: Guard
    checkpointer: Checkpointer
    callbacks: Callbacks
    watchdog: Watchdog
    utilisation: Utilisation | None  # None: what the device does at best is not known

    def __post_init__(self) -> None:
        self.micro = micro_batch(self.config, self.ranks.world)
        self.forward = forward_of(self.engine, self.config)
        self.delayed = DelayedMetrics(adds=self.engine.module.adds)
        self.asked = Asked()

    def run(self) -> Outcome:
        """Trains to `config.steps`, or until asked to stop, or to end here."""
        self.ends = self.time_limit()
        if self.clock.step == 0:
            self.save(Due(snapshot=True))
        while self.clock.step < self.config.steps and not self.asked.stop:
            self.watchdog.mark(self.clock.step)
            self.callbacks.on_step_begin(self.clock.step + 1)
            started = time.perf_counter()
            batch = self.next_batch()
            if batch is None:  # to be passed over, or nothing in it to learn
                self.clock = replace(self.clock, position=self.clock.position + 1)
                continue
            rate = self.set_rate()
            sums_2 = self.accumulate(batch)
            applied, norm = self.update(batch, sums_2[0])
            self.clock = self.clock.after(applied, batch.targets)
            self.end_in_time()
            self.read_report()  # of the step before
            line = self.line(batch, rate, time.perf_counter() - started) if applied else None
            self.delayed.push(line, sums_2, norm, batch.targets, self.requests.poll(), self.checkpointer.ended)
            self.guard.after(applied, self.clock, sums_2[0])
            due = self.due(applied)
            if due:
                self.read_report()  # a step's line is written before what follows from it
                self.save(self.due(applied))
                self.asked = replace(self.asked, save=False)
            if applied and self.asked.end:
                return Outcome(self.clock, stopped=False, interrupted=False)
        return Outcome(self.clock, self.asked.stop and self.clock.step < self.config.steps, self.asked.interrupt)

    def time_limit(self) -> float:
        """When `max_time` is over, on the monotonic clock: on the first rank, which counts for all. What was trained in
        earlier starts is in the lines of their steps, so that no checkpoint differs by how long it took."""
        if self.config.max_time is None or not self.ranks.is_rank_zero:
            return math.inf
        spent = sum(line.get("step_s", 0.0) for line in lines_up_to(RunDir(self.config.run_dir), self.clock.step))
        return time.monotonic() + (seconds_of(self.config.max_time) or math.inf) - spent

    def end_in_time(self) -> None:
        """Asks for the end where `max_time` is over; the ranks agree on it as on all that is asked for."""
        if time.monotonic() >= self.ends and not self.requests.ended_by:
            asked = self.config.max_time
            self.requests.ended_by = {"key": "max_time", "value": asked, "why": f"it has trained for {asked}"}

    def next_batch(self) -> Batch | None:
        """The global batch at the clock's position; None where it makes no step."""
        position = self.clock.position
        if self.guard.passes_over(position):
            return None
        size, count = self.config.batch.global_, len(self.data)
        windows = windows_at(position, batch=size, windows=count, seed=self.config.seed)
        targets = self.objective.count(self.data, windows, position)  # of all of it, known to every rank
        if targets == 0:  # all prompts: an update would only decay the weights
            self.guard.without_targets(self.clock)
            return None
        return Batch(position, windows, targets)

    def set_rate(self) -> float:
        """Sets the learning rate of the step that is being made, and gives it."""
        peak, step = self.config.optimizer.lr, self.clock.step + 1
        schedule = self.config.schedule
        rate = learning_rate(step, peak=peak, steps=schedule.steps or self.config.steps, schedule=schedule)
        set_learning_rate(self.engine, rate)
        return rate

    def accumulate(self, batch: Batch) -> torch.Tensor:
        """Forward and backward over this rank's micro-batches: [loss in nats, what was added to it], fp64 [2]."""
        sums_2 = torch.zeros((2,), dtype=torch.float64, device=self.ranks.device)
        # DeepSpeed divides by accumulation and ranks; what is left is the mean over the global batch's targets.
        scale = (self.config.batch.global_ // self.micro) / batch.targets
        for inputs, seeds in micro_batches(self.objective, self.data, batch, self.config, self.ranks):
            self.watchdog.mark(self.clock.step)
            with self.dropout.windows(seeds):  # a function of each window's place in the data, not of rank or history
                loss = self.forward(inputs, batch.position)
            self.engine.backward(loss * scale)
            added = self.engine.module.added
            sums_2[0] += loss.detach()
            if added is not None:  # told apart: the first sum is the language's alone
                sums_2[0] -= added
                sums_2[1] += added
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()  # counts the micro-batch
        return sums_2

    def update(self, batch: Batch, loss_sum: torch.Tensor) -> tuple[bool, Any]:
        """The optimizer step: (whether it was made, the gradient's norm, []). Not made where the gradient was not
        finite or the guard refused. `loss_sum`: of this rank, nats, fp64 []."""
        step, norm = self.clock.step + 1, grad_norm_before_step(self.engine)
        self.callbacks.on_before_optimizer_step(step)
        self.checkpointer.before_update()
        if self.guard.refuses(self.clock, loss_sum, batch.targets, norm):
            refuse_update(self.engine)
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.callbacks.on_after_optimizer_step(step)
        return applied, norm if norm is not None else self.engine.get_global_grad_norm()

    def read_report(self) -> None:
        """What the step before measured, if that is not read yet; what was asked for; which saves have ended."""
        report = self.delayed.pop()
        if report is None:
            return
        if report.line is not None:
            self.callbacks.on_step_end(report.line)
        self.asked |= report.asked
        self.tell_saved(everywhere=report.saves == self.ranks.world * self.checkpointer.begun)

    def due(self, applied: bool) -> Due:
        """What is to be saved now; after a batch that made no step only what stopping asks for."""
        step, config, asked = self.clock.step, self.config, self.asked
        if not applied:
            return Due(checkpoint=asked.stop and step > 0)
        last = step == config.steps or asked.end
        return Due(
            snapshot=step % config.snapshot.every == 0 or step in config.snapshot.at or last or asked.save,
            checkpoint=step % config.checkpoint.every == 0 or last or asked.stop or asked.save,
            asked=asked.save,
        )

    def save(self, due: Due) -> None:
        """Copies what is due; it is written while training goes on."""
        # A disk may be slow for as long as it likes; a rank that is frozen or dead is seen all the same.
        waits = due.snapshot and self.callbacks.waits_for_snapshots
        with memory_errors(self.config, self.ranks, f"saving or scoring step {self.clock.step}"):
            with self.watchdog.paused("saving"):
                self.checkpointer.save(self.clock, due)
                if waits:
                    self.checkpointer.wait()
            if waits:
                with self.watchdog.paused("scoring"):
                    self.tell_saved(everywhere=True)

    def tell_saved(self, *, everywhere: bool) -> None:
        """Tells callbacks of saves that have ended. `everywhere`: the last one that was begun has too, on all ranks."""
        for saved in self.checkpointer.take_ended(everywhere=everywhere):
            if saved.snapshot is not None:
                self.callbacks.on_snapshot(saved.step, saved.snapshot)
            if saved.checkpoint is not None:
                self.callbacks.on_checkpoint(saved.step, saved.checkpoint)

    def line(self, batch: Batch, rate: float, seconds: float) -> dict[str, Any]:
        """What the host knows of a step that was made, for its line in `metrics.jsonl`."""
        tokens = batch.windows.size * self.config.sequence_length
        return {
            "step": self.clock.step,
            "position": batch.position,
            "windows": f"{zlib.crc32(batch.windows.tobytes()):08x}",  # two runs saw the same ones where these are equal
            "tokens": self.clock.tokens,
            "targets": batch.targets,
            "lr": rate,
            "step_s": round(seconds, 6),
            "tokens_per_s": round(batch.targets / seconds, 1),
            **({"mfu": round(self.utilisation.of(tokens / seconds), 4)} if self.utilisation is not None else {}),
            "memory_gib": round(memory_gib(), 4),
            "ranks": self.ranks.world,
            "micro": self.micro,
            **self.guard.measured,  # the very loss that was decided on, where it is known by now
        }


def micro_batches(
    objective: Objective, data: AnyWindows, batch: Batch, config: Config, ranks: Ranks
) -> Iterator[tuple[dict[str, torch.Tensor], list[int]]]:
    """This rank's part of a global batch: (what the model takes, tensors [micro, …] on the device; a seed a
    window)."""
    micro = micro_batch(config, ranks.world)
    for chosen in share_of(batch.windows, rank=ranks.rank, world=ranks.world, micro=micro):
        inputs = objective.inputs(data, chosen, batch.position)
        if ranks.device.type == "cuda":
            inputs = {name: t.pin_memory().to(ranks.device, non_blocking=True) for name, t in inputs.items()}
        yield inputs, window_seeds(config.seed, batch.position, chosen)
