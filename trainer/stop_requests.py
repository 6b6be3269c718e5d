"""Being asked to stop, by a signal to any rank or the file `STOP` in the run directory; to save, by the file `SAVE`."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from types import FrameType
from typing import Any

from configs.errors import EXIT_INTERRUPTED, EXIT_STOPPED, DataError
from configs.files.atomic import read_json
from configs.files.opening import read_bytes
from configs.run.directory import RunDir

POLL_S = 0.5
INTERRUPT = "interrupt"  # content of a STOP file that stands for Ctrl-C
# Slurm signals every process of a step, and torchrun hands its own copy on to its ranks: one wish, heard twice.
ONE_WISH_S = 5.0


@dataclass(frozen=True)
class Asked:
    """What a training is asked for."""

    stop: bool = False
    interrupt: bool = False  # the stop is a Ctrl-C
    save: bool = False
    end: bool = False  # as if this step were the last

    def __or__(self, other: Asked) -> Asked:
        return Asked(*(mine or theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Heard:
    """The signals that have reached this process."""

    first: float | None = None  # when, on the monotonic clock
    interrupt: bool = False
    kinds: dict[int, float] = field(default_factory=dict)  # when each kind came first

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Takes the first signal for a wish to stop with a checkpoint, its like later for a wish to end now.

        Another kind is no such wish: Slurm sends SIGUSR1 a minute before the time limit where asked to, and SIGTERM at
        it, when the checkpoint may be half written.
        """
        now = time.monotonic()
        like = self.kinds.setdefault(number, now)
        if now - like > ONE_WISH_S:
            # Nothing is tidied up or written: whoever held what that needs may be the code that was interrupted.
            told = f"{signal.Signals(number).name} again, {now - like:.0f} s after the first: ending at once\n"
            os.write(2, told.encode())
            os._exit(128 + number)
        self.first = now if self.first is None else self.first
        self.interrupt |= number == signal.SIGINT


_heard = Heard()


def listen() -> None:
    """Takes signals for requests from here on. To be called early: a signal while torch is imported is one too."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, _heard.on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
        signal.signal(signal.SIGHUP, _heard.on_signal)


class Requests:
    """What this rank was asked for. The ranks agree on it in the step's one all-reduce."""

    def __init__(self, run: RunDir, *, watch_files: bool) -> None:
        self.stop_file, self.save_file, self.end_file = run.stop_request, run.save_request, run.end_request
        self.watch_files = watch_files
        self.stop = self.interrupt = self.save = False
        self.ended_by: dict[str, Any] = {}  # the setting that ends the run, its value, and why, for people
        self.in_background = False  # set and cleared by different threads
        self.given_up = False  # nothing can be saved any more; set by the thread that writes
        self.polled = 0.0
        listen()

    def poll(self) -> Asked:
        """What was asked for up to now; looks for the files now and then."""
        self.stop |= _heard.first is not None or self.given_up
        self.interrupt |= _heard.interrupt
        if self.watch_files and not self.stop and time.monotonic() - self.polled > POLL_S:
            self.polled = time.monotonic()
            if not self.in_background:
                self.save |= self.save_file.exists()
            if not self.ended_by and self.end_file.exists():
                with suppress(DataError):  # half written is not yet asked
                    self.ended_by = dict(read_json(self.end_file))
            try:
                self.interrupt |= read_bytes(self.stop_file).strip() == INTERRUPT.encode()
                self.stop = True
            except OSError:
                pass  # not asked
        return Asked(self.stop, self.interrupt, self.save, bool(self.ended_by))

    def saving(self) -> None:
        """What was asked for is being written in the background: the file `SAVE` is not looked at until `saved`."""
        self.in_background = True
        self.save = False

    def saved(self) -> None:
        """What was asked for is on the disk: whoever asked sees that the file is gone. From any thread."""
        self.save = False
        if self.watch_files:
            self.save_file.unlink(missing_ok=True)
        self.in_background = False  # last, so that the file just done is not seen again


def exit_code(interrupted: bool) -> int:
    """The exit code of a training that stopped on request, with its checkpoint written."""
    return EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
