"""A training run from its config to its end: set-up in order, then the loop, then the last word in `state.json`."""

from __future__ import annotations

import json
import os
import traceback
from functools import partial
from typing import Any, TextIO

from rich.console import Console

from configs.console import console as people
from configs.console import is_supervised
from configs.errors import EXIT_DONE, EXIT_FAILED, ConfigError, VernierError
from configs.fault_injection import reached
from configs.files.atomic import write_atomic
from configs.load import batch_problems, dump_config, micro_batch
from configs.run.directory import RunDir
from configs.run.last_words import follows_another
from configs.scheduler import current_job
from configs.schema import Config
from eval.distributed.environment import start_began
from eval.distributed.ranks import Ranks, StoppedByAnotherRank, join, leave, set_determinism
from trainer import stop_requests
from trainer.check import check_run
from trainer.checkpoint.checkpoint import Clock, clear_up, load_checkpoint
from trainer.checkpoint.checkpointer import Due, RunSaves
from trainer.checkpoint.find_whole import find_whole_checkpoint
from trainer.checkpoint.resume_compat import check_changes, clear_unbegun, tell_forced
from trainer.data.integrity import DataWatch
from trainer.data.shards import Windows
from trainer.engine.build import make_engine
from trainer.engine.ema import MovingAverage
from trainer.faults.adaptations import (
    StartAgain,
    adapted,
    after_out_of_memory,
    is_out_of_memory,
    no_memory,
    shared_adaptations,
)
from trainer.faults.guards import Guard, recent_losses
from trainer.faults.lock import RunLock
from trainer.faults.watchdog import Watchdog
from trainer.inline_scoring import InlineScoring
from trainer.loop import Hooks, train
from trainer.metrics import Metrics, write_manifest
from trainer.model.build import TrainableLM, checkpoints_activations, make_model, parameter_count
from trainer.model.dropout import WindowDropout
from trainer.model.effects import check_losses
from trainer.progress import ProgressLine


def finished(run: RunDir, config: Config) -> bool:
    """Whether the run has made all its steps."""
    state = run.read_state()
    return state.get("state") == "done" and int(state.get("step") or 0) >= config.steps


def run_training(config: Config, terminal: TextIO, *, extend: bool = False, force_resume: bool = False) -> int:
    """Trains as one rank of a rank-group; gives the exit code that rank 0 wrote into `state.json`.

    Raises:
        VernierError: told in `state.json` before it is raised.
    """
    run = RunDir(config.run_dir)
    ranks = join(config.threads_per_rank or 1)
    reached("joined")
    set_determinism(bool(config.deterministic))
    requests = stop_requests.Requests(run.stop_request, run.save_request, watch_files=ranks.first)
    console = people(terminal, soft_wrap=True) if ranks.first else None
    lock = RunLock(run)
    attempt = None  # ours, once we hold the run
    try:
        if ranks.first:
            try:
                run.path.mkdir(parents=True, exist_ok=True)
                run.check_files()
                attempt = int(run.read_state().get("attempt") or 0) + 1
                lock.acquire(attempt)
                # What stands there is of another start, unless another rank of this one has failed already.
                if not run.take_up(None, since=start_began()):
                    raise StoppedByAnotherRank("another rank has failed before this one held the run")
            except BaseException:
                attempt = None  # another trainer's run: its state is not ours to write
                ranks.agree(False)
                raise
        if not ranks.agree(True):
            raise StoppedByAnotherRank("the run is held by another trainer")
        problems = list(batch_problems(config, ranks.world))
        if problems:
            raise ConfigError(*problems)
        tell = None  # one rank tells, and none where `vernier` has told it already
        if console is not None and not is_supervised():
            tell = partial(console.print, markup=False)
        facts, hf = check_run(config, extend=extend, force=force_resume, tell=tell)
        if ranks.first:
            if force_resume and console is not None:
                changes = check_changes(config, extend=extend, force=True)
                tell_forced(run, changes, lambda told: console.print(told, markup=False))
            if not is_supervised():  # `vernier` has cleared it; what is there now was asked of this training
                run.stop_request.unlink(missing_ok=True)
            clear_unbegun(run, config, lambda told: console.print(told, markup=False) if console else None)
            begin_run(run, config, attempt or 0)
        attempt = ranks.broadcast_int(attempt or 0)
        code = _train(config, run, ranks, facts, hf, requests, lock, console)
    except BaseException as error:
        error.__dict__["recorded"] = _record_failure(run, ranks, error, attempt, lock)
        raise
    lock.release()
    leave()
    return code


