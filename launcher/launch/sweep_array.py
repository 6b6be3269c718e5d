"""`vernier launch --on slurm --sweep …`: a sweep as one job array, a task a member."""

from __future__ import annotations

import shlex
from dataclasses import replace

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError
from configs.load import load_config, with_absolute_paths
from launcher.backends.sbatch import Script, release, submit
from launcher.backends.slurm import render
from launcher.jobs.log import add_job, check_no_jobs
from launcher.jobs.plan import JobPlan, as_checked, plan_of
from launcher.jobs.site import Site
from launcher.launch.on_slurm import kept_only_if_submitted, tell_set_aside
from launcher.options import Launch, SweepAsked
from launcher.sweep.members import Sweep, members
from launcher.sweep.store import check_members, write_sweep
from launcher.watch.run_index import remember


def launch_sweep(
    source: str,
    overrides: list[str],
    sweep: SweepAsked,
    site: Site,
    how: Launch,
    console: Console,
) -> int:
    """Writes the members down and submits those that are not finished; gives the exit code.

    Raises:
        ConfigError: a member's settings are wrong, or it has a job already.
    """
    from trainer.faults.lock import sole_starter

    if load_config(source, overrides).eval.is_beside:
        overrides = [*overrides, "eval.placement=inline"]  # a task is a whole member; tables are the same
    if how.extend or how.force:
        raise ConfigError("--extend and --force-resume are for single runs, not for --sweep")
    asked = with_plans(members(source, overrides, sweep.axes, sweep.seeds, sweep_dir=sweep.dir), site)
    plan = plan_of_all(asked, site, sweep.at_once)
    (script,) = render(plan, how.template)
    tell_set_aside([script])
    if how.dry_run:
        print(f"# ---- {script.path}\n{script.text}", end="")
        return EXIT_DONE
    check_members(asked, as_checked, print)
    with kept_only_if_submitted(plan.run), sole_starter(plan.run):
        return _submit(asked, plan, script, sweep.at_once, console)


def _submit(asked: Sweep, plan: JobPlan, script: Script, at_once: int, console: Console) -> int:
    left = [at for at, member in enumerate(asked.members) if not asked.run(member).is_finished(member.config)]
    if not left:
        console.print(f"all members are finished: vernier compare {shlex.quote(str(asked.path))}", markup=False)
        return EXIT_DONE
    check_no_jobs([asked.run(asked.members[at]) for at in left])
    write_sweep(asked)
    for folder in (plan.run.logs, plan.run.scripts):
        folder.mkdir(parents=True, exist_ok=True)
    script.write()
    limit = f"%{at_once}" if at_once else ""
    # Held until all is written down: a task that began before would find what stood there of an earlier launch.
    job = submit(script, "--hold", f"--array={','.join(map(str, left))}{limit}", site=plan.site)
    for at in left:
        run, own = asked.run(asked.members[at]), f"{job}_{at}"
        facts = {"component": "train", "backend": "slurm", "script": str(script.path), "login": plan.site.login}
        add_job(run, "submitted", job=own, **facts)
        steps = asked.members[at].config.steps
        run.start_afresh("pending", steps=steps, job=own, job_ended=None)
        remember(run.path)
    release(job)
    console.print(
        f"job {job}: {len(left)} of {len(asked.members)} members in {asked.path}", markup=False, soft_wrap=True
    )
    console.print(f"what came of it: vernier compare {shlex.quote(str(asked.path))}", markup=False, soft_wrap=True)
    return EXIT_DONE


def with_plans(sweep: Sweep, site: Site) -> Sweep:
    """The sweep with each member's settings as its ranks are to have them."""
    planned = [replace(one, config=plan_of(with_absolute_paths(one.config), site).config) for one in sweep.members]
    return replace(sweep, members=tuple(planned))


def plan_of_all(sweep: Sweep, site: Site, at_once: int) -> JobPlan:
    """One plan for all members, whose jobs differ in nothing but their settings.

    Raises:
        ConfigError: jobs of members differ in size.
    """
    first = sweep.members[0].config
    plans = {plan_of(member.config, site).train for member in sweep.members}
    shapes = {(one.nodes, one.ranks_per_node, one.cpus_per_node, one.threads) for one in plans}
    if len(shapes) > 1:
        raise ConfigError("--sweep: members want jobs of different sizes; sweep those in launches of their own")
    place = first.run.model_copy(update={"dir": sweep.path})
    whole = first.model_copy(update={"name": f"{sweep.name}-sweep"[:100], "run": place})
    return replace(plan_of(whole, site), members=len(sweep.members), at_once=at_once)
