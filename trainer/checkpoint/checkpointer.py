"""What a run saves at a step, and what follows once that is on the disk; how it gets there is in `async_save`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import VernierError
from configs.fault_injection import reached
from configs.run.directory import RunDir, step_name
from configs.schema import Config
from eval.distributed.ranks import Ranks
from trainer.checkpoint.async_save import HostCopy, Job, Saver
from trainer.checkpoint.checkpoint import Clock, copy_checkpoint, write_checkpoint
from trainer.checkpoint.retention import thin_checkpoints, thin_snapshots
from trainer.checkpoint.snapshot import copy_snapshot, write_snapshot
from trainer.engine.ema import EmaWeights
from trainer.stop_requests import Requests


@dataclass(frozen=True)
class Due:
    """What is to be saved at a step."""

    snapshot: bool = False
    checkpoint: bool = False
    asked: bool = False  # somebody waits for it

    def __bool__(self) -> bool:
        return self.snapshot or self.checkpoint


@dataclass(frozen=True)
class Saved:
    """What a save has put on the disk: folders, None where there is none of its kind."""

    step: int
    snapshot: Path | None
    checkpoint: Path | None


class Checkpointer:
    """Saves a run's snapshots and checkpoints. Every rank has one, and calls it at the same steps."""

    def __init__(
        self,
        engine: Any,
        config: Config,
        hf: Any,
        ranks: Ranks,
        *,
        requests: Requests,
        average: EmaWeights | None,
        flush: Callable[[], None],
        sync: Callable[[], None],
        passed_over: Collection[int],
        check_current: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            flush: hands the lines of steps to the system; called before a save is begun.
            sync: puts them on the disk, on the first rank, before a checkpoint is whole.
            passed_over: data positions that checkpoints remember.
            check_current: raises VernierError where this attempt has lost the run.
            tell: says a line to people.
        """
        self.engine, self.config, self.hf, self.ranks = engine, config, hf, ranks
        self.requests, self.average = requests, average
        self.flush, self.sync = flush, sync
        self.passed_over, self.tell = sorted(passed_over), tell
        self.run = RunDir(config.run_dir)
        self.state, self.weights, self.averaged = HostCopy(), HostCopy(), HostCopy()
        self._begun: list[tuple[int, Due]] = []
        self._good: list[bool] = []  # of those that have ended
        self._taken = 0
        self.saver = Saver(
            ranks,
            background=config.checkpoint.background,
            check_current=check_current,
            tell=self._tell_failed,
            given_up=self._give_up,
        )

    def save(self, at: Clock, due: Due) -> None:
        """Waits for the save before, copies what is due, and has it written while training goes on."""
        if due.asked:
            self.requests.saving()
        self.saver.wait()
        jobs: list[Job] = []
        copies: list[HostCopy] = []
        # A snapshot before its step's checkpoint: whoever goes on from that does not make it again.
        if due.snapshot:
            jobs.append(self._snapshot(at, self.weights, None))
            copies.append(self.weights)
            if self.average is not None:
                jobs.append(self._snapshot(at, self.averaged, self.average))
                copies.append(self.averaged)
        if due.checkpoint:
            jobs.append(self._checkpoint(at))
            copies.append(self.state)
        self.flush()
        self._begun.append((at.step, due))
        self.saver.submit(jobs, copies, lambda good: self._saved(at, due, good))

    @property
    def begun(self) -> int:
        """How many saves were begun."""
        return len(self._begun)

    @property
    def ended(self) -> int:
        """How many of them have ended on this rank, well or not: all that were begun, or all but the last."""
        return len(self._good)

    def take_ended(self, *, everywhere: bool) -> list[Saved]:
        """What has come to the disk and was not taken yet. `everywhere`: the last save has ended on every rank."""
        upto = self.begun if everywhere else self.begun - 1
        taken = [
            Saved(
                step,
                self.run.snapshots / step_name(step) if due.snapshot else None,
                self.run.checkpoints / step_name(step) if due.checkpoint else None,
            )
            for (step, due), good in zip(self._begun[self._taken : upto], self._good[self._taken : upto], strict=True)
            if good
        ]
        self._taken = max(self._taken, upto)
        return taken

    def wait(self) -> None:
        """Waits for the save in flight."""
        self.saver.wait()

    def finish(self, step: int) -> None:
        """Waits for the last save.

        Raises:
            VernierError: it could not be written.
        """
        self.saver.wait()
        if self.saver.failed:
            told = f"what was to be saved at step {step} could not be written: {self.saver.why}; {self._last_whole()}"
            raise VernierError(f"{told}; once that is mended, the same command goes on from it")

    def before_update(self) -> None:
        """Waits until what the next update changes is copied."""
        for copied in (self.state, self.weights, self.averaged):
            copied.wait_until_taken()
        self.saver.check()

    def _snapshot(self, at: Clock, memory: HostCopy, average: EmaWeights | None) -> Job:
        copied = copy_snapshot(self.engine, self.config, self.ranks, at, memory, average)
        return lambda group: write_snapshot(copied, self.engine.module.lm, self.hf, self.config, group)

    def _checkpoint(self, at: Clock) -> Job:
        copied = copy_checkpoint(self.engine, self.ranks, at, self.state, self.average, self.passed_over)
        return lambda group: write_checkpoint(copied, self.run, group, self.sync)

    def _saved(self, at: Clock, due: Due, good: bool) -> None:
        """What follows from a save that is on the disk; in the thread that wrote it."""
        if self.ranks.is_rank_zero and good:
            if due.checkpoint:
                self.run.add_event("checkpoint", step_name(at.step), step=at.step, rank=0)
            self._thin(due)
            reached("thinned")
            if due.asked:
                told = f"saved on request: snapshot and checkpoint of step {at.step}"
                self.run.add_event("saved on request", told, step=at.step, rank=0)
        if self.ranks.is_rank_zero and due.snapshot and not good and self.config.eval.placement == "inline":
            told = f"step {at.step}: its snapshot could not be written"
            self.run.add_event("not scored", told, step=at.step, rank=0)
        if due.asked:
            self.requests.saved()  # or not, which was told; whoever asked may ask again
        self._good.append(good)

    def _thin(self, due: Due) -> None:
        try:
            if due.snapshot:
                thin_snapshots(self.run, self.config)
            if due.checkpoint:
                twins = self.config.twins
                split_by = self.config.steps - twins.steps if twins.count else None
                thin_checkpoints(self.run, self.config.checkpoint, split_by)
        except OSError as error:  # NFS keeps what an evaluator has open; the next time it goes
            self.run.add_event("not thinned", f"an old one could not be removed: {error}", rank=0)

    def _tell_failed(self, why: str, last: bool, ends: bool) -> None:
        then = "it is tried again"
        if last:
            then = f"{self._last_whole()}; " + ("training stops" if ends else "training goes on")
        told = f"a save failed: {why}; {then}"
        self.run.add_event("save failed", told, rank=0)
        self.tell(told)

    def _give_up(self) -> None:
        self.requests.given_up = True  # the ranks agree on it in the next step's all-reduce

    def _last_whole(self) -> str:
        """Names the last good checkpoint, for whoever must go on from it."""
        steps = self.run.whole_steps(self.run.checkpoints)
        return f"the last whole checkpoint is of step {steps[-1]}" if steps else "there is no whole checkpoint yet"
