"""Watches over training ranks and the evaluator beside them, and ends with the truth.

The evaluator is restarted when it dies and never ends training. The exit code is what `state.json` says, since torchrun
turns every rank's code into 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from configs.console import waiting
from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError
from configs.files.atomic import write_atomic
from configs.load import dump_config
from configs.log_stream import Relay
from configs.run.directory import RunDir
from configs.run.last_words import of_rank
from configs.scheduler import current_job
from configs.schema import Config
from launcher.backends.process import Started, Starter, ask_to_stop, last_lines
from launcher.backends.rank_ends import first_to_end, name_the_cause, sizes, without_a_word
from launcher.jobs.plan import SAVE_PATIENCE_S
from launcher.options import Resume
from launcher.restarts import RestartPolicy
from launcher.train.evaluator import EvalGroup
from launcher.train.interrupts import Deadline, Interrupts
from launcher.train.last_scores import print_scores, wait_for_scores
from launcher.train.start import check_start, explain_extension
from launcher.watch.run_index import remember
from trainer.faults.lock import FRESH_S, kept_free, sole_starter

POLL_S = 0.2
DYING_S = 30.0  # for the kernel to take down a killed rank with all its memory, and with it the lock
HANGING_S = 15.0  # for ranks to end after the run's last word; one that hangs in a collective never does
STATE_S = 1.0
STARTS_AGAIN = 20  # without a further step between


def supervise(config: Config, given: Config, starter: Starter, how: Resume, *, wait: bool, console: Console) -> int:
    """Has a starter train to the end, or go on with what is there; gives the exit code.

    Args:
        config: resolved for this machine: what is checked before ranks start.
        given: what the ranks are given. The same, unless they are on machines of another kind.
        wait: for the last scores.
    """
    return Supervisor(config, given, starter, how, console).run_to_end(wait=wait)


class Supervisor:
    """One `vernier train`: the ranks it starts, the evaluator beside them, and what the user asks for meanwhile."""

    def __init__(self, config: Config, given: Config, starter: Starter, how: Resume, console: Console) -> None:
        self.config, self.given, self.starter, self.how, self.console = config, given, starter, how, console
        self.run = RunDir(config.run_dir)
        self.evaluator = EvalGroup(given, self.run, console, starter) if config.eval.is_beside else None
        self.interrupts = Interrupts()
        self.relay = Relay(self.run.logs / starter.training_log) if starter.marked else None

    def run_to_end(self, *, wait: bool) -> int:
        """Checks, trains, waits for the last scores; gives the exit code.

        Raises:
            ConfigError: what was found wrong before a rank started.
        """
        with waiting("loading the libraries, and looking at the run and its data"):
            check_start(self.config, self.run, self.how, self._tell)
        if not self.run.twin.is_file():  # which is looked at by its run
            remember(self.run.path)
        with self.interrupts.heard():
            code = self._train_and_score(wait)
            if code == EXIT_DONE and self.config.eval.placement != "none":
                print_scores(self.run)
        return code

    def _train_and_score(self, wait: bool) -> int:
        from trainer.checkpoint.resume_compat import clear_unbegun

        with sole_starter(self.run):  # until the last score: two evaluators would write every table twice
            with kept_free(self.run):  # before an evaluator looks for what there is to score
                clear_unbegun(self.run, self.config, self._tell)
            if self.run.is_finished(self.config):
                self._tell(f"{self.run.path} is finished (step {self.config.steps})")
                code = EXIT_DONE
            else:
                explain_extension(self.config, self.run, self.how, self._tell)
                code = self._train()
            if self.evaluator is not None:
                if code == EXIT_DONE:
                    code = self._wait_for_scores(self.evaluator, wait)
                self.evaluator.end()
        return code

    def _wait_for_scores(self, evaluator: EvalGroup, wait: bool) -> int:
        asked = lambda: bool(self.interrupts.count)  # noqa: E731
        code = wait_for_scores(evaluator, self.run, asked, wait=wait, console=self.console)
        return self._code_of_stop() if code is None else code

    def _train(self) -> int:
        """Runs the training ranks, again and again where the run's state asks for it; gives the exit code."""
        self.run.stop_request.unlink(missing_ok=True)
        restarts = RestartPolicy(STARTS_AGAIN)
        while True:
            before = sizes(self.run.logs)
            ranks = self._start_ranks()
            if self.evaluator is not None and self.evaluator.process is None:
                self.evaluator.start()
            killed = self._watch(ranks)
            state = self.run.read_state()
            why, step = state.get("again"), int(state.get("step") or 0)
            if not why:
                return self._outcome(ranks.returncode or 0, killed, before)
            if self.interrupts.count:
                self._tell(f"stopped ({why}); the same command goes on")
                return self._code_of_stop()
            if restarts.after(step) is None:
                beyond = f"without getting beyond step {restarts.furthest}"
                self._fail(EXIT_FAILED, f"started again {STARTS_AGAIN} times {beyond}; the last reason: {why}")
                return EXIT_FAILED
            self.run.add_event("started again", why, step=step)
            self._tell(f"starting the ranks again: {why}")

    def _start_ranks(self) -> Started:
        # config.yaml itself is the trainer's to write, once it holds the lock.
        given = self.run.path / "train-config.yaml"
        with self._once_free():  # rank 0 of an earlier start may still be dying
            self.run.start_afresh("pending", steps=self.given.steps, job=current_job())
            write_atomic(given, dump_config(self.given))
        with waiting("starting the ranks: PyTorch, the model and the data are loaded"):
            return self.starter.train([*self.how.flags(), str(given)], self.run.logs)

    @contextmanager
    def _once_free(self) -> Iterator[None]:
        """Keeps trainers out, once killed ranks have let go: on another machine that is when they fall silent."""
        last = time.monotonic() + FRESH_S + DYING_S
        while True:
            with ExitStack() as kept:
                try:
                    kept.enter_context(kept_free(self.run, patience_s=DYING_S))
                except ConfigError:
                    if not self.starter.far or time.monotonic() > last:
                        raise
                    time.sleep(1.0)
                    continue
                yield
                return

    def _watch(self, ranks: Started) -> str:
        """Waits until the ranks have ended: asks them to stop when the user does, kills those that hang.

        Gives why it killed them, "" where it did not.
        """
        deadline, asked, looked, over_since, killed = Deadline(), 0, 0.0, math.inf, ""
        while ranks.poll() is None:
            now = time.monotonic()
            self._relay_lines()
            if self.interrupts.count > asked:
                asked = self.interrupts.count
                self._ask_to_stop(ranks, deadline, now, again=asked > 1)
            if now - looked > STATE_S:
                looked = now
                over_since = min(over_since, now) if self.run.read_state().get("exit_code") is not None else math.inf
            if now - over_since > HANGING_S and deadline.at > now:
                self.run.add_event("killed", f"ranks had not ended {HANGING_S:.0f} s after the run's last word")
                deadline.no_later_than(now, "after the run's last word")
            if now >= deadline.at:
                ranks.kill()  # they die with the agent; the last whole checkpoint stays
                killed = deadline.why
            if self.evaluator is not None and not asked:  # who signals all processes of a job hits the evaluator too
                self.evaluator.look_after(training=True)
            time.sleep(POLL_S)
        self._relay_lines()
        return killed

    def _ask_to_stop(self, ranks: Started, deadline: Deadline, now: float, *, again: bool) -> None:
        if again:
            deadline.no_later_than(now, "when asked to stop a second time")
            return
        try:
            write_atomic(self.run.stop_request, "interrupt" if self.interrupts.by_ctrl_c else "stop")
        except OSError:  # a full disk; the ranks are handed the signal
            ask_to_stop(self.starter, ranks, interrupt=self.interrupts.by_ctrl_c)
        deadline.no_later_than(now + SAVE_PATIENCE_S, f"{SAVE_PATIENCE_S} s after they were asked to stop")
        self._tell("stopping once this step has ended and its checkpoint is written; asked again, at once")

    def _outcome(self, returncode: int, killed: str, before: dict[str, int]) -> int:
        """The exit code that the run's state has; where the ranks could not say it, writes why. Says either."""
        name_the_cause(self.run, before)
        state = self.run.read_state()
        code = state.get("exit_code")
        if code is None:
            return self._without_last_word(returncode, killed, before)
        failure = state.get("failure")
        if failure:
            rank = failure["rank"]
            self._tell(f"error: {of_rank(rank, failure['error'])}")
            log = self.starter.training_log if rank is None else f"rank-{rank}.log"
            self._tell(f"its log: {self.run.logs / log}")
        elif code != EXIT_DONE:
            self._tell(f"stopped at step {state.get('step') or 0} with a checkpoint; the same command goes on")
        return int(code)

    def _without_last_word(self, returncode: int, killed: str, before: dict[str, int]) -> int:
        code = EXIT_INTERRUPTED if self.interrupts.by_ctrl_c else EXIT_FAILED
        how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        rank, words = first_to_end(self.run.logs, before, "train")
        with self._once_free():  # held by another trainer, which was quicker: the state is its own
            told = f"the training ranks {without_a_word(f'{self.starter.name}: {how}', words)}"
            if killed:
                rank, told = None, f"the training ranks were killed {killed}, before their checkpoint was whole"
            elif rank is not None:
                told = without_a_word(words)
            self._fail(code, told, rank)
        if code == EXIT_FAILED and returncode > 0:
            self._tell(last_lines(self.run.logs / self.starter.training_log))
        return code

    def _fail(self, code: int, why: str, rank: int | None = None) -> None:
        self.run.add_event("failed", why, rank=rank)
        self._tell(f"error: {of_rank(rank, why)}; the same command goes on from the last checkpoint")
        if not self.run.record_failure(code, rank, why):
            self._tell(f"error: {self.run.state} cannot be written")

    def _code_of_stop(self) -> int:
        return EXIT_INTERRUPTED if self.interrupts.by_ctrl_c else EXIT_STOPPED

    def _relay_lines(self) -> None:
        """Hands on what the ranks say to people."""
        for line in self.relay.new_lines() if self.relay is not None else ():
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tell(self, line: str) -> None:
        self.console.print(line, markup=False)
