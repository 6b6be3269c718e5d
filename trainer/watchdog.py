"""Ends a training in which a rank hangs, within `guards.hang_s` and a few seconds, and says which rank, where and since
when. It is not a profiler, and does nothing about a rank that is merely slow.

Each rank watches its own main thread and says how it is through the store that joined the ranks, over a connection of
its own. Nobody reads that until it has itself stood still for half of `hang_s`; then the lowest rank that answers reads
what all say, judges, tells, and all end. A main thread that holds Python's lock in C code silences its own watchdog:
the others then name that rank as one that does not answer.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from configs.errors import EXIT_FAILED
from configs.rundir import RunDir
from eval.ranks import Ranks
from trainer.signs import Post, Sign, Stack, StoreAddress, main_thread_stack

LINGER_S = 2.0  # from the teller's last word to its end: by then the others have seen that all is told
END_S = 20.0  # a rank that has begun to tell ends by then, whatever its disk does
MOST_STACKS = 8  # in the event; every rank's own log has its own


@dataclass(frozen=True)
class Mark:
    """What the main thread does. A new one is progress."""

    step: int
    doing: str
    rests: bool  # may take as long as it takes


@dataclass(frozen=True)
class Heard:
    """The last that was heard of a rank, and since when, by the listener's clock."""

    text: str
    since: float
    sign: Sign | None


