"""`vernier launch`: plans a run's jobs, shows or submits them, and keeps what was submitted in the run directory."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError, DataError, VernierError
from configs.load import dump_config, load_config, resolve
from configs.rundir import RunDir
from configs.scheduler import NoAnswer, SlurmJob, slurm_jobs
from configs.schema import Config
from configs.terminal import console as people
from configs.terminal import tell
from configs.whole import read_json, write_atomic
from launcher.job_log import add_job, job_ids, live_jobs, read_jobs
from launcher.job_plan import JobPlan, make_plan
from launcher.known_runs import remember
from launcher.sbatch import Script, set_aside, submit
from launcher.scored import can_be_scored
from launcher.sites import Site, load_site
from launcher.slurm import render

BACKENDS = ("slurm", "local", "mpi", "ssh", "skypilot")


@dataclass(frozen=True)
class Launch:
    """How to launch."""

    on: str = "slurm"
    site: str | None = None
    dry_run: bool = False
    template: Path | None = None
    exclude_bad: bool = False
    extend: bool = False
    force: bool = False
    only: str | None = None  # a component
    hosts: str | None = None  # of mpi and ssh
    runs: str | None = None  # of skypilot: where the run outlives the nodes


@dataclass(frozen=True)
class SweepAsked:
    """A sweep, as it was asked for."""

    axes: tuple[str, ...]  # key=v1,v2
    seeds: int = 1
    dir: Path | None = None
    at_once: int = 0


def run_launch(source: str, overrides: list[str], how: Launch, sweep: SweepAsked | None, console: Console) -> int:
    """Launches a run, or a sweep of runs, by the backend that was asked for; gives the exit code."""
    if how.on not in BACKENDS:
        raise ConfigError(f"--on: {how.on!r} is not known; expected one of {', '.join(BACKENDS)}")
    flags = (*(("--extend",) if how.extend else ()), *(("--force-resume",) if how.force else ()))
    if how.only not in (None, "train", "eval"):
        raise ConfigError(f"--only: {how.only!r} is not known; expected train or eval")
    only_slurm = {"--template": how.template, "--exclude-bad": how.exclude_bad, "--only": how.only}
    wrong = [name for name, value in only_slurm.items() if value]
    if wrong and how.on != "slurm":
        raise ConfigError(f"{wrong[0]}: goes with --on slurm, not with --on {how.on}")
    site = load_site(how.site)
    if sweep is not None:
        return _launch_sweep(source, overrides, how, sweep, site, console)
    if how.on != "slurm":
        from launcher.backends import run_elsewhere
        from launcher.train import Resume

        resume = Resume(extend=how.extend, force=how.force)
        return run_elsewhere(
            how.on,
            source,
            overrides,
            site,
            resume,
            hosts=how.hosts,
            runs=how.runs,
            dry_run=how.dry_run,
            console=people(sys.stderr, soft_wrap=True),
        )
    plan = make_plan(source, overrides, site, flags)
    return on_slurm(plan, how, console)


def _launch_sweep(
    source: str, overrides: list[str], how: Launch, sweep: SweepAsked, site: Site, console: Console
) -> int:
    if how.on == "slurm":
        from launcher.launch_sweep import launch_sweep

        return launch_sweep(source, overrides, sweep, site, how, console)
    if how.on != "local":
        raise ConfigError(f"--sweep: goes with --on slurm and --on local, not with --on {how.on}")
    from launcher.sweep import run_local
    from launcher.sweep_members import members

    found = members(source, overrides, sweep.axes, sweep.seeds, sweep_dir=sweep.dir)
    if how.dry_run:
        for member in found.members:
            tell(f"{found.run(member).path}: {member.words}, seed {member.seed}")
        return EXIT_DONE
    return run_local(found, console=people(sys.stderr, soft_wrap=True))


def on_slurm(plan: JobPlan, how: Launch, console: Console) -> int:
    """Renders the jobs and submits them."""
    run = plan.run
    excluded = bad_nodes(run) if how.exclude_bad else ()
    scripts = render(plan, how.template, excluded)
    if how.only is not None:
        scripts = [script for script in scripts if script.component == how.only]
        if not scripts:
            raise ConfigError(
                f"--only: {how.only} is no job of its own with eval.placement: {plan.config.eval.placement}"
            )
    tell_set_aside(scripts)
    if how.dry_run:
        for script in scripts:
            print(f"# ---- {script.path}\n{script.text}", end="")
        return EXIT_DONE
    if how.only != "eval":
        _check(plan, how)
    from trainer.lock import sole_starter
    from trainer.run import finished

    with kept_only_if_submitted(run), sole_starter(run):
        run.check_files()
        if finished(run, plan.config) and plan.eval is not None and can_be_scored(run, plan.config):
            if plan.het:  # only a part of it is wanted
                beside = plan.config.eval.model_copy(update={"placement": "separate"})
                plan = replace(plan, config=plan.config.model_copy(update={"eval": beside}))
                scripts = render(plan, how.template, excluded)
            scripts = [script for script in scripts if script.component == "eval"]
        elif finished(run, plan.config):
            console.print(f"{run.path} is finished (step {plan.config.steps})", markup=False)
            return EXIT_DONE
        scoring = _live(run, "eval")
        if scoring and how.only is None and [script.component for script in scripts] == ["train", "eval"]:
            console.print(f"eval: job {scoring} goes on", markup=False)
            scripts = scripts[:1]
        live = check_no_job(run, {script.component for script in scripts})
        _write(plan, scripts)
        remember(run.path)
        for script in scripts:
            options = []
            if script.component == "eval" and live:
                options = [f"--dependency=after:{live}", "--kill-on-invalid-dep=yes"]
            try:
                job = _submitted(run, script, plan.site, *options)
            except VernierError as error:
                if script.component == "eval" and live:
                    raise _training_goes_on(error, live) from None
                raise
            if script.component != "eval":
                live = job
                run.start_afresh("pending", steps=plan.config.steps, job=job, job_ended=None)
            console.print(f"{script.component}: job {job}, {script.path}", markup=False, soft_wrap=True)
    console.print(f"how it stands: vernier status {shlex.quote(str(run.path))}", markup=False, soft_wrap=True)
    return EXIT_DONE


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
        elif not run.state.is_file() and run.scripts.is_dir():
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
    from trainer.check import check_run
    from trainer.lock import check_free

    check_free(plan.run, tell)
    check_run(as_checked(plan.config), extend=how.extend, force=how.force, tell=print)


def as_checked(config: Config) -> Config:
    """Settings to hold against what is there. What hangs on the machine of the ranks is as the run has it already."""
    run = RunDir(config.run_dir)
    if config.precision is None and run.config.is_file():
        config = config.model_copy(update={"precision": load_config(run.config).precision})
    return resolve(config, elsewhere=True)


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
        write_atomic(script.path, script.text)


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
