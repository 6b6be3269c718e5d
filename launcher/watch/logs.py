"""`vernier logs`: the end of what a rank, or a job's script, has written; followed from attempt to attempt.

The rank that failed first is shown unless another is named. Nothing in a log may steer the terminal.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from configs.console import printable
from configs.errors import EXIT_DONE, DataError
from configs.files.opening import open_to_read
from configs.run.directory import RunDir, is_locked
from configs.run.last_words import of_rank
from launcher.jobs.log import job_ids, read_jobs
from launcher.jobs.status import SchedulerAnswer, ask_scheduler, is_active, is_unanswered, may_be_active
from launcher.text import say
from launcher.watch.run_index import NAMED, find_all
from launcher.watch.run_status import facts_of

LINES = 50
TAIL_BYTES = 4 << 20  # most that is read back for them: a line may be long without end
PIECE = 1 << 16
POLL_S = 0.3
STANDING_S = 2.0  # between looks at how the run stands
ASK_S = 10.0  # between questions to the scheduler
SETTLED_S = 3.0  # a run that has ended stays so for this long, or it is being queued or started again
STEERING = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours, cursor (ECMA-48, 5.4: control sequences)
Failure = tuple[int | None, str]  # the rank that failed first, where one said so, and its error
ENDED = ("done", "failed", "stopped", "died", "not started")


@dataclass(frozen=True)
class Wanted:
    """Which log of a run."""

    rank: int | None = None  # default the one that failed first, else 0
    evaluator: bool = False  # of the eval rank-group
    job: bool = False  # of the job's script


def run_logs(named: Path, wanted: Wanted, *, follow: bool, console: Console, lines: int = LINES) -> int:
    """Prints the last lines of a log of a run; with `follow` goes on with it until the run has ended, or Ctrl-C.

    Raises:
        DataError: there is no such run, or no such log.
    """
    run = _run_of(named)
    failure = None if wanted.evaluator or wanted.job else failure_of(run)
    if failure is not None and wanted.rank in (None, failure[0]):
        _say_failure(failure, console)
    path = choose(run, wanted)
    if not follow:
        if not path.is_file():
            raise DataError(_missing(run, path))
        try:
            *whole, last = tail(path, lines)[0]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        say(console, f"==> {path} <==", "bold")
        for line in [*whole, last] if last else whole:
            say(console, shown(line))
        if not whole and not last:
            say(console, "(nothing yet)", "dim")
        return EXIT_DONE
    if not path.is_file():
        say(console, f"waiting for {path}", "dim")
    with suppress(KeyboardInterrupt):  # enough seen
        _follow(run, wanted, console, lines, told=failure)
    return EXIT_DONE


def _run_of(named: Path) -> RunDir:
    """The run that is named; of a sweep the first member that has failed.

    Raises:
        DataError: there is no such run, or none of the sweep's members has failed: names them.
    """
    runs = find_all(named)
    if len(runs) == 1:
        return runs[0]
    failed = next((run for run in runs if failure_of(run) is not None), None)
    if failed is None:
        stand = [f"{run.path.name} ({run.read_state().get('state') or 'not started'})" for run in runs[:NAMED]]
        more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
        raise DataError(
            f"{named}: is a sweep, of which no member has failed; name one by its path: {', '.join(stand)}{more}"
        )
    return failed


def _follow(run: RunDir, wanted: Wanted, console: Console, lines: int, *, told: Failure | None) -> None:
    log, standing = Follower(run, wanted, lines), Standing(run, evaluator=wanted.evaluator)
    while True:
        over = standing.over()  # asked first: so what was written before the end is printed
        for line in log.added():
            say(console, line)
        if over:
            break
        time.sleep(POLL_S)
    for line in log.last():
        say(console, line)
    failure = failure_of(run)
    if failure is not None and failure != told:
        _say_failure(failure, console)
    say(console, f"the run has ended: {printable(over)}", "dim")


def choose(run: RunDir, wanted: Wanted) -> Path:
    """The file that is wanted, be it there or not yet."""
    component = "eval" if wanted.evaluator else "train"
    if wanted.job:
        found = list(run.logs.glob(f"slurm-{component}*.out")) or list(run.logs.glob("slurm-*.out"))
        if not found:  # of a sweep, whose tasks write into the sweep's own folder
            tasks = (job for job in job_ids(read_jobs(run)) if "_" in job)
            found = [path for job in tasks for path in run.path.parent.glob(f"logs/slurm-*-{job}.out")]
        return max(found, key=_written, default=run.logs / f"slurm-{component}-JOB.out")
    prefix = "eval-" if wanted.evaluator else ""
    if wanted.rank is not None:
        return run.logs / f"{prefix}rank-{wanted.rank}.log"
    failure = None if wanted.evaluator else failure_of(run)
    if failure is None:
        return run.logs / f"{prefix}rank-0.log"
    told = (run.read_state().get("failure") or {}).get("log")
    if told:
        return run.logs / told
    if failure[0] is not None:
        return run.logs / f"rank-{failure[0]}.log"
    # No rank said it: what started them may know more.
    starters = [p for p in run.logs.glob("*torchrun*.log") if "eval" not in p.name]
    starters = starters or list(run.logs.glob("slurm-train*.out"))
    return max(starters, key=_written, default=run.logs / "rank-0.log")


def _written(path: Path) -> tuple[float, str]:
    try:
        return path.stat().st_mtime, path.name
    except OSError:
        return 0.0, path.name


def failure_of(run: RunDir) -> Failure | None:
    """(rank, error) of the first failure of a run that has failed."""
    state = run.read_state()
    failure = state.get("failure")
    if state.get("state") != "failed" or not isinstance(failure, dict):
        return None
    rank = failure.get("rank")
    return rank if isinstance(rank, int) else None, str(failure.get("error"))


def _say_failure(failure: Failure, console: Console) -> None:
    rank, error = failure
    for line in of_rank(rank, error).splitlines():
        say(console, printable(line), "red")


def _missing(run: RunDir, path: Path) -> str:
    there = sorted((p.name for p in run.logs.glob("*") if p.suffix in (".log", ".out")), key=_natural)
    listed = f"there are {', '.join(there[:20])}{', …' if len(there) > 20 else ''}" if there else "the run has none yet"
    return f"{path}: no such log; {listed}"


def _natural(name: str) -> list[Any]:
    """rank-10 behind rank-9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def tail(path: Path, count: int) -> tuple[list[bytes], int]:
    """(the last lines of a file, and what follows its last newline; where it ended), read from its end backwards."""
    pieces: list[bytes] = []
    with open_to_read(path) as file:
        end = position = file.seek(0, os.SEEK_END)
        newlines = 0
        while position > max(0, end - TAIL_BYTES) and newlines <= count:
            start = max(0, position - PIECE)
            file.seek(start)
            pieces.append(file.read(position - start))
            newlines += pieces[-1].count(b"\n")
            position = start
    lines = b"".join(reversed(pieces)).split(b"\n")
    return lines[-(count + 1) :], end


