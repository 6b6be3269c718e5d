"""How a run stands, read from its directory alone: quickly, without torch, and however long the run is.

Nothing is written, no process is asked (what a scheduler says is handed in); the only lock that is tried is let go of
at once.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import DataError
from configs.files.atomic import read_json
from configs.files.opening import read_bytes
from configs.run.directory import RunDir, is_locked
from configs.run.last_words import tail_lines
from configs.run.script_ends import script_end
from eval.scored import loss_tables
from launcher.jobs.log import DAMAGED, read_jobs
from launcher.jobs.status import RunJobs, SchedulerAnswer, jobs_of
from launcher.text import NATS
from launcher.watch.run_index import is_run, is_sweep, members_of
from launcher.watch.standing import WITH_CHECKPOINT, Observed, Standing, standing
from launcher.watch.tensorboard import live_board
from trainer.faults.lock import holder

BAND = 50  # steps
EVENTS_BYTES = 16 << 20  # of events.jsonl, from its end: what a run has to tell fits many times
GUARDS = (
    "skipped",
    "spike",
    "went back",
    "out of memory",
    "hung",
    "save failed",
    "started again",
    "took over",
    "forced",
    "killed",
    "evaluator died",
    "not scored",
)


@dataclass(frozen=True)
class RunFacts:
    """How a run stands. Losses are in nats per token, times in seconds (since the epoch, where they are of the day)."""

    run: str
    name: str
    state: str  # not started, pending, running, stopping, starting again, stopped, requeued, done, failed, died
    words: str
    step: int = 0
    steps: int | None = None
    percent: float | None = None
    loss: float | None = None  # of the last step
    loss_mean: float | None = None  # of the last `loss_steps` training losses that are finite
    loss_se: float | None = None  # of that mean, as if steps were independent
    loss_steps: int = 0
    lr: float | None = None
    tokens_per_s: float | None = None  # over the same steps
    step_s: float | None = None  # their median
    seconds_left: float | None = None
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    attempt: int | None = None
    started: float | None = None  # the last attempt
    ended: float | None = None
    silent_s: float | None = None  # since the last sign of life
    checkpoint: int | None = None  # step of the last whole one
    steps_to_lose: int | None = None  # made since
    scored: int | None = None  # step of the last snapshot that has its loss table
    reference_loss: float | None = None
    unit: str = NATS  # of the reference loss
    reference_se: float | None = None  # clustered by document
    waiting: int | None = None  # snapshots that are not scored yet; None where nobody scores
    why: str | None = None  # it has ended
    exit_code: int | None = None
    adapted: dict[str, Any] | None = None
    guards: dict[str, int] = field(default_factory=dict)
    quarantined: list[str] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)  # component, job, state, reason, nodes, restarts, …
    requeues: int = 0
    board: dict[str, Any] | None = None  # TensorBoard inside the job, where that runs: host, port, url, ssh, …
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it, as `finite` has it."""
        return dict(finite(asdict(self)))


def finite(value: Any) -> Any:
    """`value` with null for each number in it that is not finite: JSON has no word for those."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def all_runs(below: Path = Path("runs")) -> list[RunDir]:
    """The runs in a folder, by name; of a sweep there its members."""
    found: list[RunDir] = []
    for path in sorted(below.iterdir()) if below.is_dir() else ():
        with suppress(OSError, DataError):  # what cannot be read hides no other run
            if path.name.startswith("."):
                continue
            if is_run(path):
                found.append(RunDir(path))
            elif is_sweep(path):
                found += members_of(path)
    return found


def read_events(run: RunDir) -> list[dict[str, Any]]:
    """The run's events, oldest first; of a very long file the last."""
    return tail_lines(run.events, most_bytes=EVENTS_BYTES)


