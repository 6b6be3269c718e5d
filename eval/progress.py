"""How far long work is, on a terminal: one look for all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from configs.console import console, is_live, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ROOMY = 100  # columns from which on a bar is drawn long
PLAIN_S = 5.0  # between two lines where there is no terminal
LIVE_S = 0.1


def progress_bar(people: Console, *fields: str) -> Progress:
    """A bar with what is done and to do, `fields` (rich's templates) behind it, and the time left. Not started.

    It has no thread: it is drawn by `refresh`, so that whoever draws it may fork.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        BarColumn(bar_width=24 if people.width >= ROOMY else 10),
        *(TextColumn(field) for field in fields),
        TimeRemainingColumn(),
        console=people,
        auto_refresh=False,
        redirect_stdout=False,  # what libraries print belongs into the log
        redirect_stderr=False,
    )


class Phases:
    """Work in phases, each with a count: bars on a terminal, elsewhere a line as each begins and every few seconds."""

    def __init__(self, stream: Any, plain: Callable[[str, int, int], str | None]) -> None:
        """
        Args:
            plain: the line where there is no terminal, of (phase, done, to do); None for no line.
        """
        self.people, self._plain = console(stream), plain
        self._bar = progress_bar(self.people) if is_live(stream) else None
        self._task: Any = None
        self._name, self._told, self._drawn = "", 0.0, 0.0

    def __enter__(self) -> Phases:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.refresh()
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.people.print(line, markup=False, soft_wrap=True)

    def __call__(self, name: str, done: int, to_do: int = 0) -> None:
        """`done` of `to_do` (0: not known) of the phase `name`."""
        now, new = time.monotonic(), name != self._name
        self._name = name
        if self._bar is None:
            line = self._plain(name, done, to_do) if new or now - self._told > PLAIN_S else None
            if line is not None:
                self._told = now
                self.say(line)
            return
        if self._task is None:
            self._bar.start()
        if new:
            self._finish()
            self._task = self._bar.add_task(printable(name), total=to_do or None)
        self._bar.update(self._task, completed=done, total=to_do or None)
        if new or now - self._drawn > LIVE_S or done == to_do:
            self._drawn = now
            self._bar.refresh()

    def _finish(self) -> None:
        """Fills the bar of the phase before."""
        if self._bar is not None and self._task is not None:
            made = self._bar.tasks[-1]
            total = made.total or made.completed
            self._bar.update(self._task, total=total, completed=total)
