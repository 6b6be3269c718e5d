"""Which of a run's processes are there, and which is which: by their command lines, as `ps` shows them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

RANK = re.compile(r"vernier rank (\d+): python -m (\S+)")


class Process(NamedTuple):
    """`kind`: vernier, agent, rank or another. `module`: what an agent or a rank runs. `rank`: of a rank."""

    kind: str
    module: str
    rank: int | None
    command: str


def processes(where: Path | str, kind: str = "", module: str = "") -> dict[int, Process]:
    """Processes whose command line names a path, of one kind and module where these are given, by pid."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if str(where) not in command or int(entry.name) == os.getpid():
                continue
            one = _which(command, entry)
        except OSError:  # gone meanwhile
            continue
        if (not kind or one.kind == kind) and (not module or one.module == module):
            found[int(entry.name)] = one
    return found


def the(where: Path | str, kind: str, module: str, rank: int | None = None) -> int:
    """The pid of the one process of that kind."""
    (pid,) = [pid for pid, one in processes(where, kind, module).items() if rank is None or one.rank == rank]
    return pid


def _which(command: str, entry: Path) -> Process:
    words = command.split()
    if forked := RANK.match(command):
        return Process("rank", forked[2], int(forked[1]), command)
    if "launcher.backends.agent" in words:
        return Process("agent", next((word for word in words if word in ("trainer", "eval")), ""), None, command)
    if "launcher.cli" in words or words[0].endswith("/vernier"):
        return Process("vernier", "", None, command)
    module = words[words.index("-m") + 1] if "-m" in words[:-1] and "python" in words[0] else ""
    if module in ("trainer", "eval"):
        environment = (entry / "environ").read_bytes().split(b"\0")
        told = [word[5:].decode() for word in environment if word.startswith(b"RANK=")]
        return Process("rank", module, int(told[0]) if told else 0, command)
    return Process("another", "", None, command)
