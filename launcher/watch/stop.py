"""`vernier stop`: asks a run for a checkpoint and a clean end, wherever it runs, and waits for its last word.

With less patience its jobs are cancelled, or the process here that has it is signalled: killed anywhere, a run goes on.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.console import printable
from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError, DataError, VernierError
from configs.files.atomic import read_json, write_atomic
from configs.run.directory import RunDir, is_locked
from configs.scheduler import NoAnswer
from launcher.jobs.log import add_job
from launcher.jobs.plan import SAVE_PATIENCE_S
from launcher.jobs.status import UNKNOWN, WAITING, SchedulerAnswer, ask_scheduler, described, is_active, is_unanswered
from launcher.text import duration, say
from launcher.watch.run_index import find_all
from launcher.watch.run_status import RunFacts, facts_of
from trainer.faults.lock import FRESH_S, kept_free
from trainer.stop_requests import ONE_WISH_S

PATIENCE_S = SAVE_PATIENCE_S + 60.0
NOW_S = 5.0  # for a step and its checkpoint, where patience is short
JOB_DYING_S = 150.0  # Slurm waits KillWait (30 s unless a site says otherwise) between its signals, then clears up
RANKS_DYING_S = 60.0
UNANSWERED_S = 20.0  # for Slurm to answer after all, where nobody else is heard of
STARTING_S = 60.0  # from taking the run to saying so in its state
LOOK_S, ASK_S, REMIND_S = 1.0, 5.0, 30.0
WORKING = ("running", "pending", "requeued", "stopping")


@dataclass
class Watch:
    """A run that is to stop, as it is seen from here."""

    run: RunDir
    console: Console
    told: SchedulerAnswer = None
    asked: float = -1e9
    said: str = ""
    reminded: float = field(default_factory=time.monotonic)

    def look(self, *, anew: bool = False) -> RunFacts:
        """How the run stands; the scheduler is asked now and then.

        Raises:
            DataError: its directory cannot be read.
        """
        now = time.monotonic()
        if anew or now - self.asked >= ASK_S:
            self.told, self.asked = ask_scheduler([self.run]), now
        try:
            return facts_of(self.run, told=self.told)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{self.run.path}: cannot be read ({type(error).__name__}: {error})") from None

    def tell(self, line: str, style: str = "none") -> None:
        """Says a line, once."""
        if line != self.said:
            say(self.console, printable(line), style)
            self.said, self.reminded = line, time.monotonic()

    def wait(self, over: Callable[[RunFacts], bool], patience_s: float, line: str) -> RunFacts | None:
        """How the run stands once it is `over`; None where that takes too long. Says what it waits for."""
        deadline = time.monotonic() + patience_s
        self.tell(line)
        while True:
            facts = self.look()
            if over(facts):
                return facts
            if time.monotonic() > deadline:
                return None
            if time.monotonic() - self.reminded > REMIND_S:
                self.said = ""
                heard = "" if facts.silent_s is None else f", last heard of {duration(facts.silent_s)} ago"
                self.tell(f"still waiting: {facts.words}, step {facts.step:,}{heard}")
            time.sleep(LOOK_S)


def run_stop(named: Path, *, now: bool, console: Console) -> int:
    """Stops a run, or all members of a sweep; gives 0 where they have stopped or were not running, 1 where one has not
    in time.

    Args:
        now: with little patience for a checkpoint.

    Raises:
        ConfigError: there is no such run, or what runs it cannot be reached from here.
    """
    runs = find_all(named)
    return _stop(runs[0], now=now, console=console) if len(runs) == 1 else _stop_sweep(runs, now=now, console=console)


def _stop_sweep(members: list[RunDir], *, now: bool, console: Console) -> int:
    told = ask_scheduler(members)
    working: list[RunDir] = []
    waiting: list[str] = []
    for run in members:
        facts = Watch(run, console, told, time.monotonic()).look()
        if at_work(run, facts):
            working.append(run)
            waiting += [job["job"] for job in facts.jobs if job["state"] in WAITING]
    if not working:
        say(console, f"none of the {len(members)} members is running")
        return EXIT_DONE
    # All are asked before any is waited for: else the end of one would let the next begin.
    for run in working:
        _ask(run, now=now)
    cancel(waiting, pending=True)
    worst = EXIT_DONE
    for run in working:
        try:
            code = _stop(run, now=now, console=console)
        except VernierError as error:  # the others are stopped all the same
            say(console, printable(f"error: {error}"), "red")
            code = error.exit_code
        if code == EXIT_INTERRUPTED:
            return code
        worst = max(worst, code)
    return worst


def _stop(run: RunDir, *, now: bool, console: Console) -> int:
    watch = Watch(run, console)
    facts = watch.look(anew=True)
    name = facts.name
    if facts.state == "not started" and is_locked(run.starter):  # its first seconds: STOP would be cleared away
        begun = watch.wait(
            lambda facts: facts.state != "not started" or not is_locked(run.starter), STARTING_S, f"{name}: it starts"
        )
        facts = begun or facts
    if not at_work(run, facts):
        return _not_running(watch, facts, now=now)
    try:
        _ask(run, now=now)
        unanswered = _tell_unanswered(watch, facts)
        cancel([job["job"] for job in facts.jobs if job["state"] in WAITING], pending=True)

        def over(facts: RunFacts) -> bool:
            # One that was being queued again when it was asked waits only now.
            waits = [job["job"] for job in facts.jobs if job["state"] in WAITING and "train" in job["component"]]
            if waits:
                cancel(waits, pending=True)
            return _over(run, facts)

        done = watch.wait(
            over,
            NOW_S if now else UNANSWERED_S if unanswered and not _is_heard(run, facts) else PATIENCE_S,
            f"{name}: {_waits_for(facts)}",
        )
        if done is None and now:
            done = _end(watch)
    except KeyboardInterrupt:
        watch.tell(f"not waiting any longer; {name} stops by itself, and `vernier status` says when it has")
        return EXIT_INTERRUPTED
    if done is None:
        facts = watch.look(anew=True)
        hint = "; --now ends it without its checkpoint" if not now else ""
        if isinstance(watch.told, NoAnswer) and not _is_heard(run, facts):
            hint = "; ask again when Slurm answers"
        watch.tell(f"{name} has not stopped yet: {facts.words}, step {facts.step:,}{hint}", "red")
        return EXIT_FAILED
    run.stop_request.unlink(missing_ok=True)
    _say_end(watch, done)
    return EXIT_FAILED if done.state in ("failed", "died") and not now else EXIT_DONE


def at_work(run: RunDir, facts: RunFacts) -> bool:
    """Whether there is something to stop: ranks that train, or a job that is to."""
    unknown = facts.state == "not started" and any(map(is_unanswered, facts.jobs))
    return facts.state in WORKING or run.is_held() or _restarts(facts) or unknown


def _tell_unanswered(watch: Watch, facts: RunFacts) -> bool:
    """Whether nobody knows of the training's job. It is taken out of the queue all the same, where that can be had."""
    jobs = [job["job"] for job in facts.jobs if is_unanswered(job)]
    if not jobs:
        return False
    why = f" ({printable(watch.told.why)})" if isinstance(watch.told, NoAnswer) else ""
    watch.tell(f"Slurm cannot be asked just now{why}")
    watch.tell("a job that waits stays in the queue, and ends as soon as it starts")
    with suppress(ConfigError):  # said already
        cancel(jobs, pending=True)
    return True


