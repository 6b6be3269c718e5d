"""Saving while training goes on: state is copied to host memory, and a thread of each rank writes the copy to the disk.

At most one save is in flight. The ranks' threads agree among themselves, over a process group of their own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import VernierError
from eval.distributed.ranks import Ranks
from trainer.checkpoint.collective_write import SaveFailed

RETRY_S = 1.0
MOST_FAILED = 2  # saves in a row; after them training stops
ALIGNMENT = 64  # bytes


class HostCopy:
    """Host memory that is filled with tensors, save after save; pinned where there is a GPU.

    Tensors that no forward or backward pass changes are copied `later`: by the thread that writes, while the next step
    goes on, which waits before its update (`wait_until_taken`). What `take` gave is overwritten after the next
    `refill`, which must come after the last copy is written.
    """

    def __init__(self) -> None:
        self._block: torch.Tensor | None = None
        self._used = 0
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._taken = threading.Event()
        self._taken.set()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._pinned = False
        self._begun: Any = None
        self._done: Any = None

    def refill(self, tensors: int, size: int) -> None:
        """Starts anew, with room for so many tensors of so many bytes together."""
        size += tensors * ALIGNMENT
        if self._block is None or len(self._block) < size:
            self._let_go()  # before the new one is made
            self._block = torch.empty(max(size, 1), dtype=torch.uint8)
            self._pin(self._block)
        self._used = 0

    def take(self, tensor: torch.Tensor, dtype: torch.dtype, *, later: bool = False) -> torch.Tensor:
        """Where a copy of it will be: of its shape [...], in host memory and contiguous."""
        source = tensor.detach()
        place = self._room(tensor.numel() * dtype.itemsize).view(dtype)[: tensor.numel()].view(tensor.shape)
        if later:
            self._taken.clear()
            self._later.append((place, source))
        else:  # converted first: only a plain copy goes to the host without a wait
            place.copy_(source.to(dtype), non_blocking=True)
        return place

    def seal(self) -> None:
        """All has been named that is to be copied."""
        if self._stream is not None:
            self._begun = torch.cuda.Event()
            self._begun.record()

    def fill(self) -> None:
        """Copies what was left for later, and waits until all is there; for the thread that writes it."""
        try:
            if self._stream is None:
                for place, source in self._later:
                    place.copy_(source)
                return
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._begun)
                for place, source in self._later:
                    place.copy_(source.to(place.dtype), non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record()
                done = self._done
        finally:
            self.release()
        done.synchronize()

    def release(self) -> None:
        """Gives up what is still to be copied: the next update need not wait for it."""
        self._later.clear()
        self._taken.set()

    def wait_until_taken(self) -> None:
        """To be called before an update: it must not change what is still to be copied."""
        if self._taken.is_set() and self._done is None:
            return
        self._taken.wait()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)  # the device waits, not the host
            self._done = None

    def _room(self, size: int) -> torch.Tensor:
        assert self._block is not None
        start, self._used = self._used, self._used + math.ceil(size / ALIGNMENT) * ALIGNMENT
        return self._block[start : start + size]

    def _pin(self, block: torch.Tensor) -> None:
        """Page-locks a block, so that a GPU copies to it without the host. Without that it is only slower.

        Not by torch's own allocator, which rounds up to a power of two and keeps what is let go.
        """
        if self._stream is not None:
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), len(block), 0)) == 0
            if not self._pinned:
                with suppress(RuntimeError):  # CUDA tells of it again at the next call, whoever makes that
                    torch.zeros(1, device=self._stream.device)

    def _let_go(self) -> None:
        if self._block is not None and self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._pinned = None, False


Job = Callable[[Ranks], None]


class NotCurrent(VernierError):
    """Another attempt holds the run: this one may not write."""


class Saver:
    """Runs one save at a time, on every rank alike: in a thread, or at once where `background` is off.

    A save that fails is tried once more. One that fails again is told, and training goes on; after the second such in a
    row `given_up` is called, on every rank.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        background: bool,
        check_current: Callable[[], None],
        tell: Callable[[str, bool, bool], None],
        given_up: Callable[[], None],
    ) -> None:
        """Makes a process group: a collective.

        Args:
            check_current: raises VernierError where this attempt has lost the run; called on the first rank.
            tell: (what went wrong, whether it was the last try, whether training ends if so), on the first rank.
            given_up: nothing can be saved any more; on every rank.
        """
        # New collectives beside those of the steps need a group of their own.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.ranks = replace(ranks, control=group)
        self.background, self.check_current, self.tell, self.given_up = background, check_current, tell, given_up
        self.failed = 0  # in a row
        self.why = ""  # the last one did
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def wait(self) -> None:
        """Waits for the save in flight.

        Raises:
            BaseException: what ended the writer, such as a `NotCurrent`. A save that failed twice does not.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raises what has ended the writer, if anything."""
        if self.error is not None:
            raise self.error

    def submit(self, jobs: Sequence[Job], copies: Sequence[HostCopy], then: Callable[[bool], None]) -> None:
        """Starts the next save, after `wait`: fills the copies, does each of `jobs`, then `then` (whether all is good).

        A job that fails does not keep the others from being done.
        """
        if not self.background:
            self._run(jobs, copies, then)
            self.wait()
            return
        self.thread = threading.Thread(target=self._run, args=(jobs, copies, then), daemon=True, name="writer")
        self.thread.start()

    def _run(self, jobs: Sequence[Job], copies: Sequence[HostCopy], then: Callable[[bool], None]) -> None:
        try:
            if self.ranks.device.type == "cuda":
                torch.cuda.set_device(self.ranks.device)  # a new thread has the first one
            for copied in copies:  # all of them first: the next update waits for nothing else
                copied.fill()
            good = [self._tried(job) for job in jobs]
            self.failed = 0 if all(good) else self.failed + 1
            if self.failed >= MOST_FAILED:
                self.given_up()
            then(all(good))
        except BaseException as error:  # of a dead peer, say: for the main thread to raise
            self.error = error
        finally:
            for copied in copies:
                copied.release()

    def _tried(self, job: Job) -> bool:
        for last in (False, True):
            self._check_current()
            try:
                job(self.ranks)
            except SaveFailed as error:
                self.why = str(error)
                if self.ranks.is_rank_zero:
                    self.tell(str(error), last, self.failed + 1 >= MOST_FAILED)
                if not last:
                    time.sleep(RETRY_S)
            else:
                return True
        return False

    def _check_current(self) -> None:
        lost = ""
        if self.ranks.is_rank_zero:
            try:
                self.check_current()
            except VernierError as error:
                lost = str(error)
        _, words = self.ranks.first_message(lost)
        if words:
            raise NotCurrent(words)
