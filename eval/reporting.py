"""TensorBoard for whoever trains or scores: it only reports, so what goes wrong with it is said once, and no more."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

AGAIN_S = 60.0  # a disk that was full may have room by then


class Reporter:
    """A `SummaryWriter` that may fail, and is opened anew a while later."""

    def __init__(self, folder: Path, tell: Callable[[str], None], *, purge_step: int | None = None) -> None:
        """`tell`: told once what went wrong. `purge_step`: what was written from this step on is not to be shown."""
        self.folder, self.tell, self.purge_step = folder, tell, purge_step
        self.writer: Any = None
        self.told, self.next_try = False, 0.0

    def write(self, what: Callable[[Any], object]) -> None:
        """Has `what` done with the writer, if there is one."""
        if self.writer is None and time.monotonic() < self.next_try:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(log_dir=str(self.folder), purge_step=self.purge_step)
                self.purge_step = None
            what(self.writer)
        except Exception as error:  # of the disk, or of TensorBoard itself, whose thread hands on what it met
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        left, self.writer = self.writer, None
        self.next_try = time.monotonic() + AGAIN_S
        with suppress(Exception):
            left.close()
        if not self.told:
            self.told = True
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.tell(f"{self.folder}: cannot be written ({why}); the board lacks what comes now, all else goes on")

    def flush(self) -> None:
        """Hands what was written to the system."""
        if self.writer is not None:
            self.write(lambda writer: writer.flush())

    def close(self) -> None:
        """Writes what is left."""
        if self.writer is not None:
            self.write(lambda writer: writer.close())