def _is_heard(run: RunDir, facts: RunFacts) -> bool:
    """Whether somebody trains who will read the wish to stop: a lock that is held, or a heart that beats."""
    return run.is_held() or (facts.silent_s is not None and facts.silent_s < FRESH_S and facts.state == "running")


def _restarts(facts: RunFacts) -> bool:
    return facts.words == "starting again"


def _active(facts: RunFacts, component: str = "") -> list[dict[str, Any]]:
    return [job for job in facts.jobs if is_active(job) and component in job["component"]]


def _over(run: RunDir, facts: RunFacts) -> bool:
    """Whether the run has said its last word; says it for one that has nobody left to."""
    if _restarts(facts) or run.is_held():
        return False
    if not run.stop_request.is_file() and facts.state in WORKING:
        _write_stop(run)  # a start that came between has cleared it away
    train = next((job for job in facts.jobs if "train" in job["component"]), None)
    unsaid = run.read_state().get("exit_code") is None and not is_locked(run.starter)
    if unsaid and train is not None and train["state"] != UNKNOWN and not is_active(train):
        return _say_last_word(run, facts)
    return facts.state not in WORKING


def _say_last_word(run: RunDir, facts: RunFacts) -> bool:
    """Writes that a run is stopped whose job has gone without doing so: taken out of the queue, or killed."""
    try:
        with kept_free(run):
            run.write_state("stopping", exit_code=EXIT_STOPPED, again=None, failure=None)
            run.add_event("stopped", f"at step {facts.step}, by the end of its job", step=facts.step)
    except ConfigError:  # a trainer has it, or a heart on a node that was lost may yet beat
        return False
    except VernierError:  # no room on the disk: `status` knows by the job
        return True
    return True


def _ask(run: RunDir, *, now: bool) -> None:
    try:
        if run.jobs.is_file():  # first, since the job's script reads it once the ranks have ended
            add_job(run, "stop asked", host=socket.gethostname(), now=now)
        _write_stop(run)
    except OSError as error:
        if not now:
            raise ConfigError(f"{run.stop_request}: cannot be written ({error.strerror}); --now does without") from None


def _write_stop(run: RunDir) -> None:
    write_atomic(run.stop_request, "stop")


def _waits_for(facts: RunFacts) -> str:
    if facts.state == "running" and "silent" not in facts.words:
        return f"asked to stop at step {facts.step:,}; waiting for the end of the step and its checkpoint"
    if any(job["state"] in WAITING for job in facts.jobs if "train" in job["component"]):
        return "it waits in the queue; taking it out"
    return f"asked to stop ({facts.words})"