def shown(line: bytes) -> str:
    """A line as a terminal would leave it standing, colours aside; what else would steer one is written as escapes."""
    text = STEERING.sub("", line.decode("utf-8", errors="replace")).rstrip("\r")
    return printable(text.rpartition("\r")[2])  # a progress bar writes over itself


class Follower:
    """Gives what is added to a log, also where another file takes its place: a further job's, the rank's that failed.

    The file stays open, so that the end of one that was replaced is not lost.
    """

    def __init__(self, run: RunDir, wanted: Wanted, lines: int) -> None:
        self.run, self.wanted, self.lines = run, wanted, lines
        self.path: Path | None = None
        self.file: BinaryIO | None = None
        self.rest = b""  # of a line that is still being written

    def added(self) -> Iterator[str]:
        """What was written since, in whole lines; of the first file, and of a rank that has failed, the last ones."""
        path = choose(self.run, self.wanted)
        if self._is_another(path):
            from_its_end = self.path is None or (path != self.path and not self.wanted.job)
            yield from self._read()
            yield from self.last()
            if self._open(path):
                yield f"==> {path} <=="
                if from_its_end:
                    assert self.file is not None
                    (*whole, self.rest), end = tail(path, self.lines)
                    self.file.seek(end)
                    yield from (shown(line) for line in whole)
        yield from self._read()

    def last(self) -> Iterator[str]:
        """A line that was never ended."""
        if self.rest:
            yield shown(self.rest)
            self.rest = b""

    def _is_another(self, path: Path) -> bool:
        try:
            there = path.stat()
        except OSError:
            return False  # not yet
        return self.file is None or not os.path.samestat(there, os.fstat(self.file.fileno()))

    def _open(self, path: Path) -> bool:
        if self.file is not None:
            self.file.close()
            self.file = None
        try:
            self.file = open_to_read(path)  # until another takes its place
        except OSError:
            return False
        self.path = path
        return True

    def _read(self) -> Iterator[str]:
        if self.file is None:
            return
        if os.fstat(self.file.fileno()).st_size < self.file.tell():  # cut short, and written anew
            self.file.seek(0)
        while piece := self.file.read(PIECE):
            *whole, self.rest = (self.rest + piece).split(b"\n")
            yield from (shown(line) for line in whole)
            if len(self.rest) > TAIL_BYTES:
                yield from self.last()


class Standing:
    """Whether a run has ended: looked at now and then, and believed once it has held for some seconds."""

    def __init__(self, run: RunDir, *, evaluator: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.evaluator, self.clock = run, evaluator, clock
        self.looked = self.asked = -1e9
        self.told: SchedulerAnswer = None
        self.since: float | None = None  # when it was first seen ended
        self.words = ""

    def over(self) -> str:
        """How the run stands where it has ended; "" while it has not."""
        now = self.clock()
        if now - self.looked >= STANDING_S:
            self.looked = now
            if now - self.asked >= ASK_S:
                self.asked = now
                self.told = ask_scheduler([self.run])
            try:
                facts = facts_of(self.run, told=self.told)
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                return ""  # a file that is not as we write it; look again
            waits = self.evaluator and bool(facts.waiting) and self._scores(facts.jobs)
            train = [job for job in facts.jobs if "train" in job["component"]]
            starts = facts.state in ("not started", "died")  # then its job decides, and nobody may know of that
            at_work = any(is_active(job) or (starts and is_unanswered(job)) for job in train)
            if facts.state in ENDED and not at_work and not waits:
                self.since = self.since if self.since is not None else now
                self.words = facts.words
            else:
                self.since = None
        return self.words if self.since is not None and now - self.since >= SETTLED_S else ""

    def _scores(self, jobs: list[dict[str, Any]]) -> bool:
        """Whether somebody is still about to score: the evaluator's job, or without one a `vernier train` here."""
        own = [job for job in jobs if "eval" in job["component"]]
        return any(may_be_active(job) for job in own) if own else is_locked(self.run.starter)
