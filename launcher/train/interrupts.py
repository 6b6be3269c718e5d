"""What the user of `vernier train` asks for by signals: a first one to stop, a later one at once."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import dataclass, field
from types import FrameType

from trainer.stop_requests import ONE_WISH_S


@dataclass
class Interrupts:
    """How often the user asked to stop, and whether by Ctrl-C."""

    count: int = 0
    by_ctrl_c: bool = False
    heard: dict[int, float] = field(default_factory=dict)  # when each kind came first

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.heard.setdefault(number, now)
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
