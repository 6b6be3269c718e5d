"""A training run from its config to its end: hold the run, set up, go on from a checkpoint, train, the last word."""

from __future__ import annotations

import json
from typing import Any, TextIO

from configs.console import console as people
from configs.errors import EXIT_DONE
from configs.fault_injection import reached
from configs.files.atomic import write_atomic
from configs.load import dump_config, micro_batch, pass_words
from configs.memory.step_time import Work
from configs.run.directory import RunDir
from configs.schema import Config
from eval.distributed.ranks import join, leave, set_determinism
from eval.scoring.model_shapes import model_shapes
from trainer import stop_requests
from trainer.begin import Context, begin_run, hold_run
from trainer.callbacks.callback import RunContext
from trainer.callbacks.dispatch import Callbacks, find_callbacks
from trainer.callbacks.inline_scoring import InlineScoring
from trainer.callbacks.metrics import Metrics, write_manifest
from trainer.callbacks.progress import ProgressLine
from trainer.checkpoint.checkpoint import Clock, clear_up, load_checkpoint
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.find_whole import find_whole_checkpoint
from trainer.data.examples import open_windows
from trainer.data.integrity import DataWatch
from trainer.engine.build import make_engine
from trainer.engine.ema import EmaWeights
from trainer.engine.twin import read_twin
from trainer.faults.adaptations import adapted, adapting_to_memory, memory_errors, shared_adaptations
from trainer.faults.dry_batch import fitted
from trainer.faults.failure import record_failure
from trainer.faults.guards import Guard, recent_losses
from trainer.faults.lock import RunLock
from trainer.faults.watchdog import Watchdog
from trainer.loop import Loop, Outcome
from trainer.model.build import checkpoints_activations, kind_of, make_model
from trainer.model.dropout import WindowDropout
from trainer.model.effects import check_losses
from trainer.objectives import objective_of
from trainer.objectives.objective import parameter_count
from trainer.utilisation import Utilisation, peak_flops


def run_training(config: Config, terminal: TextIO, *, extend: bool = False, force_resume: bool = False) -> int:
    """Trains as one rank of a rank-group; gives the exit code that rank 0 wrote into `state.json`.

    Raises:
        VernierError: told in `state.json` before it is raised.
    """
    run = RunDir(config.run_dir)
    ranks = join(config.threads_per_rank or 1)
    reached("joined")
    set_determinism(bool(config.deterministic))
    requests = stop_requests.Requests(run, watch_files=ranks.is_rank_zero)
    console = people(terminal, soft_wrap=True) if ranks.is_rank_zero else None
    context = Context(run, ranks, RunLock(run), requests, console)
    try:
        hold_run(context)
        facts, hf = begin_run(context, config, extend=extend, force=force_resume)
        training = Training(context, config, facts, hf)
        training.resume()
        code = training.last_word(training.fit())
    except BaseException as error:
        error.__dict__["recorded"] = record_failure(run, ranks, error, context.attempt, context.lock)
        raise
    context.lock.release()
    leave()
    return code


