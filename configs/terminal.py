"""Where people read: ranks run behind torchrun, whose own output goes to a log, and speak to the terminal directly.

`vernier` lends its stderr to them as their stdin, the one stream that torchrun hands on untouched. (Opening the same
file again by its path would not do: two openings of a log overwrite each other's lines.)
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import TextIO, cast

VARIABLE = "VERNIER_TERMINAL"
BESIDE = "VERNIER_STDERR"  # number of the stream that stderr was, where stderr is a rank's log from its first byte


class _Patient(io.TextIOBase):
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def that_may_go(stream: TextIO) -> TextIO:
    """`stream`, but what cannot be said is left unsaid: a terminal that is closed, or a pipe, must end no training."""
    return cast(TextIO, _Patient(stream))


def lend_terminal(environment: dict[str, str]) -> None:
    """Tells processes started with `environment` that their stdin is a terminal (or log) to write to."""
    environment[VARIABLE] = "stdin"


def is_lent(environment: dict[str, str]) -> bool:
    """Whether processes started with `environment` take their stdin for a terminal to write to."""
    return environment.get(VARIABLE) == "stdin"


def is_supervised() -> bool:
    """Whether a `vernier` started this process and watches over it."""
    return VARIABLE in os.environ


def people_descriptor() -> int:
    """The number of the stream that stderr is, or was before the agent made that this rank's log."""
    told = os.environ.get(BESIDE, "")
    return int(told) if told.isdigit() else 2


def lent_terminal() -> TextIO | None:
    """The stream that the `vernier` which started this process has lent it, if any."""
    if os.environ.get(VARIABLE) != "stdin":
        return None
    return that_may_go(os.fdopen(os.dup(0), "w", buffering=1, encoding="utf-8", errors="replace"))
