"""Being asked to stop, by a signal to any rank or the file `STOP` in the run directory; to save, by the file `SAVE`."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from configs.errors import EXIT_INTERRUPTED, EXIT_STOPPED

POLL_S = 0.5
INTERRUPT = "interrupt"  # content of a STOP file that stands for Ctrl-C


@dataclass(frozen=True)
class Asked:
    """What a training is asked for."""

    stop: bool = False
    interrupt: bool = False  # the stop is a Ctrl-C
    save: bool = False

    def __or__(self, other: Asked) -> Asked:
        return Asked(self.stop or other.stop, self.interrupt or other.interrupt, self.save or other.save)


class Requests:
    """What this rank was asked for. The ranks agree on it in the step's one all-reduce."""

    def __init__(self, stop_file: Path, save_file: Path, *, watch_files: bool) -> None:
        self.stop_file, self.save_file, self.watch_files = stop_file, save_file, watch_files
        self.stop = self.interrupt = self.save = False
        self.polled = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
        self.stop = True

    def poll(self) -> Asked:
        """What was asked for up to now; looks for the files now and then."""
        if self.watch_files and not self.stop and time.monotonic() - self.polled > POLL_S:
            self.polled = time.monotonic()
            self.save |= self.save_file.exists()
            try:
                self.interrupt |= self.stop_file.read_text(encoding="utf-8").strip() == INTERRUPT
                self.stop = True
            except OSError:
                pass  # not asked
        return Asked(self.stop, self.interrupt, self.save)

    def saved(self) -> None:
        """What was asked for is on the disk: whoever asked sees that the file is gone."""
        self.save = False
        if self.watch_files:
            self.save_file.unlink(missing_ok=True)


def exit_code(interrupted: bool) -> int:
    """The exit code of a training that stopped on request, with its checkpoint written."""
    return EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
