"""Watches over training ranks and the evaluator beside them, and ends with the truth.

The evaluator is restarted when it dies and never ends training. The exit code is what `state.json` says, since torchrun
turns every rank's code into 1.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType

from rich.console import Console

from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError
from configs.files.atomic import write_atomic
from configs.load import dump_config, load_config
from configs.log_stream import Relay
from configs.run.directory import RunDir
from configs.run.last_words import of_rank
from configs.scheduler import NoAnswer, current_job
from configs.schema import Config
from launcher.backends.agent import one_thread
from launcher.backends.process import Started, Starter, ask_to_stop, last_lines
from launcher.backends.rank_ends import first_to_end, name_the_cause, sizes, without_a_word
from launcher.jobs.log import job_ids, live_jobs, read_jobs
from launcher.jobs.plan import SAVE_PATIENCE_S
from launcher.options import Resume
from launcher.train.evaluator import EvalGroup
from launcher.train.last_scores import print_scores, wait_for_scores
from launcher.watch.run_index import remember
from trainer.faults.lock import FRESH_S, check_free, kept_free, sole_starter
from trainer.stop_requests import ONE_WISH_S

POLL_S = 0.2
DYING_S = 30.0  # for the kernel to take down a killed rank with all its memory, and with it the lock
HANGING_S = 15.0  # for ranks to end after the run's last word; one that hangs in a collective never does
STATE_S = 1.0
STARTS_AGAIN = 20  # without a further step between


@dataclass
class Interrupts:
    """How often the user asked to stop, and whether by Ctrl-C."""

    count: int = 0
    by_ctrl_c: bool = False
    heard: dict[int, float] = field(default_factory=dict)  # when each kind came first

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
            signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.heard.setdefault(number, now)
        # Else one wish, heard twice: by `timeout`, systemd or Slurm, each of which may signal more than once.
        if not self.count or number == signal.SIGINT or now - first > ONE_WISH_S:
            self.count += 1
        self.by_ctrl_c |= number == signal.SIGINT


def supervise(config: Config, given: Config, starter: Starter, how: Resume, *, wait: bool, console: Console) -> int:
    """Has a starter train to the end, or go on with what is there; gives the exit code.

    Args:
        config: resolved for this machine: what is checked before ranks start.
        given: what the ranks are given. The same, unless they are on machines of another kind.
    """
    run = RunDir(config.run_dir)
    with one_thread():
        from trainer.check import check_run
        from trainer.checkpoint.resume_compat import clear_unbegun

    def tell(line: str) -> None:
        console.print(line, markup=False)

    check_free(run, tell)
    _check_jobs(run, tell)
    if not how.fresh:
        run.check_files()
    check_run(config, extend=how.extend, fresh=how.fresh, force=how.force, tell=tell)
    if how.fresh and run.path.exists():
        _move_away(run, tell)
    evaluator = config.eval.placement in ("separate", "het")
    group = EvalGroup(given, run, console, starter) if evaluator else None
    interrupts = Interrupts()
    interrupts.listen()
    remember(run.path)
    with sole_starter(run):  # until the last score: two evaluators would write every table twice
        with kept_free(run):  # before an evaluator looks for what there is to score
            clear_unbegun(run, config, tell)
        if run.is_finished(config.steps):
            tell(f"{run.path} is finished (step {config.steps})")
            code = EXIT_DONE
        else:
            _explain_extension(config, run, how.extend, console)
            code = _train(given, run, group, interrupts, how, starter, console)
        if code == EXIT_DONE and group is not None:
            scored = wait_for_scores(group, run, lambda: bool(interrupts.count), wait=wait, console=console)
            stopped = EXIT_INTERRUPTED if interrupts.by_ctrl_c else EXIT_STOPPED
            code = stopped if scored is None else scored
        if group is not None:
            group.end()
    if code == EXIT_DONE and config.eval.placement != "none":
        print_scores(run)
    return code


def _check_jobs(run: RunDir, tell: Callable[[str], None]) -> None:
    """Refuses a run that a scheduler will train, or does. Where it cannot be asked, says so: the run's lock has to do.

    Raises:
        ConfigError: names the job.
    """
    live, kinds = live_jobs(run), job_ids(read_jobs(run))
    if isinstance(live, NoAnswer):
        tell(
            f"Slurm cannot be asked just now ({live.why}): if a job of this run still waits, it will find the run held"
        )
        return
    for job in live.values():
        if "train" in kinds[job.job].split("+") and job.job != current_job():
            raise ConfigError(
                f"run.dir: {run.path} has job {job.job} ({job.state.lower()}); vernier stop ends it, "
                "or use another run.dir"
            )


def _move_away(run: RunDir, tell: Callable[[str], None]) -> None:
    with sole_starter(run), kept_free(run):
        old = run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        link = ""
        if run.path.is_symlink():  # the link goes, what it leads to stays where it is
            link = f", a link to {os.readlink(run.path)} as before; the new one is a folder at {run.path}"
        try:
            run.path.rename(old)
        except OSError as error:  # a disk is mounted there, say
            raise ConfigError(f"--fresh: {run.path} cannot be renamed to {old} ({error.strerror})") from None
    tell(f"the earlier run is now {old}{link}")


def _explain_extension(config: Config, run: RunDir, extend: bool, console: Console) -> None:
    before = load_config(run.config).steps if extend and run.config.is_file() else config.steps
    if before != config.steps:
        console.print(
            f"extending from {before} to {config.steps} steps: the {config.schedule.name} schedule is drawn anew over "
            f"{config.steps} steps, so the learning rate jumps where the run goes on",
            markup=False,
        )


def _train(
    config: Config,
    run: RunDir,
    group: EvalGroup | None,
    interrupts: Interrupts,
    how: Resume,
    starter: Starter,
    console: Console,
) -> int:
    """Runs the training ranks, again and again where the run's state asks for it; gives the exit code."""
    run.stop_request.unlink(missing_ok=True)
    furthest, without_progress = -1, 0
    relay = Relay(run.logs / starter.training_log) if starter.marked else None

    def tell_new() -> None:
        for line in relay.new_lines() if relay is not None else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    while True:
        before = sizes(run.logs)
        trainer = _start_ranks(config, run, how, starter)
        if group is not None and group.process is None:
            group.start()
        killed = _watch(trainer, run, group, interrupts, starter, tell_new, console)
        why = run.read_state().get("again")
        if not why:
            return _outcome(run, trainer.returncode or 0, killed, interrupts, starter, console, before)
        if interrupts.count:
            console.print(f"stopped ({why}); the same command goes on", markup=False)
            return EXIT_INTERRUPTED if interrupts.by_ctrl_c else EXIT_STOPPED
        step = int(run.read_state().get("step") or 0)
        without_progress = without_progress + 1 if step <= furthest else 1
        furthest = max(furthest, step)
        if without_progress > STARTS_AGAIN:
            told = f"started again {STARTS_AGAIN} times without getting beyond step {furthest}; the last reason: {why}"
            _fail(run, EXIT_FAILED, told, console)
            return EXIT_FAILED
        run.add_event("started again", why, step=step)
        console.print(f"starting the ranks again: {why}", markup=False)


