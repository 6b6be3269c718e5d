"""Where ranks talk to people, and their logs. Where no terminal can be lent to them (behind mpirun, on other machines)
they say it in lines with a mark in the log that catches all their output, which `vernier` passes on."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

from configs.console import VARIABLE, lent_terminal, open_streams, open_terminal, people_descriptor
from configs.files.opening import open_to_read, open_to_write

MARK = "vernier> "


class _Marked(io.TextIOBase):
    """Writes whole lines, each with the mark before it. What cannot be said is left unsaid."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.rest = descriptor, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            with suppress(OSError):  # one write, so that no other rank's line gets into it
                os.write(self.descriptor, "".join(f"{MARK}{line}\n" for line in lines).encode(errors="replace"))
        return len(text)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


def ask_for_marks(environment: dict[str, str]) -> None:
    """Tells processes started with `environment` to mark what they say to people."""
    environment[VARIABLE] = "marked"


def marked_terminal() -> TextIO | None:
    """The stream to talk to people on, where `vernier` has asked for marks; it goes where stderr does."""
    if os.environ.get(VARIABLE) != "marked":
        return None
    return cast(TextIO, _Marked(os.dup(people_descriptor())))


def stream_to_people() -> TextIO:
    """Where a rank talks to people: the terminal it was lent, else stderr, which may be its log's by now."""
    stream = lent_terminal() or marked_terminal()
    if stream is not None:
        return stream
    return open_terminal(people_descriptor(), sys.stderr.encoding or "utf-8")


def log_to_file(path: Path) -> None:
    """Sends this process's stdout and stderr, its libraries' too, to `path`.

    Raises:
        OSError: it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    log = open_to_write(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    open_streams(log=True)


class Relay:
    """Reads what is new in a log, and gives the lines that are for people."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.offset = log.stat().st_size if log.is_file() else 0

    def new_lines(self) -> list[str]:
        """Marked lines that have come to be whole since the last look, without their mark."""
        try:
            with open_to_read(self.log) as file:
                file.seek(self.offset)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
