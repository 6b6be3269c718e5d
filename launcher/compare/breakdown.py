"""Breakdowns of a comparison, and what changed most, in tables and words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from launcher.text import new_table, p_words, plus_minus, print_table, say

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.breakdown import Breakdown, Row
    from eval.compare.most_changed import Change, Changed

ALPHA = 0.05
SHOWN_TEXT = 100  # characters of a text on the terminal; --json has more


def print_breakdown(found: Breakdown, console: Console) -> None:
    """A row for each part of the set, then the notes."""
    say(console, f"\nby {found.by}, {found.b} against {found.a}:")
    table = new_table()
    headings = (found.by, "documents", "tokens", "loss A", "loss B", "change, %", "95 %", "p, Holm", "win\nrate")
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left")
    for row in found.rows:
        change, _ = plus_minus(row.percent, row.se_percent)
        table.add_row(
            Text(row.label),
            f"{row.documents:,}",
            f"{row.tokens:,}",
            f"{row.loss_a:.4f}",
            f"{row.loss_b:.4f}",
            Text(change.replace("-", "−"), _style(row)),
            _interval(row),
            p_words(row.p_holm).removeprefix("p ").removeprefix("= "),
            f"{100 * row.win_rate:.0f} %",
        )
    print_table(table, console)
    for note in (*found.notes, f"p adjusted for the {len(found.rows)} rows; errors clustered by document"):
        say(console, f"  {note}")


def _style(row: Row) -> str:
    if row.p_holm >= ALPHA:
        return "none"
    return "green" if row.percent < 0 else "red"


def _interval(row: Row) -> str:
    decimals = len(plus_minus(row.percent, row.se_percent)[0].partition(".")[2])
    bounds = [f"{x:+.{decimals}f}" if math.isfinite(x) else ("∞" if x > 0 else "-∞") for x in row.ci95]
    return f"[{', '.join(bounds)}]".replace("-", "−")


def print_changed(found: Changed, console: Console) -> None:
    """Samples, then documents: those whose loss fell most and those whose loss rose most, with their text."""
    for what, fell, rose in (
        ("samples", found.samples_fell, found.samples_rose),
        ("documents", found.documents_fell, found.documents_rose),
    ):
        for word, changes in (("fell", fell), ("rose", rose)):
            _print_changes(f"\n{what} whose loss {word} most, {found.a} → {found.b}:", word, what, changes, console)
    say(console, "  nats per token; picked for being extreme, so look at them, but test nothing on them")


def _print_changes(title: str, word: str, what: str, changes: tuple[Change, ...], console: Console) -> None:
    if not changes:
        say(console, f"\nno {what} whose loss {word}")
        return
    say(console, title)
    table = new_table()
    for heading in ("change", "before", "after", "tokens", what.removesuffix("s"), "source and text"):
        table.add_column(heading, justify="left" if heading.startswith("source") else "right")
    for one in changes:
        table.add_row(
            Text(f"{one.change:+.4f}".replace("-", "−"), "green" if one.change < 0 else "red"),
            f"{one.loss_a:.4f}",
            f"{one.loss_b:.4f}",
            f"{one.tokens:,}",
            str(one.document if one.sample is None else one.sample),
            Text(f"{_on_a_line(one.source)}: {_shown(one.text)}"),
        )
    print_table(table, console)


def _shown(text: str) -> str:
    """A text on one line."""
    line = _on_a_line(text)
    return line if len(line) <= SHOWN_TEXT else f"{line[: SHOWN_TEXT - 1]}…"


def _on_a_line(text: str) -> str:
    """`text` with newlines, tabs and what would steer a terminal written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\\", "\\\\"))
