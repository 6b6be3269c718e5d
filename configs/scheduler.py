"""What Slurm says of jobs: asked through squeue, with a time limit, since a cluster may be down and a run goes on.

Nothing but squeue's own memory is needed, no accounting.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

PATIENCE_S = 15.0
# Of these states a job is not, or not yet, at its end (man squeue, JOB STATE CODES).
ACTIVE = frozenset(
    """PENDING CONFIGURING RUNNING SUSPENDED COMPLETING REQUEUED REQUEUE_HOLD REQUEUE_FED RESIZING SIGNALING STAGE_OUT
    STOPPED SPECIAL_EXIT RESV_DEL_HOLD""".split()  # noqa: SIM905
)


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


def slurm_jobs(jobs: Iterable[str]) -> dict[str, SlurmJob] | None:
    """Those of `jobs` (ids; 12_3 for a task of an array) that Slurm still knows, by id. None: it cannot be asked."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        return None
    # Slurm 22.05 gives all jobs whatever is asked for; newer ones only these.
    command = ["squeue", "--states=all", "--json", f"--user={os.getuid()}", f"--jobs={','.join(wanted)}"]
    environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # else lists of an array's tasks are cut short
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)
        if done.returncode != 0 and "Invalid job id" in done.stderr:  # none of them is known
            return {}
        told = json.loads(done.stdout)["jobs"] if done.returncode == 0 else None
    except (ValueError, KeyError, TypeError):
        told = None
    except (subprocess.TimeoutExpired, OSError):
        return None
    if told is None:
        return _without_json(wanted, environment)
    found = {}
    for one in told:
        for job in _jobs(one):
            if job.job in wanted:
                found[job.job] = job
    return found


def _without_json(wanted: list[str], environment: dict[str, str]) -> dict[str, SlurmJob] | None:
    """As `slurm_jobs`, of a Slurm that was built without JSON: exit codes and restarts are then not known."""
    command = ["squeue", "--states=all", "--noheader", "--array", "--format=%i|%T|%r|%N|%j"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)
    except (subprocess.TimeoutExpired, OSError):
        return None
    if done.returncode != 0:
        return None
    found = {}
    for line in done.stdout.splitlines():
        job, state, reason, nodes, name = [*line.split("|", 4), "", "", "", ""][:5]
        if job in wanted:
            found[job] = SlurmJob(job, name, state, "" if reason == "None" else reason, 0, 0, nodes)
    return found


def is_active(job: str) -> bool | None:
    """Whether Slurm knows of a job that waits or runs; None where it cannot be asked."""
    found = slurm_jobs([job])
    if found is None:
        return None
    return job in found and found[job].active


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
    reason = str(told.get("state_reason") or "")
    return SlurmJob(
        job=number,
        name=str(told.get("name") or ""),
        state=str(state[0] if isinstance(state, list) and state else state),
        reason="" if reason == "None" else reason,
        exit_code=code,
        restarts=_number(told.get("restart_cnt")),
        nodes=str(told.get("nodes") or ""),
    )
