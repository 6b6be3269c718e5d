"""Ends a training in which a rank hangs, within `guards.hang_s` and a few seconds, and says which rank, where and since
when. It is not a profiler, and does nothing about a rank that is merely slow.

Each rank watches its own main thread and says how it is through the store that joined the ranks, over a connection of
its own. Nobody reads that until it has itself stood still for half of `hang_s`; then the teller reads what all say,
judges, tells, and all end. The teller is rank 0, and where it is silent the first that notices. A main thread that
holds Python's lock in C code silences its own watchdog: the others then name that rank as one that does not answer.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Empty
from typing import NoReturn

from configs.errors import EXIT_FAILED
from configs.run.directory import RunDir
from eval.distributed.ranks import Ranks
from trainer.faults.hang_verdict import Hang, LastSeen, hang_of_store, hangs, judge, seen, silent_s
from trainer.faults.heartbeat import Heard, Heartbeat, Said, StoreClient, main_thread_stack, store_of_group

LINGER_S = 2.0  # from the teller's last word to its end: by then the others have seen that all is told
END_S = 20.0  # a rank that has begun to tell ends by then, whatever its disk does
MOST_STACKS = 8  # in the event; every rank's own log has its own


@dataclass(frozen=True)
class Mark:
    """What the main thread does. A new one is progress."""

    step: int
    doing: str
    rests: bool  # may take as long as it takes


class Watchdog:
    """Watches this rank's main thread, and with the other ranks' watchdogs ends all when one hangs.

    Until the first `mark` the rank is taken to rest: setting up takes as long as it takes.
    """

    def __init__(self, run: RunDir, ranks: Ranks, hang_s: float) -> None:
        self.run, self.ranks, self.hang_s = run, ranks, hang_s
        self.beat_s = min(5.0, hang_s / 20)
        self._mark = self._marked = Mark(0, "starting", rests=True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._attempt = 0
        self._client: StoreClient | None = None
        self._looked = 0.0  # seconds of the machine's clock
        self._clock = self._moved = self._said_at = self._answered = 0.0  # seconds that it was not stopped for
        self._heard: Heard | None = Heard(told=False)  # None: the store is lost
        self._under_way = False  # a word to which there is no answer yet
        self._others: dict[int, LastSeen] = {}

    def start(self) -> None:
        """Begins to watch. Every rank calls it, at the same place, once `state.json` has this attempt's number."""
        self._attempt = self.ranks.broadcast_int(int(self.run.read_state().get("attempt") or 0))
        store = store_of_group() if self.ranks.world > 1 else None
        self._looked = time.monotonic()
        if store is not None:
            self._client = StoreClient(store.host, store.port, self._attempt, self.ranks.rank, self.ranks.world)
            self._client.start()
            self._say(Said(self._beat()))
        self._thread.start()

    def mark(self, step: int, doing: str = "step") -> None:
        """The main thread makes progress: `step` steps are made, it begins with `doing`. Costs nothing."""
        self._mark = Mark(step, doing, rests=False)

    @contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """What is done inside may take as long as it takes; the others may wait for it as long."""
        before = self._mark
        self._mark = replace(before, doing=doing, rests=True)
        try:
            yield
        finally:
            self._mark = replace(before, step=self._mark.step)

    def stop(self) -> None:
        """Ends watching, and says so to the others."""
        self._stopped.set()
        for thread in (self._thread, self._client):
            if thread is not None and thread.is_alive():
                thread.join(timeout=2.0)

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(min(1.0, self.beat_s)):
                self._tick()
        except Exception:
            traceback.print_exc()  # a training is not ended by its watchdog's own mistake
        finally:
            if self._client is not None:
                self._say(Said(replace(self._beat(), ended=True)))
                self._client.out.put(None)

    def _beat(self) -> Heartbeat:
        # Time that this whole process was stopped for (a suspended job) is not time that its main thread hung, nor
        # that the others were silent.
        now = time.monotonic()
        self._clock += min(now - self._looked, self.hang_s / 4, silent_s(self.hang_s) / 2)
        self._looked = now
        if self._mark is not self._marked:
            self._marked, self._moved = self._mark, self._clock
        mark, still_s = self._marked, self._clock - self._moved
        who = (self.ranks.rank, time.time(), socket.gethostname(), os.getpid())
        return Heartbeat(*who, mark.step, mark.doing, mark.rests, still_s)

    def _tick(self) -> None:
        own = self._beat()
        looks = own.still_s >= self.hang_s / 2
        if looks and not own.rests:  # else the lines of its stack may be on the disk that it waits for
            own = replace(own, stack=main_thread_stack())
        if self._client is None:
            self._judge(own)
            return
        if self._under_way:
            self._listen(self._client)
        silent = self._clock - self._answered >= silent_s(self.hang_s)
        if (silent or self._heard is None) and hangs(own, self.hang_s):
            self._tell(self._hang_of_store(self._client, own))
        if not self._under_way and (looks or self._clock - self._said_at >= self.beat_s):
            self._say(Said(own, looks, follows=self._look(own) if looks else None))
        if not looks:
            self._others = {}

    def _say(self, said: Said) -> None:
        assert self._client is not None
        self._client.out.put(said)
        self._under_way, self._said_at = True, self._clock

    def _listen(self, client: StoreClient) -> None:
        try:
            self._heard = client.answers.get_nowait()
        except Empty:
            return
        self._under_way = False
        if self._heard is not None:
            self._answered = self._clock
            if self._heard.told:
                self._end(f"rank {self.ranks.rank} ends, since the ranks hang: the event `hung` says why")

    def _look(self, own: Heartbeat) -> int | None:
        """Judges, as the teller; gives the teller whose place this rank is to take, if any."""
        heard = self._heard
        if heard is None or heard.teller is None:
            return None
        self._others = seen(self._others, heard.beats, self._clock)
        if heard.teller == own.rank:
            self._judge(own)
            return None
        teller = self._others[heard.teller]
        vacant = teller.ended or self._clock - teller.since >= silent_s(self.hang_s)
        return heard.teller if vacant else None

    def _judge(self, own: Heartbeat) -> None:
        if judge(self._clock, own, self._others, self.hang_s) is not None:
            with_stack = replace(own, stack=main_thread_stack())  # though it may rest
            hang = judge(self._clock, with_stack, self._others, self.hang_s)
            assert hang is not None
            self._tell(hang)

    def _hang_of_store(self, client: StoreClient, own: Heartbeat) -> Hang:
        by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and own.rank != 0
        return hang_of_store(own, f"{client.host}:{client.port}", holder=0 if by_rank_0 else None)

    def _tell(self, hang: Hang) -> NoReturn:
        """Records why the training ends, then ends this rank. Each may do so; the first one is recorded."""
        limit = threading.Timer(END_S, os._exit, (EXIT_FAILED,))
        limit.daemon = True
        limit.start()
        _write_log(hang.words + "".join(f"\nrank {rank}:\n{stack.text}" for rank, stack in hang.stacks.items()))
        try:
            self._record(hang)
        except Exception:
            traceback.print_exc()
        if self._client is not None:
            self._say(Said(self._beat(), tells=True))
            time.sleep(LINGER_S)
        self._end(f"rank {self.ranks.rank} ends")

    def _record(self, hang: Hang) -> None:
        """The state and the event, unless this attempt's failure is told or a later attempt has the run."""
        state, rank = self.run.read_state(), hang.culprits[0]
        if int(state.get("attempt") or 0) != self._attempt or state.get("failure") is not None:
            return
        if state.get("exit_code") is None:  # else its last word is said, and it hung only in ending
            self.run.record_failure(EXIT_FAILED, rank, hang.words, begun=True)
            if (self.run.read_state().get("failure") or {}).get("error", hang.words) != hang.words:
                return  # another rank was faster
        shown = {str(one): hang.stacks[one].text for one in list(hang.stacks)[:MOST_STACKS]}
        detail = {"seconds": round(hang.seconds, 1), "ranks": hang.culprits, "stacks": shown}
        self.run.add_event("hung", hang.words, step=hang.step, rank=rank, **detail)

    def _end(self, told: str) -> NoReturn:
        """Ends this process at once, its threads' stacks in its log; takes no lock that the main thread may hold."""
        _write_log(told)
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_FAILED)


def _write_log(text: str) -> None:
    os.write(2, f"{text}\n".encode())
