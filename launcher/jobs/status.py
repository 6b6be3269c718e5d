"""The jobs of runs: what `jobs.jsonl` and the scheduler say of them together. The scheduler is asked once for all runs.

It needs no accounting: what Slurm has forgotten is called gone, and a Slurm that does not answer is said and not fatal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from configs.run.directory import RunDir
from configs.scheduler import ACTIVE, NoAnswer, SlurmJob, slurm_jobs
from launcher.jobs.log import read_jobs

SchedulerAnswer = dict[str, SlurmJob] | NoAnswer | None  # jobs by id; None: the scheduler was not asked
WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"))
GONE, UNKNOWN = "gone", "unknown"  # Slurm does not know the job; it was not asked, or does not answer
SUBMITTED = ("submitted", "successor")


@dataclass(frozen=True)
class RunJobs:
    """The newest jobs of a run, training's before the evaluator's."""

    jobs: list[dict[str, Any]] = field(default_factory=list)  # component, job, backend, state, reason, nodes, …
    requeues: int = 0
    submitted: float = 0.0  # when training's job was, in seconds since the epoch
    stop_asked: bool = False  # since then
    login: str | None = None  # of the site: where its nodes are reached from
    restarted: bool = False  # Slurm has started training's job once more, and its script has not yet said that it runs

    @property
    def train(self) -> dict[str, Any] | None:
        """The job that training is in, or was last."""
        return next((job for job in self.jobs if "train" in job["component"]), None)


def is_active(job: dict[str, Any]) -> bool:
    """Whether a job of `RunJobs.jobs` is known to wait or run."""
    return job["state"] in ACTIVE


def may_be_active(job: dict[str, Any]) -> bool:
    """Whether a job of `RunJobs.jobs` waits or runs, or nobody could say so just now: never that it is over."""
    return is_active(job) or is_unanswered(job)


def is_unanswered(job: dict[str, Any]) -> bool:
    """Whether it is a job of Slurm's, which cannot be asked just now."""
    return bool(job["state"] == UNKNOWN and job["backend"] == "slurm")


def known_job(told: SchedulerAnswer, job: str) -> SlurmJob | None:
    """What Slurm says of a job; None where it says nothing."""
    return told.get(job) if isinstance(told, dict) else None


def ask_scheduler(runs: Iterable[RunDir]) -> SchedulerAnswer:
    """What Slurm says of the newest jobs of all these runs. It is not asked where none has any."""
    wanted = set()
    for run in runs:
        try:
            lines = read_jobs(run)
        except (OSError, ValueError):
            continue
        wanted |= {str(line["job"]) for line in _newest(lines) if line.get("backend", "slurm") == "slurm"}
    return slurm_jobs(wanted) if wanted else {}


def jobs_of(lines: list[dict[str, Any]], told: SchedulerAnswer) -> RunJobs:
    """The newest jobs of a run.

    Args:
        lines: of its `jobs.jsonl`, oldest first.
        told: what `ask_scheduler` gave for it.
    """
    newest = _newest(lines)
    jobs = [_joined(line, told) for line in newest]
    training = [line for line in lines if _trains(line)]
    count = Counter(line.get("kind") for line in training)
    by_slurm = max((job["restarts"] or 0 for job in jobs if "train" in job["component"]), default=0)
    return RunJobs(
        jobs=jobs,
        # A turn that a successor takes has a line of each kind: it is counted by the one that every turn has.
        requeues=max(count["requeued"], count["started"] - count["submitted"], by_slurm),
        submitted=max((float(line.get("time") or 0) for line in newest if _trains(line)), default=0.0),
        stop_asked=bool(newest) and _is_stop_asked(lines),
        login=next((str(line["login"]) for line in reversed(lines) if line.get("login")), None),
        restarted=by_slurm > _begun(training, jobs),
    )


def _begun(training: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> float:
    """How often Slurm had started these jobs when their script last said so; ∞ where it has not yet.

    A node that was lost has its job started again without a word in the record, until that has started.
    """
    ours = {job["job"] for job in jobs}
    started = [line for line in training if line.get("kind") == "started" and str(line.get("job")) in ours]
    return max((float(line.get("restart") or 0) for line in started), default=math.inf)


def _is_stop_asked(lines: list[dict[str, Any]]) -> bool:
    """Whether that was the last wish, by the order in the file: clocks of hosts differ, and a successor is no wish."""
    for line in reversed(lines):
        if line.get("kind") == "stop asked":
            return True
        if line.get("kind") == "submitted" and _trains(line):
            return False
    return False


def _trains(line: dict[str, Any]) -> bool:
    return "train" in str(line.get("component") or "train")


def _newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that submitted the newest job of training and, where it has one of its own, of the evaluator."""
    lines = [line for line in lines if line.get("kind") in SUBMITTED and line.get("job") is not None]
    train = next((line for line in reversed(lines) if _trains(line)), None)
    scores = next((line for line in reversed(lines) if line.get("component") == "eval"), None)
    if train is not None and "eval" in str(train.get("component")):
        scores = None
    return [line for line in (train, scores) if line is not None]


def _joined(line: dict[str, Any], told: SchedulerAnswer) -> dict[str, Any]:
    job, backend = str(line["job"]), str(line.get("backend") or "slurm")
    known = known_job(told, job) if backend == "slurm" else None
    missing = GONE if isinstance(told, dict) and backend == "slurm" else UNKNOWN
    return {
        "component": str(line.get("component") or "train"),
        "job": job,
        "backend": backend,
        "state": known.state if known else missing,
        "reason": known.reason if known else "",
        "nodes": known.nodes if known else "",
        "restarts": known.restarts if known else None,
        "exit_code": known.exit_code if known and not known.active else None,
    }


def described(job: dict[str, Any]) -> str:
    """A job in words: `train 12 RUNNING on node[1-2], restarted once`."""
    said = f"{job['component']} {job['job']} {job['state']}"
    if job["state"] == GONE:
        return f"{job['component']} {job['job']}: Slurm does not know it any more"
    if job["state"] == UNKNOWN:
        return f"{job['component']} {job['job']}: " + (
            "Slurm cannot be asked just now"
            if job["backend"] == "slurm"
            else f"of {job['backend']}, which is not asked"
        )
    if job["state"] in WAITING:
        said += f" ({job['reason'] or 'no reason given'})"
    elif is_active(job):
        said += f" on {job['nodes']}" if job["nodes"] else ""
    elif job["reason"]:
        said += f" ({job['reason']})"
    if job["exit_code"]:
        said += f", exit code {job['exit_code']}"
    if job["restarts"]:
        said += ", restarted once" if job["restarts"] == 1 else f", restarted {job['restarts']} times"
    return said