def begin_run(run: RunDir, config: Config, attempt: int) -> None:
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
    facts = {"attempt": attempt, "steps": config.steps, "job": current_job(), "job_ended": None}
    if not run.take_up("running", since=start_began(), **facts):
        raise StoppedByAnotherRank("another rank has failed before the run began")
    run.add_event("started", f"attempt {attempt}", rank=0)


def _train(
    config: Config,
    run: RunDir,
    ranks: Ranks,
    facts: dict[str, Any],
    hf: Any,
    requests: stop_requests.Requests,
    lock: RunLock,
    console: Console | None,
) -> int:
    if ranks.first:
        clear_up(run)
    adaptations = shared_adaptations(run, ranks)
    given, config = config, adapted(config, adaptations)
    watchdog = Watchdog(run, ranks, config.guards.hang_s)
    watchdog.start()
    checkpoint, damaged = find_whole_checkpoint(run, ranks)
    model = TrainableLM(make_model(config, hf))
    check_losses(config.model.fields, hf.model_type, adds=model.adds)
    parameters = parameter_count(model)
    dropout = WindowDropout(model.lm)
    try:
        engine, resolved = make_engine(config, model, ranks.world)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        doing = "setting up the model and the optimizer"
        raise no_memory(config, rank=ranks.rank, world=ranks.world, doing=doing) from error
    micro = micro_batch(config, ranks.world)
    accumulation = config.batch.global_ // (ranks.world * micro)
    clock = Clock()
    average = MovingAverage(engine, config.ema.decay) if config.ema.decay is not None else None
    passed_over = set(adaptations.passed_over)
    if checkpoint is not None:
        clock, written_by = load_checkpoint(engine, checkpoint, accumulation, average)
        passed_over.update(written_by.get("passed_over", ()))
    losses = recent_losses(run, ranks, clock.step, config.guards.spike_steps)
    data = Windows(config.data_dir, config.sequence_length)
    watch = DataWatch(config.data_dir, clock.step, active=ranks.local_rank == 0)
    inline = InlineScoring(engine, config, hf, ranks) if config.eval.placement == "inline" else None

    metrics, line = None, None
    if ranks.first:
        assert console is not None
        write_atomic(run.config, dump_config(given), durable=True)
        write_atomic(run.path / "deepspeed.json", json.dumps(resolved, indent=1))
        write_manifest(
            run,
            config,
            {
                "data": facts["fingerprints"],
                "parameters": parameters,
                "ranks": ranks.world,
                "threads_per_rank": config.threads_per_rank,
                "micro": micro,
                "accumulation": accumulation,
            },
        )
        metrics = Metrics(run, config, step=clock.step, parameters=parameters, check_current=lock.check_current)
        console.print(
            f"{run.path.name}: {parameters:,} parameters, {len(data):,} windows of {config.sequence_length} tokens, "
            f"{ranks.world} ranks × {micro} × {accumulation} = batch {config.batch.global_}, "
            f"{config.precision}, ZeRO-{config.zero.stage}",
            markup=False,
        )
        if checkpoint is not None:
            world, stage = written_by["world"], written_by["zero_stage"]
            told = f"going on from step {clock.step}, written by {world} ranks at ZeRO-{stage}"
            told += "".join(f"; {one}; its steps are made again" for one in damaged)
            run.add_event("resumed", told, step=clock.step, rank=0)
            console.print(told, markup=False)
            _tell_average(run, clock, before=written_by["ema_decay"], now=config.ema.decay)
        line = ProgressLine(console, config.steps, clock.step, run.events)

    def tell(line: str) -> None:
        if console is not None:
            console.print(line, markup=False)

    saves = RunSaves(
        engine,
        config,
        hf,
        ranks,
        requests=requests,
        average=average,
        metrics=metrics,
        passed_over=passed_over,
        check_current=lock.check_current,
        tell=tell,
    )

    def observe(measured: dict[str, Any]) -> None:
        if metrics is not None and line is not None:
            metrics.add(measured)
            line.step(measured)
        guard.observe(measured)

    def save(at: Clock, due: Due) -> None:
        try:
            # A disk may be slow for as long as it likes; a rank that is frozen or dead is seen all the same.
            with watchdog.paused("saving"):
                saves.save(at, due)
            if inline is not None and due.snapshot:
                with watchdog.paused("scoring"):
                    source = saves.shown(at.step)
                    if source is not None:
                        inline.score(at.step, source)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            doing = f"saving or scoring step {at.step}"  # a smaller micro-batch would not help
            raise no_memory(config, rank=ranks.rank, world=ranks.world, doing=doing) from error

    def updated() -> None:
        if average is not None:
            average.update()

    def finish_saving() -> None:
        with watchdog.paused("saving"):
            saves.wait()

    guard = Guard(config, run, ranks, data, losses=losses, passed_over=passed_over, finish_saving=finish_saving)
    if inline is not None and checkpoint is not None:  # killed between the checkpoint and the score of this step?
        with watchdog.paused("scoring"):
            source = saves.shown_before(clock.step)
            if source is not None:
                inline.score(clock.step, source)
    made = clock.step

    def mark(step: int) -> None:
        nonlocal made
        made = step
        watchdog.mark(step)
        watch.check()

    hooks = Hooks(observe, save, saves.before_update, updated, mark)
    try:
        clock, stopped, interrupted = train(engine, config, data, ranks, clock, requests, dropout, guard, hooks)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        after_out_of_memory(
            config,
            run,
            error,
            rank=ranks.rank,
            world=ranks.world,
            step=made + 1,
            checkpoints=checkpoints_activations(hf),
        )
    if not stopped:
        with watchdog.paused("checking the data"):
            watch.finish()
    with watchdog.paused("saving"):
        saves.finish(clock.step)
    code = stop_requests.exit_code(interrupted) if stopped else EXIT_DONE
    if inline is not None:
        inline.close()
    if metrics is not None and line is not None:
        line.tell_events()
        line.close()
        metrics.close()
        if not stopped:
            requests.saved()  # asked for after the last look: the last step has its snapshot and checkpoint
        run.stop_request.unlink(missing_ok=True)
        run.write_state("stopping" if stopped else "done", step=clock.step, exit_code=code)
        run.add_event("stopped" if stopped else "done", f"at step {clock.step}", step=clock.step, rank=0)
    watchdog.stop()
    ranks.barrier()
    return code


