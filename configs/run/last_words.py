"""Why a process ended that could not say so itself: its exit status and what its log ends with, in one line."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from configs.files.opening import open_to_read
from configs.files.seal import parsed
from configs.log_stream import MARK

CHUNK = 1 << 16

TAIL_BYTES = 1 << 16
MOST = 400  # characters of a reason

# What a rank meets when another one has ended: of gloo, NCCL, the store and torch's agent. Never a cause.
_FOLLOWS = re.compile(
    r"by peer|[Bb]roken pipe|[Cc]onnection (was )?(closed|refused|aborted)|[Tt]imed out (waiting|after)"
    r"|operation timeout|(aborted communicator|communicator was aborted)|remote process exited|Socket closed"
    r"|recv(Value|Bytes|Vector)? failed|failed to (recv|send)|another rank has (ended|failed)|signal 15\b"
)
_SIGNS = (  # of an end that nobody caught: the first kind that is found counts, and of it the last
    re.compile(r"^(?P<said>terminate called .*(?:\n\s+what\(\): .*)?)", re.MULTILINE),
    re.compile(r"^(?P<said>.*Assertion .* failed.*)", re.MULTILINE),
    re.compile(r"^(?P<said>(?:free\(\)|malloc\(\)|double free|corrupted|\*\*\* ).*)", re.MULTILINE),
    re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(?P<said>[^\s].*)", re.MULTILINE),
    re.compile(r"^(?P<said>Fatal Python error.*)", re.MULTILINE),
    re.compile(r"^(?:[\w./-]+: )?(?:fatal )?error: (?P<said>.*)", re.MULTILINE | re.IGNORECASE),
    re.compile(r"^(?P<said>.*(?:error while loading shared libraries|command not found|No module named).*)", re.M),
)
_ENDS = (  # in a starter's log: of torch's agent (ours), of Open MPI 4 and 5, of MPICH, of srun
    re.compile(r"^rank (?P<rank>\d+) \(pid \d+\): (?P<how>.*)", re.MULTILINE),
    re.compile(r"process rank (?P<rank>\d+) with PID .*? exited on\s+(?P<how>signal \d+ \([^)]*\))"),
    re.compile(r"Process name: \[.*?,\s*(?P<rank>\d+)\]\s+Exit code:\s+(?P<code>\d+)", re.DOTALL),
    re.compile(r"^srun: error: \S+: task (?P<rank>\d+): (?P<how>.*)", re.MULTILINE),
)


def follows_another(text: str) -> bool:
    """Whether these are the words of a rank that ends because another one has."""
    return bool(_FOLLOWS.search(text))


def how_ended(code: int) -> str:
    """An exit code, negative for a signal, in words."""
    if code >= 0:
        return f"exit code {code}"
    known = {one.value: one.name for one in signal.Signals}
    return f"signal {-code} ({known.get(-code, 'unknown')})"


def of_rank(rank: object, said: object) -> str:
    """What a failed rank said, with its number before it, unless it is known as no rank's or says so itself."""
    return str(said) if rank is None or str(said).startswith(f"rank {rank}") else f"rank {rank}: {said}"


def last_words(log: Path, offset: int = 0) -> str:
    """What a process's log says, from `offset` bytes on, of how it ended: a line, "" where there is none."""
    text = read_from(log, offset)
    found = (list(sign.finditer(text)) for sign in _SIGNS)
    return next((shortened(matches[-1]["said"]) for matches in found if matches), "")


def first_end(log: Path, offset: int = 0) -> tuple[int, str] | None:
    """(rank, how it ended) of the rank that a starter's log names first, from `offset` bytes on."""
    text = read_from(log, offset)
    found = [match for sign in _ENDS if (match := sign.search(text))]
    if not found:
        return None
    first = min(found, key=lambda match: match.start())
    named = first.groupdict()
    return int(named["rank"]), shortened(named.get("how") or f"exit code {named['code']}")


def last_line(log: Path, offset: int = 0) -> str:
    """The last line from `offset` bytes on that is not empty, nor what ranks said to people while all was well."""
    lines = [line for line in read_from(log, offset).splitlines() if line.strip() and not line.startswith(MARK)]
    return shortened(lines[-1]) if lines else ""


def shortened(text: str) -> str:
    """A text on one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= MOST else f"{line[: MOST - 1]}…"


def size_of(log: Path) -> int:
    """Bytes in a log; 0 where it is not there."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def read_from(log: Path, offset: int) -> str:
    """The end of a log, from `offset` bytes on at most."""
    try:
        with open(log, "rb") as file:
            end = file.seek(0, 2)
            file.seek(max(min(offset, end), end - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def tail_lines(path: Path, *, count: int | None = None, most_bytes: int | None = None) -> list[dict[str, Any]]:
    """The last whole lines of a JSON-lines file in their order, read from its end backwards.

    What follows the last newline is still being written, and is left out; so is a line that is not a JSON object.

    Args:
        count: most lines; None: all.
        most_bytes: how far back to read at most; None: as far as it takes.
    """
    pieces: list[bytes] = []
    newlines = 0
    try:
        with open_to_read(path) as file:
            end = position = file.seek(0, 2)
            first = 0 if most_bytes is None else max(0, end - most_bytes)
            while position > first and (count is None or newlines <= count):
                start = max(first, position - CHUNK)
                file.seek(start)
                pieces.append(file.read(position - start))
                newlines += pieces[-1].count(b"\n")
                position = start
    except OSError:
        return []
    lines = b"".join(reversed(pieces)).split(b"\n")
    whole = lines[0 if position == 0 else 1 : -1]
    found = []
    for line in whole if count is None else whole[-count:]:
        try:
            read = parsed(line)
        except ValueError:
            continue
        if isinstance(read, dict):
            found.append(read)
    return found
