"""`vernier status`: how runs stand, in words; facts are gathered in run_facts, events laid out in event_table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.errors import EXIT_DONE, DataError
from configs.rundir import RunDir
from launcher.event_table import SHOWN, event_rows, print_events, printable
from launcher.run_facts import RunFacts, all_runs, duration, facts_of, find_run, finite, read_events
from launcher.verdict_words import new_table, plus_minus, print_table, say

STYLES = {
    "running": "green",
    "done": "green",
    "failed": "red",
    "died": "red",
    "stopped": "yellow",
    "starting again": "yellow",
}
NAMED = 10  # positions passed over, quarantined checkpoints: so many by name
LABEL = 15  # width of the column of labels


def run_status(runs: list[Path], *, events: bool, all_events: bool, json_out: bool, console: Console) -> int:
    """Prints how runs stand (all of `runs/` where none is named), or what happened in them.

    Raises:
        DataError: what was named is no run directory, or there is no run.
    """
    chosen = [find_run(path) for path in runs] or all_runs()
    if not chosen:
        raise DataError("status: no runs under runs/; name one: vernier status RUN")
    found = []
    for run in chosen:
        found.append(_facts(run))
    if json_out:
        content = [{**facts.to_json(), **({"events": finite(told)} if events else {})} for facts, told in found]
        print(json.dumps(content if len(content) > 1 else content[0], indent=2, allow_nan=False))
    elif events:
        for facts, told in found:
            if len(found) > 1:
                say(console, f"\n{facts.name}", "bold")
            print_events(event_rows(told), console, shown=None if all_events else SHOWN)
    elif len(found) > 1:
        _print_table([facts for facts, _ in found], console)
    else:
        _print_block(found[0][0], console)
    return EXIT_DONE


def _facts(run: RunDir) -> tuple[RunFacts, list[dict[str, Any]]]:
    """(how a run stands, its events); a file that is not as we write it must not hide the other runs."""
    told: list[dict[str, Any]] = []
    try:
        told = [event for event in read_events(run) if isinstance(event.get("detail"), dict)]
        return facts_of(run, told), told
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"cannot be read: {type(error).__name__}: {error}"
        return RunFacts(str(run.path), run.path.name, "unreadable", said), told


def _print_block(facts: RunFacts, console: Console) -> None:
    console.print(Text.assemble((facts.name, "bold"), "  ", (facts.words, _style(facts))), soft_wrap=True)
    for label, said in _lines(facts):
        style = "yellow" if label in ("adapted", "guards", "quarantined", "note") else "none"
        say(console, f"  {label:{LABEL}}{printable(said)}", style)


def _style(facts: RunFacts) -> str:
    return "red" if "silent" in facts.words else STYLES.get(facts.state, "none")


def _lines(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """(label, what it says) of all that is known."""
    if facts.state == "starting again":
        yield "why", facts.why or ""
    elif facts.why is not None or facts.exit_code is not None or facts.ended is not None:
        yield "ended", _end(facts)
    yield "step", _progress(facts)
    if facts.loss is not None:
        yield "loss", f"{facts.loss:.4f} at the last step{_band(facts)}"
    if facts.lr is not None:
        yield "learning rate", f"{facts.lr:.3g}"
    if facts.tokens_per_s is not None and facts.step_s is not None:
        yield "speed", f"{facts.tokens_per_s:,.0f} tokens/s, {facts.step_s:.3g} s a step"
    yield "process", _process(facts)
    yield "checkpoint", _checkpoint(facts)
    yield "scored", _scored(facts)
    if facts.adapted:
        yield "adapted", _adapted(facts.adapted)
    if facts.guards:
        yield "guards", ", ".join(f"{kind} ×{count}" for kind, count in facts.guards.items())
    if facts.quarantined:
        yield "quarantined", _named(facts.quarantined)
    for note in facts.notes:
        yield "note", note


def _end(facts: RunFacts) -> str:
    said = [] if facts.ended is None else [clock(facts.ended)]
    said += [] if facts.why is None else [facts.why]
    said += [] if facts.exit_code is None else [f"exit code {facts.exit_code}"]
    return "; ".join(said)


def _progress(facts: RunFacts) -> str:
    said = f"{facts.step:,}" if facts.steps is None else f"{facts.step:,} of {facts.steps:,}, {facts.percent:.1f} %"
    if facts.seconds_left is not None:
        said += f"; about {duration(facts.seconds_left)} left"
    return said


def _band(facts: RunFacts) -> str:
    if facts.loss_mean is None or facts.loss_se is None:
        return ""
    mean, error = plus_minus(facts.loss_mean, facts.loss_se, signed=False)
    return f"; mean of the last {facts.loss_steps} steps {mean} ± {error} (standard error)"


def _process(facts: RunFacts) -> str:
    said = [] if facts.pid is None else [f"{facts.pid}"]
    said += [] if facts.host is None else [f"on {facts.host}"]
    parts = [" ".join(said)] if said else []
    parts += [] if facts.job is None else [f"job {facts.job}"]
    parts += [] if facts.attempt is None else [f"attempt {facts.attempt}"]
    parts += [] if facts.started is None else [f"since {clock(facts.started)}"]
    return ", ".join(parts) or "–"


def _checkpoint(facts: RunFacts) -> str:
    if facts.checkpoint is None:
        return f"none yet; {facts.step:,} steps would be lost" if facts.step else "none yet"
    lost = facts.steps_to_lose or 0
    if not lost:
        return f"step {facts.checkpoint:,}"
    verb = "are to be made again" if facts.state in ("died", "failed") else "would be lost"
    return f"step {facts.checkpoint:,}; {lost:,} {'step' if lost == 1 else 'steps'} after it {verb}"


def _scored(facts: RunFacts) -> str:
    said = "none yet"
    if facts.scored is not None:
        said = f"step {facts.scored:,}"
        if facts.reference_loss is not None:
            said += f": reference loss {_reference_loss(facts)}"
    if facts.waiting:
        said += f"; {facts.waiting:,} {'snapshot waits' if facts.waiting == 1 else 'snapshots wait'}"
    elif facts.waiting is None:
        said += "; eval.placement is none"
    return said


def _reference_loss(facts: RunFacts) -> str:
    if facts.reference_loss is None:
        return ""
    if facts.reference_se is None:
        return f"{facts.reference_loss:.4f}"
    loss, error = plus_minus(facts.reference_loss, facts.reference_se, signed=False, at_least=4)
    return f"{loss} ± {error}"


def _adapted(found: dict[str, Any]) -> str:
    """What adapted.json says differs from the config."""
    said = []
    if found.get("micro") is not None:
        said.append(f"micro-batches of at most {found['micro']} windows")
    if found.get("gradient_checkpointing"):
        said.append("activations are checkpointed")
    if found.get("passed_over"):
        said.append(f"positions passed over: {_named([str(one) for one in found['passed_over']])}")
    if found.get("returns"):
        said.append(f"went back {found['returns']} times since step {found.get('from_step', 0)}")
    return "; ".join(said) or "nothing"


def _named(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def clock(when: float) -> str:
    """A time of day, here."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _print_table(found: list[RunFacts], console: Console) -> None:
    table = new_table()
    remarks = [_remarks(facts) for facts in found]
    headings = ["run", "state", "step", "%", "loss, last\n50 ± SE", "tokens/s", "left", "check-\npoint", "scored"]
    headings += ["reference\nloss ± SE", "waiting", *([""] if any(remarks) else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "state", "") else "right")
    for facts, remark in zip(found, remarks, strict=True):
        band = ""
        if facts.loss_mean is not None and facts.loss_se is not None:
            band = " ± ".join(plus_minus(facts.loss_mean, facts.loss_se, signed=False))
        table.add_row(
            Text(facts.name),
            Text(facts.words, _style(facts)),
            f"{facts.step:,}" if facts.steps is None else f"{facts.step:,}/{facts.steps:,}",
            "" if facts.percent is None else f"{facts.percent:.1f}",
            band,
            "" if facts.tokens_per_s is None else f"{facts.tokens_per_s:,.0f}",
            "" if facts.seconds_left is None else duration(facts.seconds_left),
            "–" if facts.checkpoint is None else f"{facts.checkpoint:,}",
            "–" if facts.scored is None else f"{facts.scored:,}",
            _reference_loss(facts),
            "" if facts.waiting is None else f"{facts.waiting:,}",
            *([Text(remark)] if any(remarks) else []),
        )
    print_table(table, console)


def _remarks(facts: RunFacts) -> str:
    """What is unusual about a run, short."""
    said = [] if facts.why is None or facts.state == "stopped" else [printable(facts.why)]
    said += [f"{kind} ×{count}" for kind, count in facts.guards.items()]
    said += ["adapted"] if facts.adapted else []
    said += [f"{len(facts.quarantined)} quarantined"] if facts.quarantined else []
    line = "; ".join([*said, *facts.notes])
    return line if len(line) <= 100 else f"{line[:99]}…"
