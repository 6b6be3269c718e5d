"""`vernier launch`: plans a run's jobs, shows or submits them, and keeps what was submitted in the run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError, DataError
from configs.load import dump_config, resolve
from configs.rundir import RunDir
from configs.whole import read_json, write_atomic
from launcher.job_log import add_job, live_jobs
from launcher.job_plan import JobPlan, make_plan
from launcher.sites import Site, load_site
from launcher.slurm import Script, render, submit

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


def run_launch(source: str, overrides: list[str], how: Launch, console: Console) -> int:
    """Launches a run by the backend that was asked for; gives the exit code."""
    if how.on not in BACKENDS:
        raise ConfigError(f"--on: {how.on!r} is not known; expected one of {', '.join(BACKENDS)}")
    flags = (*(("--extend",) if how.extend else ()), *(("--force-resume",) if how.force else ()))
    plan = make_plan(source, overrides, load_site(how.site), flags)
    return on_slurm(plan, how, console)


def on_slurm(plan: JobPlan, how: Launch, console: Console) -> int:
    """Renders the jobs and submits them."""
    run = plan.run
    excluded = bad_nodes(run) if how.exclude_bad else ()
    scripts = render(plan, how.template, excluded)
    if how.dry_run:
        for script in scripts:
            print(f"# ---- {script.path}\n{script.text}", end="")
        return EXIT_DONE
    _check(plan, how)
    from trainer.lock import sole_starter
    from trainer.run import finished

    config = resolve(plan.config)
    with sole_starter(run):
        if finished(run, config):
            console.print(f"{run.path} is finished (step {config.steps})", markup=False)
            return EXIT_DONE
        check_no_job(run)
        _write(plan, scripts)
        train = _submitted(run, scripts[0], plan.site)
        run.write_state("pending", exit_code=None, failure=None, again=None, steps=config.steps, job=train)
        told = [f"{scripts[0].component}: job {train}, {scripts[0].path}"]
        if len(scripts) > 1:
            job = _submitted(run, scripts[1], plan.site, f"--dependency=after:{train}", "--kill-on-invalid-dep=yes")
            told.append(f"{scripts[1].component}: job {job}, {scripts[1].path}")
    for line in told:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"vernier status {run.path}: how it stands; vernier logs, vernier stop", markup=False, soft_wrap=True)
    return EXIT_DONE


def _check(plan: JobPlan, how: Launch) -> None:
    """Refuses here what the ranks would refuse later."""
    from trainer.lock import check_free
    from trainer.run import check_run

    check_free(plan.run, lambda line: print(line))
    check_run(resolve(plan.config), extend=how.extend, force=how.force)


def check_no_job(run: RunDir) -> None:
    """Refuses a run that has a job.

    Raises:
        ConfigError: names the job, and what it does.
    """
    live = live_jobs(run)
    if live is None:
        raise ConfigError("--on: slurm: squeue does not answer, so that nobody knows whether the run has a job already")
    if live:
        named = ", ".join(f"job {job.job} ({job.state.lower()})" for job in live.values())
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
    for component in plan.components:
        write_atomic(run.path / f"{component.name}-config.yaml", text)
    for script in scripts:
        write_atomic(script.path, script.text)


def _submitted(run: RunDir, script: Script, site: Site, *options: str) -> str:
    job = submit(script, *options)
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