def facts_of(run: RunDir, events: list[dict[str, Any]] | None = None, told: SchedulerAnswer = None) -> RunFacts:
    """How a run stands now.

    Args:
        events: as `read_events` gives them, where they are at hand.
        told: what the scheduler says of its jobs (`jobs.status.ask_scheduler`).
    """
    events = read_events(run) if events is None else events
    now, state, lock = time.time(), run.read_state(), holder(run)
    settings, notes = _settings(run)
    noted = read_jobs(run)
    jobs, heard = jobs_of(noted, told), run.heard(state)
    host = lock.get("host") or state.get("host")
    held, elsewhere = run.is_held() or is_locked(run.starter), host not in (None, socket.gethostname())
    stands = standing(Observed(state, jobs, held=held, elsewhere=elsewhere, silent_s=now - heard))
    made = [line for line in tail_lines(run.metrics, count=BAND) if isinstance(line.get("step"), int)]
    step = int(made[-1]["step"] if made else state.get("step") or 0)
    saved = _saved(run, step)
    notes += _notes(run, noted, jobs, stands.word)
    return RunFacts(
        run=str(run.path),
        name=run.path.absolute().name,
        state=stands.word,
        words=_words(stands, saved),
        why=stands.why or _ended_by(state),
        host=host,
        pid=lock.get("pid"),
        job=lock.get("job") or state.get("job"),
        attempt=lock.get("attempt") or state.get("attempt"),
        started=_last_time(events, "started"),
        ended=_ended(stands.word, state, events, heard),
        silent_s=now - heard if heard else None,
        exit_code=None if stands.word in ("pending", "running", "requeued") else state.get("exit_code"),
        adapted=_adapted(run, notes),
        guards={kind: n for kind in GUARDS if (n := sum(event.get("kind") == kind for event in events))},
        quarantined=sorted(p.name for p in run.quarantine.iterdir()) if run.quarantine.is_dir() else [],
        jobs=jobs.jobs,
        requeues=jobs.requeues,
        board=live_board(run, told, jobs.login),
        notes=notes,
        **saved,
        **_progress(made, step, state.get("steps") or settings.get("steps"), running=stands.word == "running"),
        **_scores(run, settings, events),
    )


def _words(stands: Standing, saved: dict[str, Any]) -> str:
    """In words; a run that lost the steps since its checkpoint was not stopped with one."""
    if stands.words != WITH_CHECKPOINT or (saved["checkpoint"] is not None and not saved["steps_to_lose"]):
        return stands.words
    which = "its first checkpoint" if saved["checkpoint"] is None else "a checkpoint of its last steps"
    return f"stopped before {which}"


def _saved(run: RunDir, step: int) -> dict[str, Any]:
    whole = run.whole_steps(run.checkpoints)
    last = whole[-1] if whole else None
    return {"checkpoint": last, "steps_to_lose": max(0, step - (last or 0))}


def _progress(made: list[dict[str, Any]], step: int, steps: int | None, *, running: bool) -> dict[str, Any]:
    """How far it is, how fast, and the loss of its last steps."""
    tokens_per_s, step_s = _speed(made)
    return {
        "step": step,
        "steps": steps,
        "percent": 100 * step / steps if steps else None,
        "lr": made[-1].get("lr") if made else None,
        "tokens_per_s": tokens_per_s,
        "step_s": step_s,
        "seconds_left": step_s * (steps - step) if running and steps and step_s else None,
        **_band(made),
    }


def _notes(run: RunDir, noted: list[dict[str, Any]], jobs: RunJobs, word: str) -> list[str]:
    """What else is to be said of it: damaged files, evaluators that could not start, requests that wait."""
    notes = [line["why"] for line in noted if line.get("kind") == DAMAGED]
    try:
        run.check_state()
    except DataError as error:
        notes.append(str(error))
    for job in jobs.jobs:
        end = script_end(run.path, "eval", job["job"]) if job["component"] == "eval" else None
        notes += [f"the evaluator's job {job['job']}: {end['error']}"] if end else []
    if word == "running":
        notes += [f"asked to {what}" for what, file in _requests(run) if file.exists()]
    return notes


def _requests(run: RunDir) -> tuple[tuple[str, Path], ...]:
    return ("stop", run.stop_request), ("save", run.save_request)


