"""The end of `vernier train`: waiting until the last snapshots are scored, and the table of all of them."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from configs.console import console as people
from configs.console import that_may_go
from configs.errors import EXIT_DONE, EXIT_FAILED
from configs.run.directory import RunDir
from eval.scored import loss_tables, unscored, why_unscored
from launcher.text import duration, typed
from launcher.train.evaluator import EvalGroup

POLL_S = 0.2
REMIND_S = 60.0  # of nothing scored; then after as long again, and again


def wait_for_scores(
    group: EvalGroup, run: RunDir, interrupted: Callable[[], bool], *, wait: bool, console: Console
) -> int | None:
    """Waits until all snapshots are scored; gives the exit code, None where the wait was interrupted."""
    waiting = unscored(run, group.config)
    if waiting and not wait:
        console.print(f"{waiting} snapshots are not scored yet; vernier train, once more, scores them", markup=False)
        return EXIT_DONE
    if waiting:
        console.print(f"waiting for {waiting} snapshots to be scored", markup=False)
    elif group.process is None:
        return EXIT_DONE
    from trainer.callbacks.progress import ProgressLine

    log = run.logs / "eval-rank-0.log"
    teller = ProgressLine(people(sys.stderr, force_terminal=False, soft_wrap=True), 1, 0, run.events)
    if group.process is None:
        group.start()
    since, remind = time.monotonic(), REMIND_S
    while group.look_after(training=False) and not interrupted():  # it ends by itself, with all it has to tell
        if teller.tell_events():
            since, remind = time.monotonic(), REMIND_S
        if time.monotonic() - since >= remind:
            console.print(
                f"still waiting for {unscored(run, group.config)} snapshots to be scored, of which none was for "
                f"{duration(remind)}; {log} says what the evaluator does. Ctrl-C ends the wait, and the same command "
                "scores the rest",
                markup=False,
            )
            remind *= 2
        time.sleep(POLL_S)
    teller.tell_events()
    if interrupted():
        console.print("stopped waiting; vernier train, once more, scores the rest", markup=False)
        return None
    left = why_unscored(run, group.config)
    if left:
        many = "1 snapshot" if len(left) == 1 else f"{len(left)} snapshots"
        console.print(f"error: {many} could not be scored; see {log}", markup=False)
        for line in left:
            console.print(f"  {line}", markup=False, soft_wrap=True)
        return EXIT_FAILED
    return EXIT_DONE


def print_scores(run: RunDir) -> None:
    """Prints the table of the run's scored steps, and where its files are. The run has ended, whoever reads this."""
    from eval.compare.along_run import compare_run
    from launcher.compare.report import print_run_table

    if not loss_tables(run, None, None):
        return
    sys.stdout = that_may_go(sys.stdout)
    out = people(sys.stdout)
    print_run_table(compare_run(run.path), out)
    out.print(f"\nrun        {typed(run.path)}", markup=False, soft_wrap=True)
    out.print(f"snapshots  {typed(run.snapshots)}", markup=False, soft_wrap=True)
    out.print(f"losses     {typed(run.losses)}", markup=False, soft_wrap=True)
    out.print(f"watch it   {_command()} board {typed(run.path)}", markup=False, soft_wrap=True)


def _command() -> str:
    """How one would type `vernier` here: after `make demo` the environment is not active."""
    own = Path(sys.executable).with_name("vernier")
    return typed(own) if shutil.which("vernier") is None and own.is_file() else "vernier"