class Training:
    """A training on one rank: set up when made, then `resume`, `fit` and `last_word`, each once and on every rank."""

    def __init__(self, context: Context, given: Config, facts: dict[str, Any], hf: Any) -> None:
        """
        Args:
            given: the settings as the user has them; what the run has adapted is put in here.
            facts: of the prepared data.
            hf: the model's Hugging Face config.
        """
        run, ranks = context.run, context.ranks
        if ranks.is_rank_zero:
            clear_up(run)
        adaptations = shared_adaptations(run, ranks)
        self.context, self.run, self.ranks, self.facts, self.hf = context, run, ranks, facts, hf
        self.watchdog = Watchdog(run, ranks, given.guards.hang_s)
        self.watchdog.start()
        self.checkpoint, self.damaged = find_whole_checkpoint(run, ranks)
        self.twin = read_twin(run, self.checkpoint)
        self.given, self.config = given, adapted(given, adaptations)
        if self.checkpoint is None:  # else its steps were made with what fits
            self.config, adaptations = fitted(given, adaptations, run, ranks, hf)
        self.passed_over = set(adaptations.passed_over)
        self.objective = objective_of(self.config)
        model: Any = self.objective.module(make_model(self.config, hf))
        if self.twin is not None and self.checkpoint is None:
            self.twin.move_model(model.lm)
        if kind_of(self.config) == "causal":
            check_losses(self.config.model.fields, hf.model_type, adds=model.adds)
        self.parameters = parameter_count(model)
        peak, work = peak_flops(self.config), Work.of(model_shapes(model.lm), self.config.sequence_length)
        self.utilisation = Utilisation(work, ranks.world, peak) if peak is not None else None
        self.dropout = WindowDropout(model.lm)
        with memory_errors(self.config, ranks, "setting up the model and the optimizer"):
            self.engine, self.resolved = make_engine(self.config, model, ranks.world)
        self.micro = micro_batch(self.config, ranks.world)
        self.accumulation = self.config.batch.global_ // (ranks.world * self.micro)
        decay = self.config.ema.decay
        self.average = EmaWeights(self.engine, decay) if decay is not None else None
        self.data = open_windows(self.config, self.config.data_dir, facts["prefix_id"])
        self.clock = Clock()

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one; makes what is called around steps."""
        written_by: dict[str, Any] = {}
        if self.checkpoint is not None:
            moved = None if self.twin is None else self.twin.moved
            made = load_checkpoint(self.engine, self.checkpoint, self.accumulation, self.average, moved)
            self.clock, written_by = made
            self.passed_over.update(written_by.get("passed_over", ()))
        config, run, ranks, step = self.config, self.run, self.ranks, self.clock.step
        losses = recent_losses(run, ranks, step, config.guards.spike_steps)
        self.data_watch = DataWatch(config.data_dir, step, active=ranks.local_rank == 0)
        inline = InlineScoring(self.engine, config, self.hf, ranks) if config.eval.placement == "inline" else None
        metrics = self._open_outputs() if ranks.is_rank_zero else None
        if ranks.is_rank_zero and self.checkpoint is not None:
            self._tell_resumed(written_by)
        self.checkpointer = Checkpointer(
            self.engine,
            config,
            self.hf,
            ranks,
            requests=self.context.requests,
            average=self.average,
            flush=metrics.flush if metrics is not None else lambda: None,
            sync=metrics.sync if metrics is not None else lambda: None,
            passed_over=self.passed_over,
            check_current=self.context.lock.check_current,
            tell=self.context.tell,
        )
        self.guard = Guard(
            config,
            run,
            ranks,
            self.data,
            losses=losses,
            passed_over=self.passed_over,
            finish_saving=self._finish_saving,
        )
        line = None
        if self.context.console is not None:
            line = ProgressLine(self.context.console, config.steps, step, run.events)
        ours = [one for one in (self.data_watch, self.average, inline, metrics, line, self.guard) if one is not None]
        self.callbacks = Callbacks(ours, may_fail=config.callbacks_may_fail, dropped=self._tell_dropped)
        for name, kind in zip(config.callbacks, find_callbacks(config.callbacks), strict=True):
            about = RunContext(config, run.path, ranks.rank, ranks.world, step, self.engine.module)
            self.callbacks.add(name, kind, about)
        if inline is not None and self.checkpoint is not None:
            with self.watchdog.paused("scoring"):
                inline.catch_up(step)

    def fit(self) -> Outcome:
        """Makes the steps that are left, or stops when asked to; all is saved after it."""
        loop = Loop(
            self.engine,
            self.config,
            self.objective,
            self.data,
            self.ranks,
            self.clock,
            self.context.requests,
            self.dropout,
            self.guard,
            self.checkpointer,
            self.callbacks,
            self.watchdog,
            self.utilisation,
        )
        making, can_checkpoint = lambda: loop.clock.step + 1, checkpoints_activations(self.hf, kind_of(self.config))
        with adapting_to_memory(self.config, self.run, self.ranks, step=making, checkpoints=can_checkpoint):
            outcome = loop.run()
        if not outcome.stopped:
            with self.watchdog.paused("checking the data"):
                self.data_watch.finish()
        with self.watchdog.paused("saving"):
            self.checkpointer.finish(outcome.clock.step)
        loop.tell_saved(everywhere=True)
        self.callbacks.on_end(outcome.clock.step)
        return outcome

    def last_word(self, outcome: Outcome) -> int:
        """Says in the run's state how it ended; gives the exit code."""
        code = stop_requests.exit_code(outcome.interrupted) if outcome.stopped else EXIT_DONE
        step = outcome.clock.step
        if self.ranks.is_rank_zero:
            if not outcome.stopped:  # asked for after the last look: the last step has its snapshot and checkpoint
                self.context.requests.saved()
            self.run.stop_request.unlink(missing_ok=True)
            ended = {} if outcome.stopped or step == self.config.steps else self.context.requests.ended_by
            self.run.write_state(
                "stopping" if outcome.stopped else "done", step=step, exit_code=code, ended_by=ended or None
            )
            self.run.end_request.unlink(missing_ok=True)  # the state has it
            told = f"at step {step}" + (f", by {ended['key']}: {ended['why']}" if ended else "")
            self.run.add_event("stopped" if outcome.stopped else "done", told, step=step, rank=0)
            if ended:
                self.context.tell(f"ended {told}")
        self.watchdog.stop()
        self.ranks.barrier()
        return code

    def _open_outputs(self) -> Metrics:
        """What a start leaves in the run's directory and says to people. On the first rank."""
        config, run = self.config, self.run
        write_atomic(run.config, dump_config(self.given), durable=True)
        write_atomic(run.path / "deepspeed.json", json.dumps(self.resolved, indent=1))
        made_of = {
            "data": self.facts["fingerprints"],
            "parameters": self.parameters,
            "ranks": self.ranks.world,
            "threads_per_rank": config.threads_per_rank,
            "micro": self.micro,
            "accumulation": self.accumulation,
        }
        write_manifest(run, config, made_of)
        current = self.context.lock.check_current
        metrics = Metrics(run, config, step=self.clock.step, parameters=self.parameters, check_current=current)
        self.context.tell(
            f"{run.path.name}: {self.parameters:,} parameters, "
            f"{len(self.data):,} windows of {config.sequence_length} tokens, "
            f"{config.precision}, ZeRO-{config.zero.stage}"
        )
        self.context.tell(f"data: {pass_words(len(self.data), config)}")
        self.context.tell(
            f"a step: {self.ranks.world} ranks × {self.micro} × {self.accumulation} = batch {config.batch.global_}, "
            f"× {config.sequence_length} = {config.batch.global_ * config.sequence_length:,} tokens"
        )
        return metrics

    def _tell_resumed(self, written_by: dict[str, Any]) -> None:
        world, stage, step = written_by["world"], written_by["zero_stage"], self.clock.step
        told = f"going on from step {step}, written by {world} ranks at ZeRO-{stage}"
        told += "".join(f"; {one}; its steps are made again" for one in self.damaged)
        self.run.add_event("resumed", told, step=step, rank=0)
        self.context.tell(told)
        before, now = written_by["ema_decay"], self.config.ema.decay
        if before is None and now is not None:
            told = f"the checkpoint has no moving average of the weights; it starts from those of step {step}"
            self.run.add_event("ema", told, step=step, rank=0)
        elif before is not None and now is None:
            told = "the checkpoint's moving average of the weights is ignored, since ema.decay is null"
            self.run.add_event("ema", told, step=step, rank=0)

    def _tell_dropped(self, told: str) -> None:
        self.run.add_event("callback dropped", told, rank=self.ranks.rank)
        self.context.tell(told)

    def _finish_saving(self) -> None:
        with self.watchdog.paused("saving"):
            self.checkpointer.wait()
