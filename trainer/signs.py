"""What the ranks of a training say of themselves, and where each is: signs and stacks, carried by the store that joined
them. What is to be made of it is in `trainer/watchdog.py`.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

MOST_FRAMES = 24
CONNECT_S = 30.0

# The innermost frame of a rank that waits for others, or for a device that does.
WAITING_FILE = re.compile(r"/torch/distributed/|/deepspeed/comm/")
WAITING_LINE = re.compile(r"\.(wait|synchronize|item|tolist|cpu|barrier|all_reduce|broadcast)\(")


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself. Its time is new each time, so that one who says the same for long is silent."""

    time: float
    host: str
    pid: int
    step: int
    doing: str
    rests: bool
    still_s: float  # since its last progress
    ended: bool


@dataclass(frozen=True)
class Stack:
    """Where a rank's main thread is."""

    text: str
    at: str  # the innermost frame, in a line
    waits: bool
    ask: int = 0


@dataclass(frozen=True)
class StoreAddress:
    """Where the store is that joined the ranks."""

    host: str
    port: int
    prefix: str  # of this attempt's keys

    @staticmethod
    def of_group(attempt: int) -> StoreAddress | None:
        """That of the process group; None where it has no TCP store."""
        store: Any = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return None
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's own, in the same store
        return StoreAddress(store.host, store.port, f"watchdog/{attempt}/{restarts}")

    def connect(self) -> Any:
        """A connection of its own: the main thread may wait in the group's. Raises RuntimeError."""
        patience = timedelta(seconds=CONNECT_S)
        store = dist.TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=patience)
        return dist.PrefixStore(self.prefix, store)


class Post(threading.Thread):
    """Carries words between the ranks, in a thread of its own: a call to a store whose host is frozen never returns."""

    def __init__(self, address: StoreAddress, rank: int, world: int, beat_s: float) -> None:
        super().__init__(daemon=True, name="watchdog-post")
        self.address, self.store = address, address.connect()
        self.rank, self.world, self.pause_s = rank, world, beat_s
        # what to say and to look for, set by the watchdog
        self.sign, self.stack, self.look, self.wanted_asks = "", "", range(0), 0
        self.tells = self.ends = False
        self.wake = threading.Event()
        # what came back
        self.rounds, self.asked, self.own_ask, self.made_asks = 0, 0, 0, 0
        self.told = self.lost = False
        self.signs: dict[int, str] = {}
        self.stacks: dict[int, str] = {}
        self._known: set[str] = set()

    def run(self) -> None:
        last = False
        while not last:
            last = self.ends
            try:
                if self.lost:
                    self.store = self.address.connect()
                self._round()
                self.rounds += 1
                self.lost = False
            except RuntimeError:  # all that a store raises: who holds it is gone, or the way to it was for a moment
                self.lost = True
            self.wake.wait(0.0 if last else self.pause_s)
            self.wake.clear()

    def _round(self) -> None:
        self.store.set(f"sign/{self.rank}", self.sign)
        if self.made_asks != self.wanted_asks:
            made = self.wanted_asks
            self.own_ask, self.made_asks = self.store.add("ask", 1), made
        if self.tells:
            self.store.add("told", 1)
        # Adding nothing reads a number without waiting for it to be there.
        self.asked = self.store.add("ask", 0)
        self.told = self.store.add("told", 0) > 0
        if self.stack:
            self.store.set(f"stack/{self.rank}", self.stack)
            self.stack = ""
        self.signs = self._read("sign", self.look)
        if self.wanted_asks:
            self.stacks = self._read("stack", range(self.world))

    def _read(self, kind: str, ranks: Iterable[int]) -> dict[int, str]:
        keys = {f"{kind}/{rank}": rank for rank in ranks}
        there = [key for key in keys if key in self._known or self.store.check([key])]
        self._known.update(there)
        texts = self.store.multi_get(there) if there else []
        return {keys[key]: bytes(text).decode() for key, text in zip(there, texts, strict=True)}


def main_thread_stack() -> Stack:
    """Where the main thread is now. Threads that Python did not start (autograd's) may be the ones that wait for it."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    calls = traceback.extract_stack(frames.get(main) if main is not None else None)
    known = {thread.ident for thread in threading.enumerate()}
    waits = _waits(calls) or (
        calls[-1].name == "_engine_run_backward"
        and any(_waits(traceback.extract_stack(frame)) for ident, frame in frames.items() if ident not in known)
    )
    file = "/".join(calls[-1].filename.split("/")[-2:])
    at = f"{file}:{calls[-1].lineno} ({calls[-1].name}): {calls[-1].line or ''}".rstrip(": ")
    return Stack("".join(traceback.format_list(calls[-MOST_FRAMES:])), " ".join(at.split()), waits)


def _waits(calls: traceback.StackSummary) -> bool:
    return bool(WAITING_FILE.search(calls[-1].filename) or WAITING_LINE.search(calls[-1].line or ""))