def _settings(run: RunDir) -> tuple[dict[str, Any], list[str]]:
    """(the run's settings, what is wrong with them). What `vernier` was given stands in before the trainer writes.

    As they stand: they were checked when they were written, and loading what checks them takes longer than all else.
    `dump_config` wrote them, so that this faster reader takes them for the same.
    """
    path = run.config if run.config.is_file() else run.path / "train-config.yaml"
    try:
        found = yaml.load(read_bytes(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return (found, []) if isinstance(found, dict) else ({}, [f"{path.name} cannot be read"])


def _ended_by(state: dict[str, Any]) -> str | None:
    """The setting that ended a run before its last step, and why."""
    ended = state.get("ended_by")
    return f"{ended.get('key')}: {ended.get('why')}" if ended and state.get("state") == "done" else None


def _ended(word: str, state: dict[str, Any], events: list[dict[str, Any]], heard: float) -> float | None:
    kind = {"done": "done", "stopped": "stopped", "failed": "failed"}.get(word)
    if word == "died":
        return heard or None
    if kind is None:
        return None
    failure = state.get("failure")
    return (failure.get("time") if isinstance(failure, dict) else None) or _last_time(events, kind)


def _last_time(events: list[dict[str, Any]], kind: str) -> float | None:
    return next((event.get("time") for event in reversed(events) if event.get("kind") == kind), None)


def _band(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last loss, and the mean of the last ones with sd/√n, its standard error as if steps were independent."""
    if not lines:
        return {}
    values = [line["loss"] for line in lines if math.isfinite(line.get("loss") or math.nan)]
    many = len(values) > 1
    return {
        "loss": lines[-1].get("loss"),
        "loss_mean": statistics.fmean(values) if values else None,
        "loss_se": statistics.stdev(values) / math.sqrt(len(values)) if many else None,
        "loss_steps": len(values),
    }


def _speed(lines: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """(tokens a second, median seconds a step)."""
    timed = [
        (line["step_s"], line["tokens_per_s"]) for line in lines if line.get("step_s") and line.get("tokens_per_s")
    ]
    if not timed:
        return None, None
    tokens = sum(step_s * rate for step_s, rate in timed)
    return tokens / sum(step_s for step_s, _ in timed), statistics.median(step_s for step_s, _ in timed)


def _scores(run: RunDir, settings: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """Step of the last scored snapshot, its loss, its standard error, how many snapshots wait to be scored."""
    asked = settings.get("eval") or {}
    tables = _tables(run, settings, asked)
    refused = {event.get("step") for event in events if event.get("kind") == "not scored"}
    waiting = None
    if asked.get("placement") != "none":
        waiting = sum(s not in tables and s not in refused for s in run.whole_steps(run.snapshots))
    if not tables:
        return {"waiting": waiting}
    last = max(tables)
    for event in reversed(events):
        detail = event.get("detail") or {}
        if event.get("kind") == "scored" and event.get("step") == last and detail.get("se") is not None:
            known = {"reference_loss": detail.get("loss"), "reference_se": detail["se"]}
            known |= {"unit": detail["unit"]} if "unit" in detail else {}
            return {"scored": last, **known, "waiting": waiting}
    from eval.tables import read_mean_loss

    loss = None
    with suppress(DataError):
        loss = read_mean_loss(tables[last])[0]
    return {"scored": last, "reference_loss": loss, "waiting": waiting}


def _tables(run: RunDir, settings: dict[str, Any], asked: dict[str, Any]) -> dict[int, Path]:
    """The loss tables of the run's steps, as its own evaluator writes them; all where its settings cannot be read."""
    data = (settings.get("data") or {}).get("dir")
    reference = asked.get("reference") or (data and f"{data}/reference")
    try:
        return loss_tables(run, Path(reference) if reference else None, asked.get("dtype"))
    except DataError:  # the data was moved away: the tables tell nevertheless
        return loss_tables(run, None, asked.get("dtype"))


def _adapted(run: RunDir, notes: list[str]) -> dict[str, Any] | None:
    path = run.path / "adapted.json"
    if not path.is_file():
        return None
    try:
        return dict(read_json(path))
    except (DataError, TypeError, ValueError):
        notes.append("adapted.json cannot be read")
        return None
