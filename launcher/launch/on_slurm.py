"""Submits the jobs of a run to Slurm: what is refused, what is recorded, what is said."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from rich.console import Console

from configs.console import tell, waiting
from configs.errors import EXIT_DONE, ConfigError, DataError, VernierError
from configs.files.atomic import read_json, write_atomic
from configs.load import dump_config
from configs.run.directory import RunDir
from configs.scheduler import NoAnswer
from eval.scored import can_be_scored
from launcher.backends.sbatch import Script, set_aside, submit
from launcher.backends.slurm import render
from launcher.jobs.log import add_job, check_no_job, job_ids, live_jobs, read_jobs
from launcher.jobs.plan import JobPlan, as_checked
from launcher.jobs.site import Site
from launcher.options import Launch
from launcher.watch.run_index import is_sweep, remember


def on_slurm(plan: JobPlan, how: Launch, console: Console) -> int:
    """Renders the jobs and submits them.

    Raises:
        ConfigError: a job that is asked for cannot be.
    """
    run = plan.run
    excluded = bad_nodes(run) if how.exclude_bad else ()
    scripts = _asked_for(render(plan, how.template, excluded), plan, how)
    tell_set_aside(scripts)
    if how.dry_run:
        for script in scripts:
            print(f"# ---- {script.path}\n{script.text}", end="")
        return EXIT_DONE
    if how.only != "eval":
        _check(plan, how)
    from trainer.faults.lock import sole_starter

    with kept_only_if_submitted(run), sole_starter(run):
        run.check_files()
        if run.is_finished(plan.config):
            if plan.eval is None or not can_be_scored(run, plan.config):
                console.print(f"{run.path} is finished (step {plan.config.steps})", markup=False)
                return EXIT_DONE
            plan = _scoring_alone(plan)
            scripts = [one for one in render(plan, how.template, excluded) if one.component == "eval"]
        scoring = _live(run, "eval")
        if scoring and how.only is None and [script.component for script in scripts] == ["train", "eval"]:
            console.print(f"eval: job {scoring} goes on", markup=False)
            scripts = scripts[:1]
        live = check_no_job(run, {script.component for script in scripts})
        _write(plan, scripts)
        remember(run.path)
        _submit_all(plan, scripts, live, console)
    console.print(f"how it stands: vernier status {shlex.quote(str(run.path))}", markup=False, soft_wrap=True)
    return EXIT_DONE


def _asked_for(scripts: list[Script], plan: JobPlan, how: Launch) -> list[Script]:
    chosen = [script for script in scripts if how.only in (None, script.component)]
    if not chosen:
        raise ConfigError(f"--only: {how.only} is no job of its own with eval.placement: {plan.config.eval.placement}")
    return chosen


def _scoring_alone(plan: JobPlan) -> JobPlan:
    """A plan whose evaluator has a job of its own, also where training and it share one."""
    if not plan.het:
        return plan
    beside = plan.config.eval.model_copy(update={"placement": "separate"})
    return replace(plan, config=plan.config.model_copy(update={"eval": beside}))


def _submit_all(plan: JobPlan, scripts: list[Script], live: str | None, console: Console) -> None:
    """Submits the jobs, training's first; the evaluator's begins no sooner than that one, or the live one."""
    for script in scripts:
        after = bool(script.component == "eval" and live)
        options = [f"--dependency=after:{live}", "--kill-on-invalid-dep=yes"] if after else []
        try:
            job = _submitted(plan.run, script, plan.site, *options)
        except VernierError as error:
            raise _training_goes_on(error, str(live)) if after else error from None
        if script.component != "eval":
            live = job
            plan.run.start_afresh("pending", steps=plan.config.steps, job=job, job_ended=None)
        console.print(f"{script.component}: job {job}, {script.path}", markup=False, soft_wrap=True)


def tell_set_aside(scripts: list[Script]) -> None:
    """Says which variables of the user's do not count."""
    lines = (line for script in scripts for line in set_aside(script.text, os.environ).values())
    for line in dict.fromkeys(lines):
        print(line, file=sys.stderr)  # a dry run's scripts go to stdout


@contextmanager
def kept_only_if_submitted(run: RunDir) -> Iterator[None]:
    """Where no job was submitted, leaves nothing of a folder that was not there before; else a run that says why."""
    new = not run.path.exists()
    try:
        yield
    except VernierError as error:
        if run.jobs.is_file() or not run.path.exists():
            pass
        elif new and isinstance(error, ConfigError):
            shutil.rmtree(run.path, ignore_errors=True)
        elif not run.state.is_file() and run.scripts.is_dir() and not is_sweep(run.path):
            failure = {"rank": None, "error": " ".join(str(error).split()), "time": time.time()}
            with suppress(OSError):
                run.write_state("failed", exit_code=error.exit_code, failure=failure)
        raise


def _training_goes_on(error: VernierError, job: str) -> VernierError:
    first, line, rest = str(error).partition("\n")
    told = f"{first}; the training is job {job} all the same, and vernier launch … --only eval adds its evaluator"
    return ConfigError(told + line + rest) if isinstance(error, ConfigError) else VernierError(told + line + rest)


def _live(run: RunDir, component: str) -> str | None:
    """The run's job that is for this component alone, and waits or runs."""
    kinds = job_ids(read_jobs(run))
    live = live_jobs(run)
    if isinstance(live, NoAnswer):
        return None  # the check that follows refuses
    return next((job for job in live if kinds[job] == component), None)


def _check(plan: JobPlan, how: Launch) -> None:
    """Refuses here what the ranks would refuse later."""
    with waiting("loading the libraries, and looking at the run and its data"):
        from trainer.check import check_run
        from trainer.faults.lock import check_free

        check_free(plan.run, tell)
        check_run(as_checked(plan.config), extend=how.extend, force=how.force, tell=tell)


def bad_nodes(run: RunDir) -> tuple[str, ...]:
    """Nodes that the last preflight named.

    Raises:
        ConfigError: there was none.
    """
    path = run.path / "preflight.json"
    try:
        found = read_json(path)
        return tuple(str(one["node"]) for one in found["bad"])
    except (DataError, KeyError, TypeError):
        raise ConfigError(f"--exclude-bad: {path} is not there or not whole: no preflight has named any node") from None


def _write(plan: JobPlan, scripts: list[Script]) -> None:
    run = plan.run
    for folder in (run.logs, run.scripts):  # Slurm does not make the folder of a job's log
        folder.mkdir(parents=True, exist_ok=True)
    text = dump_config(plan.config)
    for component in {part for script in scripts for part in script.component.split("+")}:  # not of one that runs
        write_atomic(run.path / f"{component}-config.yaml", text)
    for script in scripts:
        script.write()


def _submitted(run: RunDir, script: Script, site: Site, *options: str) -> str:
    job = submit(script, *options, site=site)
    add_job(
        run,
        "submitted",
        component=script.component,
        backend="slurm",
        job=job,
        script=str(script.path),
        login=site.login,
    )
    return job
