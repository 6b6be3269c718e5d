"""Faults that the environment asks for, so that a real training can be killed, bent or starved at a named place.

For tests and for whoever wants to see what a fault does. `VERNIER_FAULTS` holds words such as

    kill=renamed:0:2     rank 0 kills itself with SIGKILL when it reaches `renamed` for the second time
    pause=written:1:5    rank 1 waits there for 5 seconds, each time
    end=early:1:7        rank 1 ends so at `early`: with this exit code, by SIGKILL or SIGABRT, or by `raise`
    nan=37,38            the loss of the batches at these positions is not a number
    spike=50             the loss of the batch at this position is a hundred times itself
    windows=2            a micro-batch of more windows runs out of memory, unless activations are checkpointed

Without it nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache

# On the way of a rank: `early`, before it imports torch, of an evaluator `scoring`; `joined` its rank-group.
# The phases of a save, in their order. The first three are for every rank (`unsynced` once a file, so perhaps never);
# the others for rank 0.
SAVE_POINTS = ("copied", "unsynced", "written", "told", "hashed", "renamed", "thinned")


@dataclass(frozen=True)
class Faults:
    """What was asked for."""

    kill: tuple[str, int, int] | None = None  # (point, rank, how many times it must be reached)
    pause: tuple[str, int, float] | None = None  # (point, rank, seconds)
    end: tuple[str, int, str] | None = None  # (point, rank, how)
    nan: frozenset[int] = frozenset()
    spike: frozenset[int] = frozenset()
    windows: int | None = None


@cache
def asked() -> Faults | None:
    """The faults that the environment asks for, if any."""
    words = dict(word.partition("=")[::2] for word in os.environ.get("VERNIER_FAULTS", "").split())
    if not words:
        return None
    kill, pause = words.get("kill", "").split(":"), words.get("pause", "").split(":")
    end = words.get("end", "").split(":")
    return Faults(
        end=(end[0], int(end[1]), end[2]) if len(end) == 3 else None,
        kill=(kill[0], int(kill[1]), int(kill[2])) if len(kill) == 3 else None,
        pause=(pause[0], int(pause[1]), float(pause[2])) if len(pause) == 3 else None,
        nan=_positions(words.get("nan", "")),
        spike=_positions(words.get("spike", "")),
        windows=int(words["windows"]) if "windows" in words else None,
    )


def _positions(text: str) -> frozenset[int]:
    return frozenset(int(one) for one in text.split(",") if one)


_reached: Counter[str] = Counter()


def reached(point: str) -> None:
    """This process has come to a named place.

    Raises:
        RuntimeError: asked to raise there.
    """
    faults = asked()
    if faults is None:
        return
    _reached[point] += 1
    rank = int(os.environ.get("RANK", "0"))
    if faults.kill == (point, rank, _reached[point]):
        os.kill(os.getpid(), signal.SIGKILL)
    if faults.end is not None and faults.end[:2] == (point, rank):
        how = faults.end[2]
        if how == "raise":
            raise RuntimeError(f"asked to fail at {point}")
        if how.isdigit():
            os._exit(int(how))
        if how == "SIGABRT":
            os.write(2, b"terminate called after throwing an instance of 'of'\n  what():  asked to end\n")
        os.kill(os.getpid(), signal.Signals[how])
    if faults.pause is not None and faults.pause[:2] == (point, rank):
        time.sleep(faults.pause[2])