def _start_ranks(config: Config, run: RunDir, how: Resume, starter: Starter) -> Started:
    given = run.path / "train-config.yaml"  # config.yaml itself is the trainer's to write, once it holds the lock
    with _once_free(run, starter):  # rank 0 of an earlier start may still be dying
        run.start_afresh("pending", steps=config.steps, job=current_job())
        write_atomic(given, dump_config(config))
    flags = [*(["--extend"] if how.extend else []), *(["--force-resume"] if how.force else [])]
    return starter.train([*flags, str(given)], run.logs)


@contextmanager
def _once_free(run: RunDir, starter: Starter) -> Iterator[None]:
    """Keeps trainers out, once ranks that were killed have let go: on another machine that is when they fall silent."""
    deadline = time.monotonic() + FRESH_S + DYING_S
    while True:
        with ExitStack() as kept:
            try:
                kept.enter_context(kept_free(run, patience_s=DYING_S))
            except ConfigError:
                if not starter.far or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
                continue
            yield
            return


def _watch(
    trainer: Started,
    run: RunDir,
    group: EvalGroup | None,
    interrupts: Interrupts,
    starter: Starter,
    tell_new: Callable[[], None],
    console: Console,
) -> str:
    """Waits until the ranks have ended: asks them to stop when the user does, kills those that hang.

    Gives why it killed them, "" where it did not.
    """
    told, deadline, why = 0, math.inf, ""
    looked, ended, killed = 0.0, math.inf, ""
    while trainer.poll() is None:
        now = time.monotonic()
        tell_new()
        if interrupts.count > told:
            told = interrupts.count
            if told == 1:
                try:
                    write_atomic(run.stop_request, "interrupt" if interrupts.by_ctrl_c else "stop")
                except OSError:  # a full disk; the ranks are handed the signal
                    ask_to_stop(starter, trainer, interrupt=interrupts.by_ctrl_c)
                deadline, why = now + SAVE_PATIENCE_S, f"{SAVE_PATIENCE_S} s after they were asked to stop"
                console.print("stopping after this step, with a checkpoint (again: at once)", markup=False)
            else:
                deadline, why = now, "when asked to stop a second time"
        if now - looked > STATE_S:
            looked = now
            over = run.read_state().get("exit_code") is not None
            ended = min(ended, now) if over else math.inf
        if now - ended > HANGING_S and deadline > now:
            run.add_event("killed", f"ranks had not ended {HANGING_S:.0f} s after the run's last word")
            deadline, why = now, "after the run's last word"
        if now >= deadline:
            trainer.kill()  # its ranks die with it; the last whole checkpoint stays
            killed = why
        if group is not None and not told:  # whoever signals every process of a job hits the evaluator too
            group.look_after(training=True)
        time.sleep(POLL_S)
    tell_new()
    return killed


