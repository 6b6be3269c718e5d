"""Whether the ranks of a job may start, and the note that they do."""

from __future__ import annotations

import os
import time
from typing import Any

from configs.errors import EXIT_FAILED, EXIT_STOPPED, ConfigError
from configs.load import load_config
from configs.run.directory import RunDir
from configs.scheduler import current_job
from configs.schema import Config
from eval.scored import can_be_scored, loss_tables
from launcher.backends.rank_ends import sizes
from launcher.jobs.log import add_job, read_jobs
from launcher.jobs.status import jobs_of

DYING_S = 60.0  # for ranks of an earlier start, on a node that was lost, to be given up


def config_of(run: RunDir, component: str) -> Config:
    """The settings that a component's ranks are given."""
    return load_config(run.path / f"{component}-config.yaml")


def begin(run: RunDir, component: str) -> int | None:
    """Notes that the ranks start; None, unless nothing is left to do or they may not: then the job's exit code.

    Raises:
        ConfigError: somebody else holds the run.
    """
    config = config_of(run, component)
    run.logs.mkdir(parents=True, exist_ok=True)
    lines, made = read_jobs(run), progress(run, component)
    if component == "train":
        if run.is_finished(config):
            print(f"{run.path} is finished (step {config.steps})")
            return 0
        if jobs_of(lines, {}).stop_asked:  # while this job was waiting, or being queued again
            return _asked_to_stop(run)
    before, limit = starts_without_progress(lines, component, made), config.launch.requeue_limit
    if before > limit and (component == "train" or can_be_scored(run, config)):  # else there was nothing to score
        told = f"queued again {before} times without a new {'checkpoint' if component == 'train' else 'loss table'}"
        told += f" (launch.requeue_limit: {limit}); see {run.logs}, then launch it once more"
        give_up(run, component, told)
        return EXIT_FAILED
    restart, job = int(os.environ.get("SLURM_RESTART_COUNT", "0")), current_job()
    if component == "train":
        stopped = _take(run, config, restart)
        if stopped is not None:
            return stopped
    where = {"nodes": os.environ.get("SLURM_JOB_NODELIST"), "restart": restart, "logs": agents_logs(run)}
    add_job(run, "started", component=component, backend="slurm", job=job, progress=made, **where)
    return None


def _take(run: RunDir, config: Config, restart: int) -> int | None:
    """Waits until nobody holds the run, and begins its state; gives the exit code where it was asked to stop."""
    from trainer.faults.lock import FRESH_S, check_free, holder, kept_free

    # Slurm vouches that an earlier start of this very job is over: its ranks end by themselves, if late.
    ours = restart > 0 and holder(run).get("job") == current_job()
    deadline = time.monotonic() + (config.guards.hang_s + FRESH_S if ours else DYING_S)
    while True:
        try:
            check_free(run, print)  # waits for a holder on another node, which may be the one that was lost
            with kept_free(run):
                if jobs_of(read_jobs(run), {}).stop_asked:
                    return _asked_to_stop(run)
                run.stop_request.unlink(missing_ok=True)
                run.start_afresh("pending", steps=config.steps, job=current_job(), job_ended=None)
            return None
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(2.0)


def _asked_to_stop(run: RunDir) -> int:
    print(f"{run.path} was asked to stop: vernier launch goes on with it")
    run.stop_request.unlink(missing_ok=True)
    run.write_state("stopping", exit_code=EXIT_STOPPED, job_ended=True)
    return 0


def starts_without_progress(lines: list[dict[str, Any]], component: str, progress: int) -> int:
    """How often in a row this component was started with what it has now, since it was last launched by hand."""
    count = 0
    for line in reversed(lines):
        if line.get("kind") == "submitted" and component in str(line.get("component")).split("+"):
            break
        if line.get("kind") == "started" and line.get("component") == component:
            if int(line.get("progress", -1)) < progress:
                break
            count += 1
    return count


def progress(run: RunDir, component: str) -> int:
    """What no start may lose: the step of the newest checkpoint (-1: none), or how many steps are scored."""
    if component == "train":
        return max(run.whole_steps(run.checkpoints), default=-1)
    return len(loss_tables(run, None, None))


def agents_logs(run: RunDir) -> dict[str, int]:
    """Bytes in the logs of what starts ranks, of those before a start."""
    return {name: size for name, size in sizes(run.logs).items() if "torchrun" in name}


def give_up(run: RunDir, component: str, why: str) -> None:
    """Says that a component leads nowhere; of training, in the run's state."""
    print(f"error: {why}")
    run.add_event("failed" if component == "train" else "evaluator died", why)
    if component == "train":
        failure = {"rank": None, "error": why, "time": time.time()}
        run.write_state("failed", exit_code=EXIT_FAILED, failure=failure, job_ended=True)
