"""A run's events for people: what repeats is folded, what went wrong is shown with all that it has to tell."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.console import printable
from launcher.text import say

SHOWN = 50  # rows, unless all are asked for
DETAIL_LINES = 60  # of one event; --json has them all
FOLDED = ("checkpoint", "scored", "skipped")  # a line each where many follow each other
FOLDED_FROM = 4  # of a kind, with nothing but these between
DETAILED = ("hung", "went back", "spike", "out of memory")
GRAVE = (
    "failed",
    "hung",
    "went back",
    "out of memory",
    "save failed",
    "forced",
    "killed",
    "evaluator died",
    "not scored",
)
NOTABLE = (
    *("spike", "skipped", "not shown", "quarantined", "damaged", "replaced"),
    *("started again", "took over", "stopped"),
)


@dataclass(frozen=True)
class EventRow:
    """A line of the table: an event, or several of a kind that were folded into one."""

    time: float
    step: str
    rank: str
    kind: str
    message: str
    detail: tuple[str, ...] = ()


def event_rows(events: Iterable[dict[str, Any]]) -> list[EventRow]:
    """The rows of events in their order; stretches of nothing but bookkeeping have one row a kind."""
    rows: list[EventRow] = []
    stretch: list[dict[str, Any]] = []
    for event in events:
        if event.get("kind") in FOLDED:
            stretch.append(event)
            continue
        rows += _folded(stretch)
        stretch = []
        rows.append(_row(event))
    return rows + _folded(stretch)


def _folded(stretch: list[dict[str, Any]]) -> list[EventRow]:
    rows = []
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in stretch:
        by_kind.setdefault(event["kind"], []).append(event)
    many = {kind: found for kind, found in by_kind.items() if len(found) >= FOLDED_FROM}
    for event in stretch:
        found = many.get(event["kind"])
        if found is None:
            rows.append(_row(event))
        elif event is found[-1]:
            rows.append(_fold(found))
    return rows


def _fold(found: list[dict[str, Any]]) -> EventRow:
    first, last = found[0], found[-1]
    steps = [event["step"] for event in found if event.get("step") is not None]
    message = f"×{len(found)}"
    if first["kind"] == "scored":
        loss = [event.get("detail", {}).get("loss") for event in (first, last)]
        if all(isinstance(one, float) for one in loss):
            message += f", loss {loss[0]:.4f} → {loss[1]:.4f}"
    elif first["kind"] == "skipped":
        message += f"; the last: {printable(str(last.get('message', '')))}"
    step = f"{min(steps)}–{max(steps)}" if steps else ""
    return EventRow(float(last.get("time") or 0), step, _number(last.get("rank")), first["kind"], message)


def _row(event: dict[str, Any]) -> EventRow:
    kind = str(event.get("kind", ""))
    detail = tuple(_detail_lines(event.get("detail"))) if kind in DETAILED else ()
    first, *more = str(event.get("message", "")).splitlines() or [""]
    return EventRow(
        time=float(event.get("time") or 0),
        step=_number(event.get("step")),
        rank=_number(event.get("rank")),
        kind=kind,
        message=printable(first),
        detail=(*(printable(line) for line in more), *detail),
    )


def _number(value: Any) -> str:
    return "" if value is None else str(value)


def _detail_lines(detail: Any) -> Iterator[str]:
    """What an event tells besides, a line a fact; stacks and documents as blocks beneath their name."""
    for key, value in (detail or {}).items():
        name = str(key).replace("_", " ")
        if isinstance(value, list) and any(isinstance(one, str) for one in value):
            value = "\n".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in value)
        elif isinstance(value, dict):
            value = "\n".join(_entry(str(k), v) for k, v in value.items())
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines = text.splitlines() or [""]
        if len(lines) == 1 and not isinstance(value, dict):
            yield printable(f"{name}: {lines[0]}")
        else:
            yield f"{name}:"
            yield from (f"  {printable(line)}" for line in lines)


def _entry(name: str, value: Any) -> str:
    """A rank's stack, say: its name, then its lines beneath."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    lines = text.splitlines()
    return f"{name}: {text}" if len(lines) < 2 else "\n".join([f"{name}:", *(f"  {line}" for line in lines)])


def print_events(rows: list[EventRow], console: Console, *, shown: int | None = SHOWN) -> None:
    """The rows, oldest first; the last `shown` of them (None: all)."""
    left = rows if shown is None else rows[-shown:]
    if len(left) < len(rows):
        say(console, f"… {len(rows) - len(left):,} lines before; --all shows them")
    heading = EventRow(0.0, "step", "rank", "what", "")
    step, rank, kind = (max(len(getattr(row, name)) for row in (heading, *left)) for name in ("step", "rank", "kind"))

    def line(when: str, row: EventRow, style: str) -> Text:
        # No rich table: it would pad every line to the longest message.
        start = f"{when:19}  {row.step:>{step}}  {row.rank:>{rank}}  "
        return Text.assemble(start, (f"{row.kind:{kind}}", style), f"  {row.message}")

    console.print(line("time", heading, "bold"), soft_wrap=True)
    for row in left:
        style = "red" if row.kind in GRAVE else "yellow" if row.kind in NOTABLE else "none"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.time))
        console.print(line(when, row, style), soft_wrap=True)
        for told in row.detail[:DETAIL_LINES]:
            say(console, f"{'':19}    {told}", "dim")
        if len(row.detail) > DETAIL_LINES:
            say(console, f"{'':19}    … {len(row.detail) - DETAIL_LINES} lines more; --json has them all")
