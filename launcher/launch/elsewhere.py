"""`vernier launch` by what is not a scheduler: here by torchrun or mpirun, on hosts by ssh, as a SkyPilot task file."""

from __future__ import annotations

import os
import shlex
from typing import Any

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError
from configs.load import load_config
from launcher.backends.hosts import read_hosts
from launcher.backends.mpi import with_mpirun
from launcher.backends.ssh import Ssh, _told_address, address_of, hosts_of, probe_hosts
from launcher.jobs.plan import JobPlan, make_plan
from launcher.jobs.site import Site
from launcher.options import Resume
from launcher.text import typed
from launcher.train.command import local_ranks, run_train


def run_elsewhere(
    on: str,
    source: str,
    overrides: list[str],
    site: Site,
    how: Resume,
    *,
    hosts: str | None = None,
    runs: str | None = None,
    dry_run: bool = False,
    console: Console,
) -> int:
    """Launches by `local`, `mpi`, `ssh` or `skypilot`; gives the exit code.

    Args:
        hosts: of mpi and ssh: names with commas between, or a file of them.
        runs: of skypilot: a bucket or volume for the run.

    Raises:
        ConfigError: settings or hosts are wrong.
    """
    if hosts is not None and on not in ("mpi", "ssh"):
        raise ConfigError(f"--hosts: goes with --on mpi and --on ssh, not with --on {on}")
    named = read_hosts(hosts) if hosts is not None else ()
    if on != "ssh":
        _check_site(on, site)
    if on == "skypilot":
        return write_task(_plan(source, overrides, site, how), runs, dry_run=dry_run, console=console)
    if on == "ssh":
        from launcher.backends.ssh import show_ssh

        plan = _plan(source, overrides, site, how)
        if dry_run:
            print("\n".join(show_ssh(plan, named)))
            return EXIT_DONE
        return run_ssh(plan, named, how, wait=True, console=console)
    os.environ.update(site.environment)  # ranks here inherit it
    names = tuple(site.environment)
    if dry_run:
        print("\n".join(_commands_here(on, source, overrides, named, names, how)))
        return EXIT_DONE
    starter = "mpirun" if on == "mpi" else "torchrun"
    config = load_config(source, overrides)
    return run_train(config, how, wait=True, console=console, starter=starter, hosts=named, names=names)


def _check_site(on: str, site: Site) -> None:
    """Refuses what a site profile says of ranks that are started another way, and would else be passed over.

    Raises:
        ConfigError: a line for each key.
    """
    refused: tuple[str, ...] = ("python", "modules", "setup", "environment_file")
    why = "whose ranks have this command's own Python and environment; set that up before"
    if on == "skypilot":
        refused = ("python", "modules", "environment_file")
        why = "which sets up rented machines by `make setup`; the profile's `setup` lines run before it"
    told = {key: getattr(site, key) for key in refused}
    told["container.kind"] = site.container.kind if site.container.kind != "none" else None
    problems = [
        f"--site: {key}: is not for --on {on}, {why}, and name a profile without it (an empty file will do)"
        for key, value in told.items()
        if value
    ]
    if problems:
        raise ConfigError(*problems)


def write_task(plan: JobPlan, runs: str | None, *, dry_run: bool, console: Console) -> int:
    """Writes the task file into RUN/jobs/, and says how to use it; with `dry_run` prints it, and does nothing else."""
    from configs.files.atomic import write_atomic
    from launcher.backends.skypilot import render_task, secret_names

    text = render_task(plan, runs=runs)
    if dry_run:
        print(text, end="")
        return EXIT_DONE
    path = plan.run.scripts / "task.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    words = "".join(f" --secret {name}" for name in secret_names())
    console.print(f"sky launch{words} {typed(path)}", markup=False, soft_wrap=True)
    return EXIT_DONE


def _plan(source: str, overrides: list[str], site: Site, how: Resume) -> JobPlan:
    if how.fresh:
        raise ConfigError("--fresh: is for vernier train")
    return make_plan(source, overrides, site, how.flags())


def _commands_here(
    on: str, source: str, overrides: list[str], hosts: tuple[str, ...], names: tuple[str, ...], how: Resume
) -> list[str]:
    """What would be started on this machine, a line a rank-group."""
    from configs.load import resolve, with_absolute_paths

    config = load_config(source, overrides)
    beside = config.eval.is_beside
    run = with_absolute_paths(config).run_dir
    train, score = [*how.flags(), str(run / "train-config.yaml")], [str(run / "eval-config.yaml")]
    if on == "mpi":
        *_, by = with_mpirun(config, hosts, names)
        commands = [by.train_command(train)[0], *([by.score_command(score)[0]] if beside else [])]
    else:
        here = local_ranks(resolve(config))
        commands = [here.training(train)[0].command(), *([here.scoring(score)[0].command()] if beside else [])]
    return [shlex.join(command) for command in commands]


def run_ssh(plan: JobPlan, hosts: tuple[str, ...], how: Any, *, wait: bool, console: Console) -> int:
    """Trains on the hosts to the end, or goes on with what is there; gives the exit code.

    Args:
        hosts: see `launcher.backends.hosts.read_hosts`. The first `launch.nodes` train, the next `eval.nodes` score.
        how: a `launcher.options.Resume`.

    Raises:
        ConfigError: a host cannot be reached or does not see what it must.
    """
    from launcher.jobs.plan import as_checked
    from launcher.train.supervise import supervise

    hosts, eval_hosts = hosts_of(plan, hosts)
    config = as_checked(plan.config)
    facts = probe_hosts(plan, tuple(dict.fromkeys(hosts + eval_hosts)))
    if eval_hosts[:1] == hosts[:1]:
        console.print(f"no host is left for the evaluator: it runs on {hosts[0]}, beside the training", markup=False)
    environment = {}
    if len({tuple(found["machine"]) for found in facts.values()}) == 1:
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    starter = Ssh(
        plan,
        hosts,
        eval_hosts,
        address_of(hosts, facts, _told_address(hosts, hosts)),
        address_of(eval_hosts, facts, _told_address(hosts, eval_hosts)) if eval_hosts else "",
        environment,
    )
    return supervise(config, plan.config, starter, how, wait=wait, console=console)
