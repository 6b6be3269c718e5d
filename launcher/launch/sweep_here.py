"""A sweep's members trained on this machine, one after another."""

from __future__ import annotations

from rich.console import Console

from configs.console import console as people
from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, VernierError
from configs.load import load_config
from configs.run.directory import RunDir
from configs.yaml.text import parse_mapping
from eval.scored import loss_tables
from launcher.sweep.members import Sweep
from launcher.sweep.store import check_members, write_sweep


def run_local(sweep: Sweep, *, console: Console) -> int:
    """Trains the members here, one after the other, and shows what came of it; gives the exit code.

    One that fails does not keep the others from running. The same command goes on where this one was stopped.
    """
    check_members(sweep)
    write_sweep(sweep)
    failed: dict[str, str] = {}
    for place, member in enumerate(sweep.members, start=1):
        where = f"member {place} of {len(sweep.members)}: {member.name}"
        if _is_over(sweep.run(member)):
            console.print(f"{where} is finished and scored", markup=False)
            continue
        console.print(f"{where} ({member.words}, seed {member.seed})", markup=False)
        code, why = _train(sweep.run(member), console)
        if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            console.print(f"the sweep stopped at {member.name}; the same command goes on", markup=False)
            return code
        if code != EXIT_DONE:
            failed[member.name] = why
    from launcher.sweep.table import run_sweep_table

    for name, why in failed.items():
        console.print(f"error: {name} failed: {why}; the same command tries it again", markup=False)
    if len(failed) < len(sweep.members):
        run_sweep_table(sweep.path, False, people())
    return EXIT_FAILED if failed else EXIT_DONE


def _is_over(run: RunDir) -> bool:
    state = run.read_state()
    if state.get("state") != "done":
        return False
    settings = parse_mapping((run.path / "train-config.yaml").read_text(encoding="utf-8"), str(run.path))
    if settings["eval"]["placement"] == "none":
        return True
    last = max(run.whole_steps(run.snapshots), default=0)
    return last in loss_tables(run, None, None)


def _train(run: RunDir, console: Console) -> tuple[int, str]:
    """(exit code, why it failed) of a member's training."""
    from launcher.options import Resume
    from launcher.train.command import run_train

    try:
        code = run_train(load_config(run.path / "train-config.yaml"), Resume(), wait=True, console=console)
        failure = run.read_state().get("failure")
        why = failure["error"] if isinstance(failure, dict) else "its snapshots are not all scored"
        return code, str(why)
    except VernierError as error:
        console.print(f"error: {error}", markup=False)
        return error.exit_code, str(error)