def _outcome(
    run: RunDir,
    returncode: int,
    killed: str,
    interrupts: Interrupts,
    starter: Starter,
    console: Console,
    before: dict[str, int],
) -> int:
    name_the_cause(run, before)
    state = run.read_state()
    code = state.get("exit_code")
    if code is None:  # killed before its last word
        code = EXIT_INTERRUPTED if interrupts.by_ctrl_c else EXIT_FAILED
        how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        rank, words = first_to_end(run.logs, before, "train")
        with _once_free(run, starter):  # held by another trainer, which was quicker: the state is its own
            told = f"the training ranks {without_a_word(f'{starter.name}: {how}', words)}"
            if killed:
                rank, told = None, f"the training ranks were killed {killed}, before their checkpoint was whole"
            elif rank is not None:
                told = without_a_word(words)
            _fail(run, code, told, console, rank)
        if code == EXIT_FAILED and returncode > 0:
            console.print(last_lines(run.logs / starter.training_log), markup=False)
        return int(code)
    failure = state.get("failure")
    if failure:
        rank = failure["rank"]
        console.print(f"error: {of_rank(rank, failure['error'])}", markup=False)
        log = starter.training_log if rank is None else f"rank-{rank}.log"
        console.print(f"its log: {run.logs / log}", markup=False)
    elif code != EXIT_DONE:
        console.print(
            f"stopped at step {state.get('step') or 0} with a checkpoint; the same command goes on", markup=False
        )
    return int(code)


def _fail(run: RunDir, code: int, told: str, console: Console, rank: int | None = None) -> None:
    run.add_event("failed", told, rank=rank)
    console.print(f"error: {of_rank(rank, told)}; the same command goes on from the last checkpoint", markup=False)
    if not run.record_failure(code, rank, told):
        console.print(f"error: {run.state} cannot be written", markup=False)
