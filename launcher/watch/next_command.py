"""The command that usually follows: said on a terminal alone, after what a verb had to say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from configs.console import columns_of
from configs.run.directory import RunDir
from launcher.text import say, typed

if TYPE_CHECKING:  # most who say what follows need no run's facts
    from launcher.watch.run_status import RunFacts


def say_next(console: Console, *commands: str) -> None:
    """Says what may be typed next; to a pipe or a file nothing."""
    if columns_of(console.file) is not None:
        for at, command in enumerate(commands):
            say(console, f"{'' if at else 'next:':7}vernier {command}", "dim")


def next_command(facts: RunFacts) -> str:
    """What usually follows for a run that stands so."""
    run = RunDir(Path(facts.run))
    name = typed(run.path)
    if facts.state in ("failed", "died"):
        return f"logs {name}"
    if facts.state in ("stopped", "not started") and run.config.is_file():
        return f"train {typed(run.config)}"
    if facts.state == "done":
        return f"compare {name}" if facts.scored is not None else f"board {name}"
    return f"logs {name} --follow"