class Watchdog:
    """Watches this rank's main thread, and with the other ranks' watchdogs ends all when one hangs.

    Until the first `mark` the rank is taken to rest: setting up takes as long as it takes.
    """

    def __init__(self, run: RunDir, ranks: Ranks, hang_s: float) -> None:
        self.run, self.ranks, self.hang_s = run, ranks, hang_s
        self.silent_s = max(5.0, hang_s / 4)  # without a sign: frozen or gone
        self.beat_s = min(5.0, hang_s / 20)
        self.tick_s = min(1.0, self.beat_s)
        self.doubt_s = 3 * self.beat_s + 1.0  # without a sign: perhaps so
        self.host = socket.gethostname()
        self._mark = self._marked = Mark(0, "starting", rests=True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._post: Post | None = None
        self._attempt = 0
        self._clock = self._moved = self._answered = 0.0  # seconds that this process was not stopped for
        self._looked = 0.0  # seconds of the machine's clock
        self._rounds = self._stack_given = 0
        self._store_name = ""
        self._span = 1  # how many of the lower ranks are looked at
        self._others: dict[int, Heard] = {}
        self._asked_at: float | None = None

    def start(self) -> None:
        """Begins to watch. Every rank calls it, at the same place, once `state.json` has this attempt's number."""
        self._attempt = self.ranks.broadcast_int(int(self.run.read_state().get("attempt") or 0))
        store = StoreAddress.of_group(self._attempt) if self.ranks.world > 1 else None
        if store is not None:
            self._store_name = f"{store.host}:{store.port}"
            self._post = Post(store, self.ranks.rank, self.ranks.world, self.beat_s)
            self._say(ended=False)
            self._post.start()
        self._looked = time.monotonic()
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
        for thread in (self._thread, self._post):
            if thread is not None and thread.is_alive():
                thread.join(timeout=2.0)

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(self.tick_s):
                self._tick()
        except Exception:
            traceback.print_exc()  # a training is not ended by its watchdog's own mistake
        finally:
            if self._post is not None:
                self._say(ended=True)
                self._post.ends = True
                self._post.wake.set()

    def _tick(self) -> None:
        # Time that this whole process was stopped for (a suspended job) is not time that its main thread hung.
        now = time.monotonic()
        self._clock += min(now - self._looked, self.hang_s / 4)
        self._looked = now
        if self._mark is not self._marked:
            self._marked, self._moved = self._mark, self._clock
        still_s = self._clock - self._moved
        hung = still_s >= self.hang_s and not self._marked.rests
        post = self._post
        if post is None:
            if hung:
                stack = main_thread_stack()
                told = f"{self._who()} hangs: {self._where(still_s)}; it is in {stack.at}"
                self._tell(self.ranks.rank, told, self._marked.step, still_s, {self.ranks.rank: stack})
            return
        self._say(ended=False)
        if post.rounds != self._rounds:
            self._rounds, self._answered = post.rounds, self._clock
        if post.told:
            self._end(f"rank {self.ranks.rank} ends, since the ranks hang: the event `hung` says why")
        if post.asked > self._stack_given:
            self._stack_given = post.asked
            post.stack = json.dumps(asdict(replace(main_thread_stack(), ask=post.asked)))
        if still_s < self.hang_s / 2:
            self._others, self._span, self._asked_at = {}, 1, None
            post.look, post.pause_s = range(0), self.tick_s if post.asked else self.beat_s
            return
        post.pause_s = self.tick_s
        if post.lost or self._clock - self._answered >= self.silent_s:
            if hung:
                self._tell_of_store(still_s)
            return
        self._listen(post)
        if self._is_teller():
            self._judge(post, hung)

    def _say(self, *, ended: bool) -> None:
        assert self._post is not None
        self._post.sign = json.dumps(asdict(self._own_sign(ended=ended)))

    def _own_sign(self, *, ended: bool = False) -> Sign:
        mark, still_s = self._marked, self._clock - self._moved
        return Sign(time.time(), self.host, os.getpid(), mark.step, mark.doing, mark.rests, still_s, ended)

    def _listen(self, post: Post) -> None:
        """Takes in what the ranks say that are looked at."""
        said = post.signs
        self._others = {rank: heard for rank, heard in self._others.items() if rank in post.look}
        for rank in post.look:
            before, text = self._others.get(rank), said.get(rank, "")
            if before is None or text not in ("", before.text):
                self._others[rank] = Heard(text, self._clock, Sign(**json.loads(text)) if text else None)

    def _quiet_s(self, rank: int) -> float:
        return self._clock - self._others[rank].since if rank in self._others else 0.0

    def _is_teller(self) -> bool:
        """Whether no lower rank answers. Looks at more of them only where the first ones may not answer."""
        post, own = self._post, self.ranks.rank
        assert post is not None
        near = [rank for rank in range(min(self._span, own)) if not self._has_ended(rank)]
        if self._span < own and all(self._quiet_s(rank) >= self.doubt_s for rank in near):
            self._span *= 8
        elif self._span >= own and all(self._quiet_s(rank) >= self.silent_s for rank in near):
            post.look = range(self.ranks.world)
            return True
        post.look = range(min(self._span, own))
        return False

    def _has_ended(self, rank: int) -> bool:
        sign = self._others[rank].sign if rank in self._others else None
        return sign is not None and sign.ended

    def _judge(self, post: Post, hung: bool) -> None:
        """Tells, where all stand still and nobody has a reason to, or where somebody has been silent for `hang_s`."""
        own = self.ranks.rank
        others = [rank for rank in range(self.ranks.world) if rank != own and not self._has_ended(rank)]
        quiet = {rank: self._quiet_s(rank) for rank in others}
        answering = [rank for rank in others if quiet[rank] < self.doubt_s]
        gone = [rank for rank in others if quiet[rank] >= self.silent_s]
        in_doubt = len(answering) + len(gone) < len(others)
        certain = any(quiet_s >= max(self.hang_s, self.silent_s) for quiet_s in quiet.values())
        all_hang = hung and not in_doubt and not any(self._is_at_work(rank) for rank in answering)
        if not (all_hang or certain):
            self._asked_at = None
            return
        if self._asked_at is None:
            self._asked_at = self._clock
            post.wanted_asks += 1
            return
        asked = post.own_ask if post.made_asks == post.wanted_asks else 0
        given = {rank: Stack(**json.loads(text)) for rank, text in post.stacks.items()}
        stacks = {rank: stack for rank, stack in given.items() if stack.ask == asked > 0}
        patient = self._clock - self._asked_at < 2 * self.beat_s + 3.0
        if patient and not all(rank in stacks for rank in [own, *answering]):
            return
        stacks.setdefault(own, main_thread_stack())
        if gone:
            self._tell_of_gone(gone, stacks)
        else:
            self._tell_of_hung([own, *answering], stacks)

    def _is_at_work(self, rank: int) -> bool:
        """Whether a rank that answers makes progress, or rests: then waiting for it is no hang."""
        sign = self._others[rank].sign if rank in self._others else None
        return sign is None or sign.rests or sign.still_s < self.hang_s / 2

    def _sign_of(self, rank: int) -> Sign | None:
        return self._own_sign() if rank == self.ranks.rank else self._others[rank].sign

    def _who(self) -> str:
        return f"rank {self.ranks.rank} (host {self.host}, pid {os.getpid()})"

    def _where(self, still_s: float) -> str:
        return f"no progress for {still_s:.0f} s, at step {self._marked.step}, doing {self._marked.doing}"

    def _tell_of_gone(self, gone: list[int], stacks: dict[int, Stack]) -> None:
        first, sign = gone[0], self._sign_of(gone[0])
        if sign is None:
            seconds, who, last = self._quiet_s(first), f"rank {first}", "it has given no sign since the start"
        else:
            seconds = max(self._quiet_s(first), time.time() - sign.time)
            who = f"rank {first} (host {sign.host}, pid {sign.pid})"
            last = f"its last sign was {seconds:.0f} s ago, at step {sign.step}, doing {sign.doing}"
        alike = f"; neither do {_ranks(gone[1:])}" if len(gone) > 1 else ""
        waiting = next((rank for rank in sorted(stacks) if stacks[rank].waits), self.ranks.rank)
        waits = self._sign_of(waiting)
        step = waits.step if waits is not None else self._marked.step  # what its own last sign says may be a little old
        told = (
            f"{who} does not answer: its process is frozen or gone, so it gives no stack; {last}{alike}; "
            f"rank {waiting} waits at step {step}, in {stacks[waiting].at}"
        )
        self._tell(first, told, step, seconds, {waiting: stacks[waiting], **stacks}, ranks=gone)

    def _tell_of_hung(self, living: list[int], stacks: dict[int, Stack]) -> None:
        """Names who is not waiting for others; among those, or where all wait, who is the most behind."""
        signs = {rank: sign for rank in living if (sign := self._sign_of(rank)) is not None}
        busy = [rank for rank in signs if rank not in stacks or not stacks[rank].waits]
        pool = busy or list(signs)
        behind = min(signs[rank].step for rank in pool)
        culprits = sorted(rank for rank in pool if signs[rank].step == behind)
        first = culprits[0]
        sign = signs[first]
        who = f"rank {first} (host {sign.host}, pid {sign.pid})"
        where = f"no progress for {sign.still_s:.0f} s, at step {sign.step}, doing {sign.doing}"
        at = f"it is in {stacks[first].at}" if first in stacks else "it gave no stack"
        if len(culprits) == len(signs) > 1:
            told = f"all ranks hang and none stands out; {who}: {where}; {at}"
        else:
            alike = f"; so do {_ranks(culprits[1:])}" if len(culprits) > 1 else ""
            told = f"{who} hangs: {where}; {at}{alike}"
        ended = [rank for rank in range(self.ranks.world) if rank in self._others and self._has_ended(rank)]
        told += f"; {_ranks(ended)} had ended" if ended else ""
        shown = {rank: stacks[rank] for rank in [*culprits, *sorted(stacks)] if rank in stacks}
        self._tell(first, told, sign.step, sign.still_s, shown, ranks=culprits)

    def _tell_of_store(self, still_s: float) -> None:
        """Nothing is heard of the others: each rank tells what it knows, and the first one is recorded."""
        own, stack = self.ranks.rank, main_thread_stack()
        by_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and own != 0
        holder = "rank 0, which holds it," if by_rank_0 else "its host, or torchrun there,"
        told = (
            f"the store that joins the ranks ({self._store_name}) does not answer: {holder} is frozen or gone; "
            f"{self._who()}: {self._where(still_s)}; it is in {stack.at}"
        )
        self._tell(0 if by_rank_0 else own, told, self._marked.step, still_s, {own: stack})

    def _tell(
        self,
        rank: int,
        told: str,
        step: int | None,
        seconds: float,
        stacks: dict[int, Stack],
        ranks: list[int] | None = None,
    ) -> None:
        """Records why the training ends, then ends this rank."""
        limit = threading.Timer(END_S, os._exit, (EXIT_FAILED,))
        limit.daemon = True
        limit.start()
        _write_log(told + "".join(f"\nrank {one}:\n{stack.text}" for one, stack in stacks.items()))
        shown = {str(one): stacks[one].text for one in list(stacks)[:MOST_STACKS]}
        try:
            self._record(rank, told, step, {"seconds": round(seconds, 1), "ranks": ranks or [rank], "stacks": shown})
        except Exception:
            traceback.print_exc()
        if self._post is not None:
            self._post.tells = True
            self._post.wake.set()
            time.sleep(LINGER_S)
        self._end(f"rank {self.ranks.rank} ends")

    def _record(self, rank: int, told: str, step: int | None, detail: dict[str, Any]) -> None:
        """The state and the event, unless this attempt's failure is told or a later attempt has the run."""
        state = self.run.read_state()
        if int(state.get("attempt") or 0) != self._attempt or state.get("failure") is not None:
            return
        if state.get("exit_code") is None:  # else its last word is said, and it hung only in ending
            self.run.record_failure(EXIT_FAILED, rank, told, begun=True)
            if (self.run.read_state().get("failure") or {}).get("error", told) != told:
                return  # another rank was faster
        self.run.add_event("hung", told, step=step, rank=rank, **detail)

    def _end(self, told: str) -> None:
        """Ends this process at once, its threads' stacks in its log; takes no lock that the main thread may hold."""
        _write_log(told)
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_FAILED)


def _write_log(text: str) -> None:
    os.write(2, f"{text}\n".encode())


def _ranks(ranks: list[int]) -> str:
    """Ranks in words, a few by number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = ", ".join(str(rank) for rank in ranks[:6])
    return f"ranks {named}" + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")
