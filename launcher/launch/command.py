"""`vernier launch`: plans a run's jobs, shows or submits them, and keeps what was submitted in the run directory."""

from __future__ import annotations

import sys

from rich.console import Console

from configs.console import console as people
from configs.console import tell
from configs.errors import EXIT_DONE, ConfigError
from launcher.jobs.plan import make_plan
from launcher.jobs.site import Site, load_site
from launcher.launch.on_slurm import on_slurm
from launcher.options import Launch, SweepAsked

BACKENDS = ("slurm", "local", "mpi", "ssh", "skypilot")


def run_launch(source: str, overrides: list[str], how: Launch, sweep: SweepAsked | None, console: Console) -> int:
    """Launches a run, or a sweep of runs, by the backend that was asked for; gives the exit code.

    Raises:
        ConfigError: an option has no such value, or does not go with the backend.
    """
    if how.on not in BACKENDS:
        raise ConfigError(f"--on: {how.on!r} is not known; expected one of {', '.join(BACKENDS)}")
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
        from launcher.launch.elsewhere import run_elsewhere

        return run_elsewhere(
            how.on,
            source,
            overrides,
            site,
            how.resume,
            hosts=how.hosts,
            runs=how.runs,
            dry_run=how.dry_run,
            console=people(sys.stderr, soft_wrap=True),
        )
    plan = make_plan(source, overrides, site, how.resume.flags())
    if plan.config.twins.count:
        tell("twins.count: is for vernier train; of a launched run, once it is done: vernier twin RUN", sys.stderr)
    return on_slurm(plan, how, console)


def _launch_sweep(
    source: str, overrides: list[str], how: Launch, sweep: SweepAsked, site: Site, console: Console
) -> int:
    if how.on == "slurm":
        from launcher.launch.sweep_array import launch_sweep

        return launch_sweep(source, overrides, sweep, site, how, console)
    if how.on != "local":
        raise ConfigError(f"--sweep: goes with --on slurm and --on local, not with --on {how.on}")
    from launcher.launch.sweep_here import run_local
    from launcher.sweep.members import members

    found = members(source, overrides, sweep.axes, sweep.seeds, sweep_dir=sweep.dir)
    if how.dry_run:
        for member in found.members:
            tell(f"{found.run(member).path}: {member.words}, seed {member.seed}")
        return EXIT_DONE
    return run_local(found, console=people(sys.stderr, soft_wrap=True))
