"""Verbs that look at runs and machines, and end runs: board, logs, stop, doctor, status."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import ConfigError
from launcher.cli.base import JsonOption, RunArgument, app, example, people


@app.command(epilog=example("vernier board runs/demo"))
def board(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Run directories; default all.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
) -> int:
    """Watch runs in TensorBoard, on loopback, with the ssh line to paste."""
    from launcher.watch.tensorboard import run_board

    return run_board(runs or [], port=port, console=people(out=True))


@app.command(epilog=example("vernier logs my-run", "vernier logs runs/demo --rank 3 --follow"))
def logs(
    run: RunArgument,
    rank: Annotated[int | None, typer.Option(min=0, help="Default: the first that failed, else 0.")] = None,
    evaluator: Annotated[bool, typer.Option("--eval", help="Of the eval rank-group.")] = False,
    job: Annotated[bool, typer.Option("--job", help="Of the job's script (with --eval: of its own).")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    lines: Annotated[int, typer.Option(min=1, help="How many to begin with.")] = 50,
) -> int:
    """Show a rank's log: the first that failed, else rank 0."""
    from launcher.watch.logs import Wanted, run_logs

    if job and rank is not None:
        raise ConfigError("--job is a log of its own; leave --rank out")
    wanted = Wanted(rank=rank, evaluator=evaluator, job=job)
    return run_logs(run, wanted, follow=follow, console=people(out=True), lines=lines)


@app.command(epilog=example("vernier stop my-run", "vernier stop runs/demo --now"))
def stop(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="With little patience for a checkpoint.")] = False,
) -> int:
    """Stop a run with a checkpoint, wherever it runs."""
    from launcher.watch.stop import run_stop

    return run_stop(run, now=now, console=people(out=True))


@app.command(epilog=example("vernier doctor", "vernier doctor runs/demo"))
def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run: its folder, its last preflight.")] = None,
    json_out: JsonOption = False,
) -> int:
    """Try whether this machine can train and score, and say what to do where it cannot."""
    from launcher.preflight.doctor import run_doctor

    return run_doctor(run, json_out=json_out, console=people(out=True))


@app.command(epilog=example("vernier status", "vernier status runs/demo --events"))
def status(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN", help="Run directories; default all.")] = None,
    events: Annotated[bool, typer.Option("--events", help="What happened besides steps, oldest first.")] = False,
    all_events: Annotated[bool, typer.Option("--all", help="With --events: all, not the last 50.")] = False,
    json_out: JsonOption = False,
) -> int:
    """Say how runs stand: step, loss, time left, checkpoints, scores, and why one has ended."""
    from launcher.watch.status import run_status

    if all_events and not events:
        raise ConfigError("--all goes with --events")
    return run_status(runs or [], events=events, all_events=all_events, json_out=json_out, console=people(out=True))
