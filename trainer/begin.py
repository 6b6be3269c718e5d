"""The begin of a start of training: the run is held by one rank-group, checked, and its state says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from configs.console import is_supervised
from configs.errors import ConfigError
from configs.files.atomic import write_atomic
from configs.load import batch_problems, dump_config
from configs.run.directory import RunDir
from configs.scheduler import current_job
from configs.schema import Config
from eval.distributed.environment import start_began
from eval.distributed.ranks import PeerFailure, Ranks
from trainer.check import check_run
from trainer.checkpoint.resume_compat import check_changes, clear_unbegun, tell_forced
from trainer.faults.lock import RunLock
from trainer.stop_requests import Requests


@dataclass
class Context:
    """What every part of a training needs of its run.

    Attributes:
        console: on the first rank.
        attempt: once the run is held.
    """

    run: RunDir
    ranks: Ranks
    lock: RunLock
    requests: Requests
    console: Console | None
    attempt: int | None = None

    def tell(self, line: str) -> None:
        """Says a line to people."""
        if self.console is not None:
            self.console.print(line, markup=False)


def hold_run(context: Context) -> None:
    """Takes the run for this rank-group. A collective.

    Raises:
        ConfigError: another trainer holds it.
        PeerFailure: so on the other ranks; or one of this rank-group has failed already.
    """
    run, ranks = context.run, context.ranks
    if ranks.is_rank_zero:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.check_files()
            attempt = int(run.read_state().get("attempt") or 0) + 1
            context.lock.acquire(attempt)
            # What stands there is of another start, unless another rank of this one has failed already.
            if not run.take_up(None, since=start_began()):
                raise PeerFailure("another rank has failed before this one held the run")
            context.attempt = attempt
        except BaseException:  # another trainer's run: its state is not ours to write
            ranks.all_true(False)
            raise
    if not ranks.all_true(True):
        raise PeerFailure("the run is held by another trainer")


def begin_run(context: Context, config: Config, *, extend: bool, force: bool) -> tuple[dict[str, Any], Any]:
    """Checks the run that is held and begins it: gives (data facts, Hugging Face config). A collective.

    Raises:
        ConfigError: what is wrong, a line each.
    """
    run, ranks = context.run, context.ranks
    problems = list(batch_problems(config, ranks.world))
    if problems:
        raise ConfigError(*problems)
    # One rank tells, and none where `vernier` has told it already.
    tells = context.console is not None and not is_supervised()
    facts, hf = check_run(config, extend=extend, force=force, tell=context.tell if tells else None)
    if ranks.is_rank_zero:
        if force and context.console is not None:
            tell_forced(run, check_changes(config, extend=extend, force=True), context.tell)
        if not is_supervised():  # `vernier` has cleared it; what is there now was asked of this training
            run.stop_request.unlink(missing_ok=True)
        run.end_request.unlink(missing_ok=True)  # of a start with other settings; the evaluator asks again
        clear_unbegun(run, config, context.tell)
        _begin(run, config, context.attempt or 0)
    context.attempt = ranks.broadcast_int(context.attempt or 0)
    return facts, hf


def _begin(run: RunDir, config: Config, attempt: int) -> None:
    """Writes what a run directory starts with."""
    for folder in (run.checkpoints, run.snapshots, run.losses, run.logs):
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise ConfigError(
                f"run.dir: {folder} is no directory, or a link that leads nowhere; is its disk there?"
            ) from None
    if not run.config.is_file():  # else once the checkpoint is found to fit
        write_atomic(run.config, dump_config(config), durable=True)
    facts = {"attempt": attempt, "steps": config.steps, "job": current_job(), "job_ended": None, "ended_by": None}
    if not run.take_up("running", since=start_began(), **facts):
        raise PeerFailure("another rank has failed before the run began")
    run.add_event("started", f"attempt {attempt}", rank=0)
