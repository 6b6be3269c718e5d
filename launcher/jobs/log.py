"""`RUN/jobs.jsonl`: every job that was submitted for a run, and what became of it. Lines are only ever added."""

from __future__ import annotations

import time
from typing import Any

from configs.errors import ConfigError
from configs.files.json_lines import append_line, each_line
from configs.files.seal import sealed
from configs.run.directory import RunDir
from configs.scheduler import NoAnswer, SlurmJob, slurm_jobs

DAMAGED = "damaged"


def add_job(run: RunDir, kind: str, **facts: Any) -> None:
    """Appends a line: `kind` is submitted, started, requeued, successor, started again, stop asked, …"""
    append_line(run.jobs, sealed({"time": time.time(), "kind": kind, **facts}))


def read_jobs(run: RunDir) -> list[dict[str, Any]]:
    """All lines, oldest first; none where the run never had a job. In a damaged one's place is its `why` alone, and
    the kind DAMAGED: it may have said anything, that somebody asked to stop for instance."""
    return [line if isinstance(line, dict) else {"kind": DAMAGED, "why": line} for line in each_line(run.jobs)]


def job_ids(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Jobs that were submitted, each with what it is for (`train`, `eval`, `train+eval`), oldest first."""
    kinds = ("submitted", "successor", "started")  # the last: one that sbatch was told of by hand
    found: dict[str, str] = {}
    for line in lines:
        if line.get("kind") in kinds and line.get("job"):
            found.setdefault(str(line["job"]), str(line.get("component")))
    return found


def live_jobs(run: RunDir) -> dict[str, SlurmJob] | NoAnswer:
    """Jobs of the run that wait or run, by id."""
    found = slurm_jobs(job_ids(read_jobs(run)))
    return found if isinstance(found, NoAnswer) else {job: told for job, told in found.items() if told.active}


def check_no_job(run: RunDir, components: set[str]) -> str | None:
    """Refuses a run that has a job for any of these components already; gives its training's job, if there is one.

    Raises:
        ConfigError: names the job, and what it does; or nobody can tell.
    """
    live = _jobs_or_refusal([run])
    kinds = job_ids(read_jobs(run))
    _refuse(run, live, {part for component in components for part in component.split("+")})
    return next((job for job in kinds if job in live and "train" in kinds[job].split("+")), None)


def check_no_jobs(runs: list[RunDir]) -> None:
    """Refuses runs of which one has a training's job; the scheduler is asked once for all.

    Raises:
        ConfigError: as `check_no_job`.
    """
    live = _jobs_or_refusal(runs)
    for run in runs:
        _refuse(run, live, {"train"})


def _jobs_or_refusal(runs: list[RunDir]) -> dict[str, SlurmJob]:
    found = slurm_jobs({job for run in runs for job in job_ids(read_jobs(run))})
    if isinstance(found, NoAnswer):
        raise ConfigError(
            f"--on: slurm: nobody knows whether the run has a job already, since Slurm cannot be asked just now "
            f"({found.why}); try again when squeue answers"
        )
    return {job: told for job, told in found.items() if told.active}


def _refuse(run: RunDir, live: dict[str, SlurmJob], components: set[str]) -> None:
    kinds = job_ids(read_jobs(run))
    same = [job for job, component in kinds.items() if job in live and components & set(component.split("+"))]
    if same:
        named = ", ".join(f"job {job} ({kinds[job]}, {live[job].state.lower()})" for job in same)
        raise ConfigError(f"run.dir: {run.path} has {named}; vernier stop ends it, or use another run.dir")
