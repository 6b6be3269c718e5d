"""How numbers, times and tables stand for people: digits that the error allows, p-values, durations."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.console import columns_of

WORD = 20  # longest word that a column is kept wide enough for
NATS = "nats per token"  # as eval.tables has it, whose import takes longer


def duration(seconds: float) -> str:
    """A time in words, to two units: `2 h 13 min`."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def typed(path: Path) -> str:
    """A path as one would type it here, quoted for a shell."""
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def perplexity(loss: float, unit: str = NATS) -> str:
    """exp(loss) of a loss in nats per token, to four digits; of a loss in another unit nothing."""
    if unit != NATS:
        return ""
    value = math.exp(min(loss, 700.0))
    return f"{value:,.0f}" if 1000 <= value < 1e9 else f"{value:#.4g}"


def p_words(p: float) -> str:
    """`p = 0.003`, `p = 2e-9`, or `p < 1e-12`, below which only the rounding is told."""
    if p < 1e-12:
        return "p < 1e-12"
    text = f"{p:.1g}"
    return f"p = {text.replace('e-0', 'e-')}"


def plus_minus(value: float, error: float, *, signed: bool = True, at_least: int = 0) -> tuple[str, str]:
    """A value and its error as text: to two digits of the error, and `at_least` so many decimals."""
    decimals = min(12, max(at_least, 1 - math.floor(math.log10(error)))) if error > 0 and math.isfinite(error) else 4
    return f"{value:{'+' if signed else ''}.{decimals}f}", f"{error:.{decimals}f}"


def minus(text: str) -> str:
    """`text` with a minus sign for each hyphen."""
    return text.replace("-", "−")


def signed(value: float, digits: int) -> str:
    """A number of `digits` digits, or whole where it has more than those before the point."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return minus(f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix("."))


def _digits(value: float) -> str:
    return plus_minus(value, value, signed=False)[0]


def gain_words(gain: float) -> str:
    """A factor: whole from 10 on."""
    return f"{gain:,.0f}" if gain >= 10 else f"{gain:.1f}"


def _count(count: int) -> str:
    """1,234,567 in full; from ten million on, three digits and a unit, to keep the table narrow."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size and count >= 10**7:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count:,}"


def new_table() -> Table:
    """An empty table in the style of all of ours."""
    return Table(box=SIMPLE, pad_edge=False, collapse_padding=True, header_style="bold")


def print_table(table: Table, console: Console, *, spare: Sequence[str] = ()) -> None:
    """Prints a table at its own width; rich would cut it to the 80 columns of a pipe.

    On a terminal that is narrower its columns stand closer, then those headed as in `spare` go, the first first, then
    words are folded, and never a number.
    """
    columns = columns_of(console.file)
    if columns is not None and _width(table, console) > columns:
        table.padding, table.show_edge = (0, 0, 0, 0), False
        for heading in spare:
            if _width(table, console) > columns:
                table = _without(table, heading)
        for column in table.columns:
            column.no_wrap, column.overflow = column.justify == "right", "fold"
            words = " ".join(map(str, (column.header, *column.cells))).split() if column.justify == "left" else []
            column.min_width = min(WORD, max(map(len, words), default=0)) or None
    wide = _width(table, console)
    table.width = wide if columns is None else min(wide, columns)
    console.print(table, soft_wrap=columns is None)


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(width=1000)).maximum


def _without(table: Table, heading: str) -> Table:
    """The table without the column that has this heading."""
    kept = [column for column in table.columns if column.header != heading]
    out = new_table()
    out.padding, out.show_edge = table.padding, table.show_edge
    for column in kept:
        out.add_column(column.header, justify=column.justify)
    for row, made in zip(zip(*(column.cells for column in kept), strict=True), table.rows, strict=True):
        out.add_row(*row, style=made.style)
    return out


def say(console: Console, line: str, style: str = "none") -> None:
    """Prints a line as it is, without markup or wrapping."""
    console.print(Text(line, style=style), soft_wrap=True)
