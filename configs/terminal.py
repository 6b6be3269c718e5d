"""Where people read: ranks run behind torchrun, whose own output goes to a log, and speak to this terminal directly."""

from __future__ import annotations

import os
from typing import TextIO

_VARIABLE = "VERNIER_CONSOLE"


def lend_terminal(environment: dict[str, str], stream: TextIO) -> None:
    """Tells processes started with `environment` to speak to `stream` of this process."""
    environment[_VARIABLE] = f"/proc/{os.getpid()}/fd/{stream.fileno()}"


def lent_terminal() -> TextIO | None:
    """The stream that the `vernier` which started this process has lent it, if any."""
    where = os.environ.get(_VARIABLE)
    if where is None:
        return None
    try:
        return open(where, "a", buffering=1, encoding="utf-8", errors="replace")
    except OSError:  # a socket cannot be opened by path; torchrun's log then has the lines
        return None
