"""Where people read. What a terminal cannot show is shown otherwise, what would steer it is written out, and one that
has gone ends nothing.

Ranks run behind torchrun, whose own output goes to a log, and speak to the terminal directly: `vernier` lends its
stderr to them as their stdin, the one stream that torchrun hands on untouched. (Opening the same file again by its path
would not do: two openings of a log overwrite each other's lines.)
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:  # `vernier --help` must not wait for it
    from rich.console import Console
    from rich.segment import Segment

BESIDE = "VERNIER_STDERR"  # number of the stream that stderr was, where stderr is a rank's log from its first byte
VARIABLE, ENCODING = "VERNIER_TERMINAL", "VERNIER_TERMINAL_ENCODING"
SHOWABLE = "vernier.showable"  # what to do with characters that an encoding has not, as codecs name it
_LABEL = re.compile(r"\s*\S+(?: \S+)*?\s{2,}(?=\S)")
# Signs that numbers are read by, and that not every terminal has.
_PLAIN = {
    "−": "-",
    "–": "-",
    "…": "...",
    "×": "x",
    "±": "+-",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "∞": "inf",
}


def printable(text: str) -> str:
    """`text` with tabs as spaces, and what would steer a terminal (or is half a byte of a name) written as escapes."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text.replace("\t", "    "))


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file's name that is no UTF-8, as Python holds it
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _showable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c) or _escaped(c) for c in error.object[error.start : error.end]), error.end


codecs.register_error(SHOWABLE, _showable)


def columns_of(stream: Any) -> int | None:
    """How many columns the terminal has that a stream is; None for a pipe or a file, whose lines have no end."""
    try:
        if not stream.isatty():
            return None
        told = os.environ.get("COLUMNS", "")
        return int(told) if told.isdigit() and int(told) else os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return None


def is_live(stream: Any) -> bool:
    """Whether lines on a stream can be drawn anew: a terminal that is not a dumb one."""
    return columns_of(stream) is not None and os.environ.get("TERM") != "dumb"


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Says on the terminal what is waited for, and takes it away again. Elsewhere it says nothing.

    It has no thread, so that ranks may be forked meanwhile; what is told meanwhile takes its place.
    """
    stream = sys.stderr
    if not is_live(stream):
        yield
        return
    _no_longer_waiting()
    stream.write(f"{printable(words)} …")
    stream.flush()
    _shown.append(stream)
    try:
        yield
    finally:
        _no_longer_waiting()


_shown: list[Any] = []  # the stream that says what is waited for, if any does
if hasattr(os, "register_at_fork"):  # a rank's own stream is its log
    os.register_at_fork(after_in_child=_shown.clear)


def _no_longer_waiting() -> None:
    while _shown:
        stream = _shown.pop()
        stream.write("\r\x1b[2K")
        stream.flush()


def folded(line: str, columns: int) -> list[tuple[int, int, int]]:
    """(indent, start, stop) of each row that a line takes on a terminal, cut at spaces.

    Rows after the first stand beneath the line's text: behind its label where it has one (`  loss      4.08 at …`),
    else two further in. A word that is longer than a row (a path, a command to copy) is left whole.
    """
    label, margin = _LABEL.match(line), len(line) - len(line.lstrip())
    hang = label.end() if label and label.end() <= columns // 2 else margin if margin > 7 else margin + 2
    rows: list[tuple[int, int, int]] = []
    start, indent = 0, 0
    while len(line) - start > columns - indent:
        word = start + len(line[start:]) - len(line[start:].lstrip())
        cut = line.rfind(" ", word, start + columns - indent + 1)
        cut = cut if cut > word else line.find(" ", word)
        if cut < 0:
            break
        rows.append((indent, start, len(line[:cut].rstrip())))
        start, indent = cut + len(line[cut:]) - len(line[cut:].lstrip()), hang
    return [*rows, (indent, start, len(line))]


def tell(text: str, file: TextIO | None = None) -> None:
    """Prints lines for people, as `printable` makes them; to stdout unless another stream is given."""
    _no_longer_waiting()
    text, columns = _lines(text), columns_of(file or sys.stdout)
    if columns is not None:
        rows = ((line, row) for line in text.split("\n") for row in folded(line, columns))
        text = "\n".join(" " * indent + line[start:stop] for line, (indent, start, stop) in rows)
    print(text, file=file)


def console(file: TextIO | None = None, **options: Any) -> Console:
    """A console of rich's, to stdout unless another stream is given, whose lines are as `printable` makes them."""
    return cast("Console", _console_class()(file=file, **{"highlight": False, **options}))


@cache
def _console_class() -> Any:
    from rich.console import Console
    from rich.segment import Segment
    from rich.text import Text

    class People(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            _no_longer_waiting()
            line, columns = objects[0] if len(objects) == 1 else None, columns_of(self.file)
            if columns is not None and isinstance(line, str | Text):
                if isinstance(line, str):
                    line = Text(line) if options.get("markup") is False else self.render_str(line)
                lines = line.split("\n", allow_blank=True)
                rows = [(one, row) for one in lines for row in folded(one.plain, columns)]
                objects = (Text("\n").join(Text(" " * i) + one[start:stop] for one, (i, start, stop) in rows),)
                options["soft_wrap"] = True
            super().print(*objects, **options)

        def render(self, *what: Any, **options: Any) -> Iterable[Segment]:
            for one in super().render(*what, **options):
                yield one if one.control else Segment(_lines(one.text), one.style)

    return People


class _Patient(io.TextIOBase):
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


def that_may_go(stream: TextIO) -> TextIO:
    """`stream`, but what cannot be said is left unsaid: a terminal that is closed, or a pipe, must end no training."""
    return stream if isinstance(stream, _Patient) else cast(TextIO, _Patient(stream))


def open_streams(*, log: bool = False) -> None:
    """Makes stdout and stderr fit to be written to, whatever they are. To be called first by all that starts.

    Args:
        log: both go to a log: it is UTF-8, and what there is no room for is left out of it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started us (`2>&-`); the next file opened would take its place
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(number, "w", buffering=1, closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8" if log else None, errors=SHOWABLE)
        setattr(sys, name, that_may_go(stream) if log or name == "stderr" else stream)


def lend_terminal(environment: dict[str, str]) -> None:
    """Tells processes started with `environment` that their stdin is a terminal (or log) to write to."""
    environment[VARIABLE], environment[ENCODING] = "stdin", sys.stderr.encoding or "utf-8"


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
    return open_terminal(0, os.environ.get(ENCODING, "utf-8"))


def open_terminal(number: int, encoding: str) -> TextIO:
    """A stream to people on a copy of an open file."""
    return that_may_go(os.fdopen(os.dup(number), "w", buffering=1, encoding=encoding, errors=SHOWABLE))