def cancel(jobs: list[str], *, pending: bool) -> None:
    """Cancels jobs of Slurm; if `pending` only those that still wait: one that has just begun hears of STOP instead.

    Raises:
        ConfigError: Slurm cannot be reached, or refuses.
    """
    if not jobs:
        return
    if shutil.which("scancel") is None:
        raise ConfigError(
            f"scancel is not on this machine's PATH; run this where jobs {', '.join(jobs)} can be cancelled"
        )
    command = ["scancel", *(["--state=PENDING"] if pending else []), *jobs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"scancel {' '.join(jobs)}: Slurm does not answer") from None
    if done.returncode != 0 and "already completing" not in done.stderr and "Invalid job id" not in done.stderr:
        raise ConfigError(f"scancel {' '.join(jobs)}: {printable(done.stderr.strip())}")


def _end(watch: Watch) -> RunFacts | None:
    """Ends what has not stopped by itself: its jobs, or the processes here."""
    run, facts = watch.run, watch.look(anew=True)
    jobs = [job["job"] for job in _active(facts)]
    if jobs:
        watch.tell(f"cancelling {' and '.join(described(job) for job in _active(facts))}")
        cancel(jobs, pending=False)
        return watch.wait(
            lambda facts: not _active(facts) and _over(run, facts), JOB_DYING_S, "waiting for Slurm to end it"
        )
    pid = trainer_here(run)
    if pid is None:
        where = "" if facts.host is None else f" on {facts.host}"
        job = "" if facts.job is None else f" in job {facts.job}"
        raise ConfigError(f"{facts.name}: what trains it{where}{job} cannot be signalled from here; STOP is asked for")
    # The first is the same wish as STOP; its like, later, is a wish to end now (trainer.stop_requests).
    for patience_s, number in ((ONE_WISH_S + 1.5, signal.SIGTERM), (RANKS_DYING_S / 2, signal.SIGTERM)):
        done = _signal(watch, pid, number, patience_s)
        if done is not None:
            return done
    return _signal(watch, trainer_here(run) or pid, signal.SIGKILL, RANKS_DYING_S / 2)


def _signal(watch: Watch, pid: int, number: signal.Signals, patience_s: float) -> RunFacts | None:
    run = watch.run
    if trainer_here(run) == pid:
        with suppress(ProcessLookupError):
            try:
                os.kill(pid, number)
            except PermissionError:
                raise ConfigError(f"process {pid}, which trains {run.path}, is another user's") from None
    return watch.wait(
        lambda facts: not is_locked(run.starter) and _over(run, facts), patience_s, f"{number.name} to process {pid}"
    )


def trainer_here(run: RunDir) -> int | None:
    """The process on this machine that has the run: `vernier train`, else rank 0. None where neither is here.

    Checked by the lock's file, which that very process must have open: a number alone may be anybody's by now.
    """
    for path in (run.starter, run.lock):
        if not is_locked(path):
            continue
        with suppress(DataError, AttributeError, TypeError, ValueError):
            found = read_json(path)
            if found.get("host") == socket.gethostname() and _has_open(int(found["pid"]), path):
                return int(found["pid"])
    return None


def _has_open(pid: int, path: Path) -> bool:
    with suppress(OSError):
        wanted = path.stat()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(link.stat(), wanted):
                    return True
    return False


def _not_running(watch: Watch, facts: RunFacts, *, now: bool) -> int:
    scoring, starter = _active(facts, "eval"), trainer_here(watch.run)
    watch.tell(f"{facts.name} is not running: {facts.words}{'' if facts.why is None else f' ({facts.why})'}")
    for job in (job for job in facts.jobs if is_unanswered(job) and "eval" in job["component"]):
        if now:
            cancel([job["job"]], pending=False)
        watch.tell(f"whether its evaluator still waits or runs is not known: {described(job)}")
    for job in scoring:
        if now:
            cancel([job["job"]], pending=False)
            watch.tell(f"cancelled its evaluator's job {job['job']}")
        else:
            watch.tell(f"its evaluator ends by itself once all is scored: {described(job)}")
    if starter is not None and now:
        os.kill(starter, signal.SIGTERM)
        watch.tell(f"asked process {starter} to score no further")
    elif starter is not None:
        watch.tell(f"process {starter} ends by itself once all is scored")
    return EXIT_DONE


def _say_end(watch: Watch, facts: RunFacts) -> None:
    why = f" ({facts.why})" if facts.why is not None and facts.state in ("failed", "died") else ""
    saved = "no checkpoint" if facts.checkpoint is None else f"its last checkpoint is of step {facts.checkpoint:,}"
    facts = watch.look(anew=True)  # the last word may have been ours
    watch.tell(f"{facts.name}: {facts.words}{why}; step {facts.step:,}, {saved}")
    for job in _active(facts, "eval"):
        if "train" not in job["component"]:
            watch.tell(f"its evaluator ends by itself once all is scored: {described(job)}")
    if facts.waiting and not _active(facts, "eval"):
        many = "1 snapshot is" if facts.waiting == 1 else f"{facts.waiting} snapshots are"
        watch.tell(f"{many} not scored; going on with the run scores what is missing")
