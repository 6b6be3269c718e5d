"""What Slurm says of jobs: asked through squeue, with a time limit, since a cluster may be down and a run goes on.

Nothing but squeue's own memory is needed, no accounting. That it does not answer is an answer of its own: never that a
job is gone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

PATIENCE_S = 15.0
SHOWN = 200  # characters of what Slurm says
UNKNOWN_ID = "Invalid job id"  # that job is gone
# Of these states a job is not, or not yet, at its end (man squeue, JOB STATE CODES).
ACTIVE = frozenset(
    """PENDING CONFIGURING RUNNING SUSPENDED COMPLETING REQUEUED REQUEUE_HOLD REQUEUE_FED RESIZING SIGNALING STAGE_OUT
    STOPPED SPECIAL_EXIT RESV_DEL_HOLD""".split()  # noqa: SIM905
)


def node_name() -> str:
    """What this machine is called: by Slurm, inside a job, since its own name need not be the one that others know."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class SlurmJob:
    """A job as Slurm knows it."""

    job: str
    name: str
    state: str  # PENDING, RUNNING, …
    reason: str  # why it waits, or why it ended; "" where there is none
    exit_code: int  # of its script; 128 + number for a signal
    restarts: int
    nodes: str  # such as node[1-2]; "" while it waits

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def current_job() -> str | None:
    """The job that this process is in, of an array with its task (12_3); None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class NoAnswer:
    """Slurm could not be asked: any job may wait, run, or be gone. Neither true nor false, so that none is assumed."""

    why: str  # in a few words

    def __bool__(self) -> bool:
        raise TypeError("no answer is neither that there are jobs nor that there are none")


class Life(Enum):
    """Whether a job waits or runs. Compare it: unknown is neither true nor false."""

    ACTIVE = "active"
    OVER = "over"
    UNKNOWN = "unknown"

    def __bool__(self) -> bool:
        raise TypeError("compare with Life.ACTIVE, Life.OVER or Life.UNKNOWN")


def slurm_jobs(jobs: Iterable[str]) -> dict[str, SlurmJob] | NoAnswer:
    """Those of `jobs` (ids; 12_3 for a task of an array) that Slurm still knows, by id; the others are gone."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    # Slurm 22.05 gives all jobs whatever is asked for; newer ones only these.
    told = _squeue("--json", f"--jobs={','.join(wanted)}")
    if isinstance(told, NoAnswer):
        return told
    status, said, complaint = told
    if status != 0 and UNKNOWN_ID in complaint:  # none of them is known
        return {}
    if status == 0:
        try:
            found, problem = _of_json(json.loads(said), wanted)
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # built without JSON
        else:
            return NoAnswer(problem) if problem else found
    return _without_json(wanted)


def life(job: str) -> Life:
    """Whether Slurm has a job that waits or runs."""
    found = slurm_jobs([job])
    if isinstance(found, NoAnswer):
        return Life.UNKNOWN
    return Life.ACTIVE if job in found and found[job].active else Life.OVER


def _squeue(*options: str) -> tuple[int, str, str] | NoAnswer:
    """(exit code, stdout, stderr) of a question for jobs in any state."""
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # else lists of an array's tasks are cut short
    for name in [name for name in environment if name.startswith("SQUEUE_")]:
        del environment[name]  # a user's own filters and formats
    try:
        done = subprocess.run(
            ["squeue", "--states=all", *options],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
            env=environment,
        )
    except FileNotFoundError:
        return NoAnswer("there is no squeue here")
    except OSError as error:
        return NoAnswer(f"squeue cannot be started ({error.strerror})")
    except subprocess.TimeoutExpired:
        return NoAnswer(f"squeue has not answered for {PATIENCE_S:.0f} s")
    return done.returncode, done.stdout, done.stderr


def _of_json(told: dict[str, Any], wanted: list[str]) -> tuple[dict[str, SlurmJob], str]:
    """(jobs by id, what went wrong): 22.05 exits with 0 and no jobs where its controller did not answer."""
    problems = [_problem(one) for one in told.get("errors") or ()]
    problems = [one for one in problems if UNKNOWN_ID not in one]
    if problems:
        return {}, problems[0]
    jobs = [job for one in told["jobs"] for job in _jobs(one)]
    return {job.job: job for job in jobs if job.job in wanted}, ""


def _problem(error: Any) -> str:
    """One of the `errors` of Slurm's JSON, in words."""
    if isinstance(error, dict):
        said = [str(one) for one in (error.get("description"), error.get("error")) if one]
        error = ": ".join(said) or f"error {error.get('error_number')}"
    return _first_line(str(error))


def _first_line(said: str) -> str:
    lines = [line.strip().removeprefix("squeue: ").removeprefix("error: ") for line in said.splitlines()]
    return next((line[:SHOWN] for line in lines if line), "")


def _without_json(wanted: list[str]) -> dict[str, SlurmJob] | NoAnswer:
    """As `slurm_jobs`, of a Slurm that was built without JSON: exit codes and restarts are then not known."""
    told = _squeue("--noheader", "--array", "--format=%i|%T|%r|%N|%j")
    if isinstance(told, NoAnswer):
        return told
    status, said, complaint = told
    if status != 0:
        return NoAnswer(_first_line(complaint) or f"squeue ended with exit code {status}")
    if "error:" in complaint:  # it says so, and exits with 0
        return NoAnswer(_first_line(complaint))
    found = {}
    for line in filter(None, said.splitlines()):
        job, *rest = line.split("|", 4)
        if len(rest) != 4 or not job[:1].isdigit():
            return NoAnswer(f"squeue's answer cannot be read: {line[:SHOWN]}")
        if job in wanted:
            state, reason, nodes, name = rest
            found[job] = SlurmJob(job, name, state, "" if reason == "None" else reason, 0, 0, nodes)
    return found


def _number(value: Any) -> int:
    """A number of squeue's JSON, which newer versions wrap: {"set": true, "number": 7}."""
    if isinstance(value, dict):
        value = value.get("number", 0)
    return value if isinstance(value, int) else 0


def _jobs(told: dict[str, Any]) -> Iterator[SlurmJob]:
    """A job; of an array's tasks that still wait, which are one entry, each."""
    job = _job(told)
    array, waiting = _number(told.get("array_job_id")), str(told.get("array_task_string") or "")
    if not array or not waiting:
        yield job
        return
    for part in filter(None, waiting.partition("%")[0].split(",")):  # such as 0,3-9:2%4
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        for task in range(int(first), int(last or first) + 1, int(step or 1)):
            yield replace(job, job=f"{array}_{task}")


def _job(told: dict[str, Any]) -> SlurmJob:
    state = told.get("job_state")
    status = told.get("exit_code", 0)
    if isinstance(status, dict) and "return_code" in status:
        code = _number(status["return_code"])
    else:
        raw = _number(status)  # as wait() gives it
        code = 128 + (raw & 0x7F) if raw & 0x7F else raw >> 8
    task = told.get("array_task_id")
    array = _number(told.get("array_job_id"))
    number = str(told.get("job_id"))
    if array and task is not None and (not isinstance(task, dict) or task.get("set", True)):
        number = f"{array}_{_number(task)}"
    # The description says more where there is one: of "Resources", that nodes are down or drained, or which.
    reason = str(told.get("state_description") or told.get("state_reason") or "")
    return SlurmJob(
        job=number,
        name=str(told.get("name") or ""),
        state=str(state[0] if isinstance(state, list) and state else state),
        reason="" if reason == "None" else reason,
        exit_code=code,
        restarts=_number(told.get("restart_cnt")),
        nodes=str(told.get("nodes") or ""),
    )
