"""Whether a training hangs, and which rank is to blame: a pure judgement on what the ranks say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.faults.heartbeat import Heartbeat, Stack


@dataclass(frozen=True)
class LastSeen:
    """The last heartbeat of a rank, and since when there was no newer one, by the judge's clock."""

    since: float
    beat: Heartbeat | None

    @property
    def ended(self) -> bool:
        return self.beat is not None and self.beat.ended

    def is_at_work(self, hang_s: float) -> bool:
        """Whether it makes progress, or rests: then waiting for it is no hang."""
        return self.beat is None or self.beat.rests or self.beat.still_s < hang_s / 2


@dataclass(frozen=True)
class Hang:
    """All that is told. The first culprit is the one that is named; what matters most is first among the stacks."""

    culprits: list[int]
    words: str
    step: int
    seconds: float
    stacks: dict[int, Stack]


def judge(now: float, own: Heartbeat, others: Mapping[int, LastSeen], hang_s: float) -> Hang | None:
    """A hang is where all stand still and nobody has a reason to, or where a rank has been silent for `hang_s`.

    Args:
        now: seconds, by the clock of `LastSeen.since`.
        own: the judge's, made just now.
        others: every other rank.
    """
    quiet_s = {rank: now - seen.since for rank, seen in sorted(others.items()) if not seen.ended}
    gone = [rank for rank, quiet in quiet_s.items() if quiet >= silent_s(hang_s)]
    answering = [others[rank] for rank, quiet in quiet_s.items() if quiet < silent_s(hang_s)]
    forsaken = any(quiet_s[rank] >= hang_s for rank in gone)
    if not forsaken and (any(seen.is_at_work(hang_s) for seen in answering) or not hangs(own, hang_s)):
        return None
    beats = sorted([own, *(seen.beat for seen in answering if seen.beat is not None)], key=lambda beat: beat.rank)
    if gone:
        return _of_gone(gone, now, own, others[gone[0]], beats)
    return _of_hung(beats, [rank for rank, seen in sorted(others.items()) if seen.ended])


def seen(before: Mapping[int, LastSeen], beats: Mapping[int, Heartbeat | None], now: float) -> dict[int, LastSeen]:
    """What is known of the ranks that are looked at now: one whose heartbeat is the old one was last seen before."""
    unchanged = {rank for rank, beat in beats.items() if rank in before and beat in (None, before[rank].beat)}
    return {rank: before[rank] if rank in unchanged else LastSeen(now, beat) for rank, beat in beats.items()}


def silent_s(hang_s: float) -> float:
    """For so many seconds without a heartbeat a rank is frozen or gone; so is a store without an answer."""
    return max(5.0, hang_s / 4)


def hangs(own: Heartbeat, hang_s: float) -> bool:
    """Whether a rank itself stands still for too long, without a reason to."""
    return own.still_s >= hang_s and not own.rests


def hang_of_store(own: Heartbeat, store: str, holder: int | None) -> Hang:
    """Where nothing is heard of the others, since the store that joins them does not answer.

    Args:
        store: its host and port.
        holder: the rank whose process it is; None where it is no rank's.
    """
    whose = f"rank {holder}, which holds it," if holder is not None else "its host, or torchrun there,"
    words = (
        f"the store that joins the ranks ({store}) does not answer: {whose} is frozen or gone; "
        f"{_who(own)}: {_where(own)}; {_is_in(own)}"
    )
    return Hang([own.rank if holder is None else holder], words, own.step, own.still_s, _stacks([own]))


def _of_gone(gone: list[int], now: float, own: Heartbeat, first: LastSeen, beats: list[Heartbeat]) -> Hang:
    """Names the first of the silent, and where somebody waits for it."""
    seconds, who, last = now - first.since, f"rank {gone[0]}", "it has given no sign since the start"
    if first.beat is not None:
        seconds, who = max(seconds, own.time - first.beat.time), _who(first.beat)
        last = f"its last sign was {seconds:.0f} s ago, at step {first.beat.step}, doing {first.beat.doing}"
    alike = f"; neither do {_ranks(gone[1:])}" if len(gone) > 1 else ""
    waiting = next((beat for beat in beats if beat.stack is not None and beat.stack.waits), own)
    within = f", in {waiting.stack.at}" if waiting.stack is not None else ""
    words = (
        f"{who} does not answer: its process is frozen or gone, so it gives no stack; {last}{alike}; "
        f"rank {waiting.rank} waits at step {waiting.step}{within}"
    )
    return Hang(gone, words, waiting.step, seconds, _stacks([waiting, *beats]))


def _of_hung(beats: list[Heartbeat], ended: list[int]) -> Hang:
    """Names who is not waiting for others; among those, or where all wait, who is the most behind."""
    pool = [beat for beat in beats if beat.stack is None or not beat.stack.waits] or beats
    behind = min(beat.step for beat in pool)
    blamed = [beat for beat in pool if beat.step == behind]
    first, culprits = blamed[0], [beat.rank for beat in blamed]
    if len(culprits) == len(beats) > 1:
        words = f"all ranks hang and none stands out; {_who(first)}: {_where(first)}; {_is_in(first)}"
    else:
        alike = f"; so do {_ranks(culprits[1:])}" if len(culprits) > 1 else ""
        words = f"{_who(first)} hangs: {_where(first)}; {_is_in(first)}{alike}"
    words += f"; {_ranks(ended)} had ended" if ended else ""
    return Hang(culprits, words, first.step, first.still_s, _stacks([*blamed, *beats]))


def _stacks(beats: list[Heartbeat]) -> dict[int, Stack]:
    return {beat.rank: beat.stack for beat in beats if beat.stack is not None}


def _who(beat: Heartbeat) -> str:
    return f"rank {beat.rank} (host {beat.host}, pid {beat.pid})"


def _where(beat: Heartbeat) -> str:
    return f"no progress for {beat.still_s:.0f} s, at step {beat.step}, doing {beat.doing}"


def _is_in(beat: Heartbeat) -> str:
    return f"it is in {beat.stack.at}" if beat.stack is not None else "it gave no stack"


def _ranks(ranks: list[int]) -> str:
    """Ranks in words, a few by number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    named = ", ".join(str(rank) for rank in ranks[:6])
    return f"ranks {named}" + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")