def _tell_average(run: RunDir, clock: Clock, *, before: float | None, now: float | None) -> None:
    """Says where the moving average of the weights begins or ends with this checkpoint."""
    if before is None and now is not None:
        told = f"the checkpoint has no moving average of the weights; it starts from those of step {clock.step}"
    elif before is not None and now is None:
        told = "the checkpoint's moving average of the weights is ignored, since ema.decay is null"
    else:
        return
    run.add_event("ema", told, step=clock.step, rank=0)


def _record_failure(run: RunDir, ranks: Ranks, error: BaseException, attempt: int | None, lock: RunLock) -> bool:
    """Tells the first failure in `state.json`: torchrun turns every exit code into 1. Gives whether it stands there.

    Args:
        attempt: of this rank-group; None where it does not hold the run, or this rank does not know yet.
    """
    if isinstance(error, StoppedByAnotherRank):
        return True  # by that one
    if (ranks.first and attempt is None) or not run.path.is_dir():
        return False
    said = str(error).strip() or type(error).__name__
    if not isinstance(error, VernierError):
        said = f"{type(error).__name__}: {said.splitlines()[0]}"
        if isinstance(error, OSError) and error.filename is not None:
            said = f"{os.fsdecode(error.filename)}: {error.strerror}; once that is mended, the same command goes on"
        if follows_another(said):  # gloo's words for a rank that was killed; it could not say so itself
            said = f"another rank has ended without a word, see logs/ ({said})"
        traceback.print_exc()
    code = error.exit_code if isinstance(error, VernierError) else EXIT_FAILED
    state = run.read_state()
    begun = attempt is not None and state.get("attempt") == attempt
    if not lock.still_ours() if ranks.first else attempt is not None and not begun:
        return False  # another attempt's by now
    failure = state.get("failure") or {}
    if begun and (state.get("again") or (failure and (not failure.get("follows") or follows_another(said)))):
        return True  # what another rank has told first is why this one fails
    if isinstance(error, StartAgain):
        run.write_state("stopping", exit_code=code, again=said)
        return True
    run.add_event("failed", said, rank=ranks.rank)
    return run.record_failure(code, ranks.rank, said, begun=begun, since=start_began())
