"""Being asked to stop: by a signal to any rank, or by the file `STOP` in the run directory."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from configs.errors import EXIT_INTERRUPTED, EXIT_STOPPED

POLL_S = 0.5
INTERRUPT = "interrupt"  # content of a STOP file that stands for Ctrl-C


class StopRequest:
    """Whether this rank was asked to stop. The ranks agree on it in the step's one all-reduce."""

    def __init__(self, file: Path, *, watch_file: bool) -> None:
        self.file, self.watch_file = file, watch_file
        self.stop = self.interrupt = False
        self.polled = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupt = True
        self.stop = True

    def poll(self) -> tuple[bool, bool]:
        """(asked to stop, by Ctrl-C); looks for the file now and then."""
        if self.watch_file and not self.stop and time.monotonic() - self.polled > POLL_S:
            self.polled = time.monotonic()
            try:
                self.interrupt |= self.file.read_text(encoding="utf-8").strip() == INTERRUPT
                self.stop = True
            except OSError:
                pass  # not asked
        return self.stop, self.interrupt


def exit_code(interrupted: bool) -> int:
    """The exit code of a training that stopped on request, with its checkpoint written."""
    return EXIT_INTERRUPTED if interrupted else EXIT_STOPPED
