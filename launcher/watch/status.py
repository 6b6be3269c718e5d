"""`vernier status`: how runs stand, in words; facts are gathered in run_status, events laid out in events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.console import columns_of, printable
from configs.errors import EXIT_DONE, DataError
from configs.run.directory import RunDir
from configs.scheduler import NoAnswer
from launcher.jobs.status import UNKNOWN, SchedulerAnswer, ask_scheduler, described
from launcher.text import duration, new_table, perplexity, plus_minus, print_table, say
from launcher.watch.events import SHOWN, event_rows, print_events
from launcher.watch.next_command import next_command, say_next
from launcher.watch.run_index import find_all, known, remember
from launcher.watch.run_status import RunFacts, all_runs, facts_of, finite, read_events

STYLES = {
    "running": "green",
    "done": "green",
    "failed": "red",
    "died": "red",
    "stopped": "yellow",
    "starting again": "yellow",
    "requeued": "yellow",
}
NAMED = 10  # positions passed over, quarantined checkpoints: so many by name
LABEL = 15  # width of the column of labels
MOST_REMARK = 100  # characters of a remark in a table


def run_status(runs: list[Path], *, events: bool, all_events: bool, json_out: bool, console: Console) -> int:
    """Prints how runs stand, or what happened in them. Where none is named: all of `runs/` here, else all known ones.

    Of a sweep's folder its members are shown. What else is no run is named, and hides none that is.

    Raises:
        DataError: nothing of what was named is a run, or there is no run.
    """
    chosen, odd = _chosen(runs)
    if not chosen:
        raise DataError("status: no runs under runs/, and none is known; name one: vernier status RUN")
    for run in chosen:
        remember(run.path)
    for problem in odd:
        print(f"left out: {printable(problem)}", file=sys.stderr)
    scheduler = ask_scheduler(chosen)
    found = [_facts(run, scheduler) for run in chosen]
    if json_out:
        content = [{**facts.to_json(), **({"events": finite(told)} if events else {})} for facts, told in found]
        print(json.dumps(content if len(content) > 1 else content[0], indent=2, allow_nan=False))
        return EXIT_DONE
    if events:
        for facts, told in found:
            if len(found) > 1:
                say(console, f"\n{facts.name}", "bold")
            print_events(event_rows(told), console, shown=None if all_events else SHOWN)
    elif len(found) > 1:
        _print_table([facts for facts, _ in found], console)
    else:
        _print_block(found[0][0], console)
    if len(found) == 1 and not events:
        say_next(console, next_command(found[0][0]))
    if isinstance(scheduler, NoAnswer):
        say(console, f"Slurm cannot be asked just now: {printable(scheduler.why)}", "yellow")
        say(console, "so this is what the runs' own files say", "yellow")
    return EXIT_DONE


def _chosen(named: list[Path]) -> tuple[list[RunDir], list[str]]:
    """(the runs that are named; what is wrong with what else was)."""
    if not named:
        return all_runs() or [RunDir(path) for path in known()], []
    found: list[RunDir] = []
    odd: list[str] = []
    for path in named:
        try:
            found += find_all(path)
        except DataError as error:
            odd.append(str(error))
    if not found:
        more = f"; nor is any of {len(odd) - 1} others a run" if len(odd) > 1 else ""
        raise DataError(f"{odd[0]}{more}")
    return found, odd


def _facts(run: RunDir, scheduler: SchedulerAnswer) -> tuple[RunFacts, list[dict[str, Any]]]:
    """(how a run stands, its events); a file that is not as we write it must not hide the other runs."""
    told: list[dict[str, Any]] = []
    try:
        told = [event for event in read_events(run) if isinstance(event.get("detail"), dict)]
        return facts_of(run, told, scheduler), told
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"cannot be read: {type(error).__name__}: {error}"
        return RunFacts(str(run.path), run.path.name, "unreadable", said), told


def _print_block(facts: RunFacts, console: Console) -> None:
    words = printable(facts.words)
    console.print(Text.assemble((facts.name, "bold"), "  ", (words, _style(facts))), soft_wrap=True)
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
    for job in facts.jobs:
        yield "job", described(job)
    if facts.requeues:
        yield "queued again", "once" if facts.requeues == 1 else f"{facts.requeues} times"
    if facts.board is not None:
        yield "board", f"{facts.board['url']} on {facts.board['host']}, from your own machine through"
        yield "", facts.board["ssh"]
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
        return (
            f"none yet; {facts.step:,} {'step' if facts.step == 1 else 'steps'} would be lost"
            if facts.step
            else "none yet"
        )
    lost = facts.steps_to_lose or 0
    if not lost:
        return f"step {facts.checkpoint:,}"
    steps, are = ("step", "is") if lost == 1 else ("steps", "are")
    verb = f"{are} to be made again" if facts.state in ("died", "failed") else "would be lost"
    return f"step {facts.checkpoint:,}; {lost:,} {steps} after it {verb}"


def _scored(facts: RunFacts) -> str:
    said = "none yet"
    if facts.scored is not None:
        said = f"step {facts.scored:,}"
        if facts.reference_loss is not None:
            exp = perplexity(facts.reference_loss, facts.unit)
            said += f": reference loss {_reference_loss(facts)}, {f'perplexity {exp}' if exp else facts.unit}"
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
    names = [facts.name for facts in found]
    beneath = columns_of(console.file) is not None  # on a terminal a remark has lines of its own, else the last column
    most = None if beneath else MOST_REMARK
    remarks = [_remarks(facts, most, ambiguous=names.count(facts.name) > 1) for facts in found]
    headings = ["run", "state", "step", "%", "loss, last\n50 ± SE", "tokens/s", "left", "check-\npoint", "scored"]
    in_jobs = any(facts.jobs for facts in found)
    in_table = any(remarks) and not beneath
    headings += ["reference\nloss ± SE", "waiting", *(["jobs"] if in_jobs else []), *([""] if in_table else [])]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "state", "jobs", "") else "right")
    for facts, remark in zip(found, remarks, strict=True):
        more = [*([Text(_short(facts))] if in_jobs else []), *([Text(remark)] if in_table else [])]
        table.add_row(*_cells(facts), *more)
    print_table(table, console, spare=("waiting", "%", "tokens/s", "scored", "check-\npoint", "loss, last\n50 ± SE"))
    for facts, remark in zip(found, remarks, strict=True) if beneath else ():
        if remark:
            say(console, f"  {facts.name}: {remark}", _style(facts))


def _cells(facts: RunFacts) -> Iterator[str | Text]:
    """A run's row, as far as all runs have one."""

    def number(value: float | None, form: str, unknown: str = "") -> str:
        return unknown if value is None else f"{value:{form}}"

    yield Text(facts.name)
    yield Text(printable(facts.words), _style(facts))
    yield f"{facts.step:,}" if facts.steps is None else f"{facts.step:,}/{facts.steps:,}"
    yield number(facts.percent, ".1f")
    known = facts.loss_mean is not None and facts.loss_se is not None
    yield " ± ".join(plus_minus(facts.loss_mean or 0.0, facts.loss_se or 0.0, signed=False)) if known else ""
    yield number(facts.tokens_per_s, ",.0f")
    yield "" if facts.seconds_left is None else duration(facts.seconds_left)
    yield number(facts.checkpoint, ",", "–")
    yield number(facts.scored, ",", "–")
    yield _reference_loss(facts)
    yield number(facts.waiting, ",")


def _short(facts: RunFacts) -> str:
    """A run's jobs in a cell: `12 RUNNING, 13 PENDING`."""
    return ", ".join(
        printable(f"{job['job']} {'?' if job['state'] == UNKNOWN else job['state']}") for job in facts.jobs
    )


def _remarks(facts: RunFacts, most: int | None, *, ambiguous: bool) -> str:
    """What is unusual about a run, short; where it lies, if another has its name."""
    said = [printable(facts.run)] if ambiguous else []
    said += [] if facts.why is None or facts.state == "stopped" else [printable(facts.why)]
    said += [f"{kind} ×{count}" for kind, count in facts.guards.items()]
    said += [f"queued again ×{facts.requeues}"] if facts.requeues else []
    said += ["TensorBoard runs"] if facts.board is not None else []
    said += ["adapted"] if facts.adapted else []
    said += [f"{len(facts.quarantined)} quarantined"] if facts.quarantined else []
    line = "; ".join([*said, *facts.notes])
    return line if most is None or len(line) <= most else f"{line[: most - 1]}…"
