"""Before a start of `vernier train`: whether the run may be trained here, and what becomes of an old one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from configs.errors import ConfigError
from configs.load import load_config
from configs.run.directory import RunDir
from configs.scheduler import NoAnswer, current_job
from configs.schema import Config
from launcher.backends.agent import one_thread
from launcher.jobs.log import job_ids, live_jobs, read_jobs
from launcher.options import Resume
from trainer.faults.lock import check_free, kept_free, sole_starter


def check_start(config: Config, run: RunDir, how: Resume, tell: Callable[[str], None]) -> None:
    """Finds what is wrong before a rank starts; with `--fresh` moves the old run away.

    Raises:
        ConfigError: what is wrong, a line each.
    """
    with one_thread():
        from trainer.check import check_run

    check_free(run, tell)
    _check_jobs(run, tell)
    if not how.fresh:
        run.check_files()
    check_run(config, extend=how.extend, fresh=how.fresh, force=how.force, tell=tell)
    if how.fresh and run.path.exists():
        _move_away(run, tell)


def explain_extension(config: Config, run: RunDir, how: Resume, tell: Callable[[str], None]) -> None:
    """Says what more steps than before do to the schedule."""
    if not how.extend or not run.config.is_file():
        return
    before = load_config(run.config)
    if before.steps == config.steps:
        return
    from trainer.engine.schedule import learning_rate

    step = int(run.read_state().get("step") or 0)
    old, new = (
        learning_rate(at, peak=one.optimizer.lr, steps=one.schedule.steps or one.steps, schedule=one.schedule)
        for at, one in ((step, before), (step + 1, config))
    )
    name, told = config.schedule.name, f"extending from {before.steps} to {config.steps} steps"
    if old == new:
        tell(f"{told}: the {name} schedule goes on at a learning rate of {new:.3g}")
    else:
        tell(
            f"{told}: the {name} schedule is drawn anew over {config.schedule.steps or config.steps} steps, so the "
            f"learning rate goes from {old:.3g} at step {step} to {new:.3g} at step {step + 1}"
        )


def _check_jobs(run: RunDir, tell: Callable[[str], None]) -> None:
    """Refuses a run that a scheduler will train, or does. Where it cannot be asked, says so: the run's lock has to do.

    Raises:
        ConfigError: names the job.
    """
    live, kinds = live_jobs(run), job_ids(read_jobs(run))
    if isinstance(live, NoAnswer):
        tell(
            f"Slurm cannot be asked just now ({live.why}): if a job of this run still waits, it will find the run held"
        )
        return
    for job in live.values():
        if "train" in kinds[job.job].split("+") and job.job != current_job():
            raise ConfigError(
                f"run.dir: {run.path} has job {job.job} ({job.state.lower()}); vernier stop ends it, "
                "or use another run.dir"
            )


def _move_away(run: RunDir, tell: Callable[[str], None]) -> None:
    with sole_starter(run), kept_free(run):
        old = run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        link = ""
        if run.path.is_symlink():  # the link goes, what it leads to stays where it is
            link = f", a link to {os.readlink(run.path)} as before; the new one is a folder at {run.path}"
        try:
            run.path.rename(old)
        except OSError as error:  # a disk is mounted there, say
            raise ConfigError(f"--fresh: {run.path} cannot be renamed to {old} ({error.strerror})") from None
    tell(f"the earlier run is now {old}{link}")
