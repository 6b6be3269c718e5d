"""What the user of `vernier train` asks for by signals: a first one to stop, a later one at once."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from trainer.stop_requests import ONE_WISH_S

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def _is_a_wish(number: int, handler: Any) -> bool:
    return not (number == signal.SIGHUP and handler == signal.SIG_IGN)  # nohup means it


@dataclass
class Interrupts:
    """How often the user asked to stop, and whether by Ctrl-C."""

    count: int = 0
    by_ctrl_c: bool = False
    first: dict[int, float] = field(default_factory=dict)  # when each kind came first

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Takes signals for wishes meanwhile, in the main thread; after it handlers are as before."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # in no other could they be set
            before = {number: signal.getsignal(number) for number in SIGNALS}
            before = {number: handler for number, handler in before.items() if _is_a_wish(number, handler)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.first.setdefault(number, now)
        # Else one wish, heard twice: by `timeout`, systemd or Slurm, each of which may signal more than once.
        if not self.count or number == signal.SIGINT or now - first > ONE_WISH_S:
            self.count += 1
        self.by_ctrl_c |= number == signal.SIGINT


@dataclass
class Deadline:
    """When ranks are killed, and why; it only comes nearer."""

    at: float = math.inf
    why: str = ""

    def no_later_than(self, at: float, why: str) -> None:
        if at < self.at:
            self.at, self.why = at, why
