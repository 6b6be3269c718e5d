"""What the ranks of a training say of themselves, and where each is: heartbeats and stacks, carried by the store that
joined them. What is to be made of it is in `hang_verdict.py`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

MOST_FRAMES = 24
CONNECT_S = 30.0

# The innermost frame of a rank that waits for others, or for a device that does.
WAITING_FILE = re.compile(r"/torch/distributed/|/deepspeed/comm/")
WAITING_LINE = re.compile(r"\.(wait|synchronize|item|tolist|cpu|barrier|all_reduce|broadcast)\(")


@dataclass(frozen=True)
class Stack:
    """Where a rank's main thread is."""

    text: str
    at: str  # the innermost frame, in a line
    waits: bool


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself. Its time is new each time, so that one who says the same for long is silent."""

    rank: int
    time: float
    host: str
    pid: int
    step: int
    doing: str
    rests: bool
    still_s: float  # since its last progress
    stack: Stack | None = None  # once that is long
    ended: bool = False


@dataclass(frozen=True)
class Said:
    """What a rank says to the others, and wants to hear of them."""

    beat: Heartbeat
    looks: bool = False  # at the teller; the teller looks at all
    follows: int | None = None  # takes the place of this teller
    tells: bool = False  # why the training ends: it is told


@dataclass(frozen=True)
class Heard:
    """The answer to it."""

    told: bool
    teller: int | None = None  # who judges; None where it did not look
    beats: dict[int, Heartbeat | None] = field(default_factory=dict)  # of all that were looked at


def store_of_group() -> dist.TCPStore | None:
    """That which joined the ranks; None where it is no TCP store, which alone takes a second connection."""
    store: Any = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store if isinstance(store, dist.TCPStore) else None


class StoreClient(threading.Thread):
    """Carries words between the ranks, in a thread of its own: a call to a store whose host is frozen never returns.

    To each Said in `out` there is one answer in `answers`, None where the store is lost; None in `out` ends it.
    """

    def __init__(self, host: str, port: int, attempt: int, rank: int, world: int) -> None:
        super().__init__(daemon=True, name="watchdog-store")
        self.host, self.port, self._rank, self._world = host, port, rank, world
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's own, in the same store
        self._prefix = f"watchdog/{attempt}/{restarts}"
        self.out: SimpleQueue[Said | None] = SimpleQueue()
        self.answers: SimpleQueue[Heard | None] = SimpleQueue()
        self._known: set[int] = set()
        self._store = self._connect()

    def _connect(self) -> Any:
        """A connection of its own: the main thread may wait in the group's. Raises RuntimeError."""
        patience = timedelta(seconds=CONNECT_S)
        store = dist.TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=patience)
        return dist.PrefixStore(self._prefix, store)

    def run(self) -> None:
        heard: Heard | None = Heard(told=False)
        while (said := self.out.get()) is not None:
            try:
                if heard is None:
                    self._store = self._connect()
                heard = self._exchange(said)
            except RuntimeError:  # all that a store raises: who holds it is gone, or the way to it was for a moment
                heard = None
            self.answers.put(heard)

    def _exchange(self, said: Said) -> Heard:
        store = self._store
        store.set(f"beat/{self._rank}", json.dumps(asdict(said.beat)))
        told = store.add("told", int(said.tells)) > 0  # adding 0 reads it without waiting for it to be there
        if not said.looks:
            return Heard(told)
        teller = int(store.compare_set("teller", "", "0"))  # sets nothing where there is one
        if said.follows is not None:  # of all that try, one takes its place
            teller = int(store.compare_set("teller", str(said.follows), str(self._rank)))
        looked = [teller] if teller != self._rank else [rank for rank in range(self._world) if rank != self._rank]
        return Heard(told, teller, self._beats_of(looked))

    def _beats_of(self, ranks: list[int]) -> dict[int, Heartbeat | None]:
        there = [rank for rank in ranks if rank in self._known or self._store.check([f"beat/{rank}"])]
        self._known.update(there)
        texts = self._store.multi_get([f"beat/{rank}" for rank in there]) if there else []
        return dict.fromkeys(ranks) | dict(zip(there, map(_read, texts), strict=True))


def _read(text: bytes) -> Heartbeat:
    beat = json.loads(text)
    return Heartbeat(**{**beat, "stack": beat["stack"] and Stack(**beat["stack"])})


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
