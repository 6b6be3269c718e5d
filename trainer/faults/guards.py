"""What watches the numbers of training: gradients that are not finite, and losses that leap.

It decides on every rank alike, and waits for the device only where its settings ask for that. What ranks must change
before they go on is in `trainer.faults.adaptations`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.errors import DataError, VernierError
from configs.files.atomic import read_json
from configs.run.directory import RunDir, step_name
from configs.schema import Config
from eval.distributed.ranks import Ranks
from trainer.callbacks.metrics import lines_up_to
from trainer.checkpoint.checkpoint import STATE, Clock
from trainer.data.examples import AnyWindows
from trainer.faults.adaptations import RestartRequested, read_adaptations, write_adaptations
from trainer.order import windows_at

LEAST_LOSSES = 16  # before a spike can be told from the rest
FLOOR = 1e-3  # of the median: the least spread that losses are taken to have
MOST_RETURNS = 3  # to one checkpoint
MOST_SKIPPED = 100  # updates in a row; fp16 finds its loss scale in far fewer
MOST_NAMED = 50  # documents in an event


@dataclass(frozen=True)
class Spike:
    """How far a loss lies above those before it."""

    z: float  # in robust standard deviations
    median: float


class Spikes:
    """The losses of the latest updates, and whether one more leaps above them."""

    def __init__(self, threshold: float, steps: int, losses: Iterable[float] = ()) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque((loss for loss in losses if math.isfinite(loss)), maxlen=steps)

    def add(self, loss: float) -> None:
        if math.isfinite(loss):
            self.losses.append(loss)

    def look(self, loss: float) -> Spike | None:
        """The spike that a loss (nats per token) is; None where it is none, or too few losses are known.

        By the modified z-score, (loss − median) ÷ (1.4826 · MAD), of Iglewicz and Hoaglin, "How to Detect and Handle
        Outliers" (ASQC 1993, §3); the median absolute deviation after Hampel (JASA 69, 1974). Only upwards: losses
        fall in training. The spread is taken as a thousandth of the median at least, so that a constant series has one.
        """
        if len(self.losses) < LEAST_LOSSES or not math.isfinite(loss):
            return None
        before = np.array(self.losses)
        median = float(np.median(before))
        spread = max(1.4826 * float(np.median(np.abs(before - median))), FLOOR * abs(median), 1e-12)
        z = (loss - median) / spread
        return Spike(z, median) if z > self.threshold else None


class Guard:
    """Decides about each update, tells what it saw, and ends training where it must go back.

    At stage 0 in fp32 and amp it reads the gradient's norm before each update, which DeepSpeed does not look at there;
    with `guards.on_spike: skip` it reads each global batch's loss. Else the host waits for nothing that DeepSpeed does
    not wait for.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        ranks: Ranks,
        data: AnyWindows,
        *,
        losses: Sequence[float],
        passed_over: Iterable[int],
        finish_saving: Callable[[], None],
    ) -> None:
        """
        Args:
            losses: as `recent_losses` gives them.
            passed_over: data positions that are not to be trained on.
            finish_saving: waits for a checkpoint that is being written; called on every rank.
        """
        self.config, self.run, self.ranks, self.data = config, run, ranks, data
        self.settings, self.finish_saving = config.guards, finish_saving
        self.passed_over = frozenset(passed_over)
        self.skips_spikes = self.settings.spike_z is not None and self.settings.on_spike == "skip"
        self.patience = self.settings.spike_steps // 4  # batches in a row; then it is a new level, not a spike
        self.measured: dict[str, float] = {}  # what of the step's line is known already
        self.spike: Spike | None = None  # that made the update be refused
        self.not_finite: list[int] = []  # positions, in a row
        threshold, steps = self.settings.spike_z or math.inf, self.settings.spike_steps
        self.spikes = Spikes(threshold, steps, losses[:-1])
        self.told_of_targets = False
        self.row = 0  # latest updates that were spikes all the same
        if losses:
            self._made(losses[-1])

    def passes_over(self, position: int) -> bool:
        """Whether the batch at a position is used up without a step and without counting its tokens."""
        return position in self.passed_over

    def without_targets(self, clock: Clock) -> None:
        """Takes note of a batch that is used up without a step, since none of its windows has a target: told once."""
        if self.ranks.is_rank_zero and not self.told_of_targets:
            counts = self.data.target_counts(np.arange(len(self.data)))
            self.run.add_event(
                "skipped",
                f"batch {clock.position} is used up without an update: it has no token to train on, like "
                f"{int((counts == 0).sum()):,} of {len(counts):,} windows; more such batches are not told",
                step=clock.step,
                rank=0,
            )
        self.told_of_targets = True

    def refuses(self, clock: Clock, loss_sum: torch.Tensor, targets: int, norm: torch.Tensor | None) -> bool:
        """Whether the update that is due must not be made; the same on every rank.

        Args:
            clock: before the batch.
            loss_sum: of this rank, nats, fp64 [] on the device.
            norm: of the gradient, where DeepSpeed does not look at it by itself.
        """
        self.spike, self.measured = None, {}
        if norm is not None and not math.isfinite(float(norm)):
            return True
        if not self.skips_spikes:
            return False
        self.measured = {"loss": self._of_all_ranks(loss_sum) / targets}
        if self.row == 0 and clock.idle < self.patience:
            self.spike = self.spikes.look(self.measured["loss"])
        return self.spike is not None

    def after(self, applied: bool, clock: Clock, loss_sum: torch.Tensor) -> None:
        """Takes note of a batch that has been used up. `clock`: after it. `loss_sum`: of this rank, nats, [].

        Raises:
            RestartRequested: no finite gradient for `guards.non_finite` batches in a row; training goes back.
            VernierError: and it has gone back often enough; or no update was made for very long.
        """
        position = clock.position - 1
        if applied:
            self.not_finite = []
            if self.skips_spikes:
                self._made(self.measured["loss"], clock.step, position)
            return
        if self.spike is not None:
            self.not_finite = []
            self._tell_spike(self.spike, self.measured["loss"], clock.step + 1, position, "no update was made with it")
            return
        if self.ranks.is_rank_zero:
            told = f"batch {position} is used up without an update: its gradient was not finite"
            self.run.add_event("skipped", told, step=clock.step, rank=0)
        # In fp16 too large a gradient is how the loss scale is found; a loss that is not finite is no such thing.
        if self.config.precision != "fp16" or not math.isfinite(self._of_all_ranks(loss_sum)):
            self.not_finite.append(position)
        if len(self.not_finite) >= self.settings.non_finite:
            self._go_back(clock.step + 1)
        if clock.idle >= MOST_SKIPPED:
            raise VernierError(
                f"step {clock.step + 1}: no update could be made with {clock.idle} batches in a row, the last of them "
                "because its gradient was not finite; lower optimizer.lr"
            )

    def on_step_end(self, line: Mapping[str, Any]) -> None:
        """A step's metrics, a step late: looks for a spike there, unless each loss is looked at before its update."""
        if self.ranks.is_rank_zero and not self.skips_spikes:
            self._made(line["loss"], line["step"], line["position"])

    def _made(self, loss: float, step: int | None = None, position: int = 0) -> None:
        """An update was made on this loss."""
        found = self.spikes.look(loss)
        self.row = 0 if found is None else self.row + 1
        if found is not None and step is not None and self.row <= self.patience:
            self._tell_spike(found, loss, step, position, "its update was made")
        self.spikes.add(loss)

    def _tell_spike(self, spike: Spike, loss: float, step: int, position: int, outcome: str) -> None:
        if not self.ranks.is_rank_zero:
            return
        named, detail = self._documents([position])
        self.run.add_event(
            "spike",
            f"step {step}: the loss {loss:.4g} is {spike.z:.1f} robust standard deviations above the median "
            f"{spike.median:.4g} of the last {len(self.spikes.losses)} updates (batch {position}, {named}); {outcome}",
            step=step,
            rank=0,
            loss=loss,
            median=spike.median,
            z=spike.z,
            position=position,
            **detail,
        )

    def _go_back(self, step: int) -> None:
        self.finish_saving()
        whole = self.run.whole_steps(self.run.checkpoints) if self.ranks.is_rank_zero else []
        newest = self.ranks.broadcast_int(whole[-1] if whole else 0)
        bad = self.not_finite
        told = f"at step {step} {_batches(bad)} gave no finite gradient"
        often, passed = False, bad
        if self.ranks.is_rank_zero:
            before = read_adaptations(self.run)
            returns = before.returns + 1 if newest <= before.from_step else 1
            often = returns > MOST_RETURNS
            known = {*before.passed_over, *self.passed_over}
            # The same steps lead to the same place; so from the second time on, those that led here go as well.
            passed = [*self._last_before(bad[0], (returns - 1) * len(bad), newest, known), *bad]
            if not often:
                after = tuple(sorted({*known, *passed}))
                write_adaptations(self.run, replace(before, passed_over=after, returns=returns, from_step=newest))
        back = f"the checkpoint of step {newest}" if newest else "the start"
        if not self.ranks.all_true(not often):
            raise VernierError(
                f"{told}, after training had gone back to {back} {MOST_RETURNS} times; "
                "lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data (events.jsonl names it)"
            )
        told += f"; going back to {back}"
        if self.ranks.is_rank_zero:
            told += f" and passing over {_batches(passed)}"
            named, detail = self._documents(passed)
            self.run.add_event("went back", f"{told}; {named}", step=step - 1, rank=0, positions=passed, **detail)
        self.ranks.barrier()  # nobody ends before all of it is told
        raise RestartRequested(told)

    def _last_before(self, position: int, count: int, checkpoint: int, passed: set[int]) -> list[int]:
        """Up to `count` positions before one, ascending, that were trained on since a checkpoint (0: the start)."""
        start = 0
        if checkpoint:
            state = self.run.checkpoints / step_name(checkpoint) / STATE
            try:
                start = int(read_json(state)["clock"]["position"])
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{state}: damaged: it has no clock; the next start takes an older one") from None
        trained = (p for p in range(position - 1, start - 1, -1) if p not in passed)
        return sorted(islice(trained, count))

    def _documents(self, positions: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """The training documents in some batches: (in words, for an event's detail). They have numbers, no names."""
        size, count = self.config.batch.global_, len(self.data)
        each = [windows_at(p, batch=size, windows=count, seed=self.config.seed) for p in positions]
        found = self.data.documents(np.unique(np.concatenate(each))).tolist()
        few = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        kind = "document" if len(found) == 1 else "documents"
        return f"{kind} {few} of the training shards", {"documents": found[:MOST_NAMED], "documents_in_all": len(found)}

    def _of_all_ranks(self, loss_sum: torch.Tensor) -> float:
        """The sum over ranks; waits for the device."""
        summed = loss_sum.detach().clone().reshape(1)
        dist.all_reduce(summed)
        return float(summed.item())


def recent_losses(run: RunDir, ranks: Ranks, step: int, steps: int) -> list[float]:
    """The losses of the last `steps` + 1 updates up to `step`, on every rank alike (a collective)."""
    box = torch.zeros(steps + 2, dtype=torch.float64)
    if ranks.is_rank_zero and step:
        found = [line["loss"] for line in lines_up_to(run, step)][-steps - 1 :]
        box[: len(found) + 1] = torch.tensor([len(found), *found], dtype=torch.float64)
    count, *losses = ranks.broadcast(box).tolist()
    return list(losses[: int(count)])


def _batches(positions: Sequence[int]) -> str:
    """Positions in words: "the batches at positions 3–5 and 7"."""
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1] + 1:
            ranges[-1][1] = position
        else:
            ranges.append([position, position])
    said = [str(first) if first == last else f"{first}–{last}" for first, last in ranges]
    listed = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    return f"the batch at position {listed}" if len(positions) == 1 else f"the batches at positions {listed}"
