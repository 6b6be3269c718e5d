"""`RUN/jobs.jsonl`: every job that was submitted for a run, and what became of it. Lines are only ever added."""

from __future__ import annotations

import time
from typing import Any

from configs.json_lines import append_line, each_line
from configs.rundir import RunDir
from configs.scheduler import NoAnswer, SlurmJob, slurm_jobs
from configs.seal import sealed

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
