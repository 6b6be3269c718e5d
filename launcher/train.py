"""`vernier train`: starts the training ranks and the eval rank-group here, watches over both, ends with the truth.

The evaluator is restarted when it dies and never ends training. The exit code is what `state.json` says, since torchrun
turns every rank's code into 1.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console

from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, VernierError
from configs.load import dump_config, load_config, resolve
from configs.rundir import RunDir, step_name
from configs.schema import Config
from configs.whole import read_json, write_atomic
from launcher.processes import SAVE_PATIENCE_S, end, last_lines, start, torchrun
from trainer.lock import check_free, kept_free, sole_starter
from trainer.stop import ONE_WISH_S

POLL_S = 0.2
EVAL_RESTARTS = 5  # without a newly scored snapshot between
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


@dataclass(frozen=True)
class Resume:
    """How to take a run directory that is there already."""

    fresh: bool = False  # move it away
    extend: bool = False  # go on beyond its steps
    force: bool = False  # go on with settings that may not change


def run_train(source: str, overrides: list[str], how: Resume, *, wait: bool, console: Console) -> int:
    """Trains here to the end, or goes on with what is there; gives the exit code."""
    config = resolve(load_config(source, overrides))
    run = RunDir(config.run_dir)
    from trainer.run import check_run, finished

    def tell(line: str) -> None:
        console.print(line, markup=False)

    check_free(run, tell)
    check_run(config, extend=how.extend, fresh=how.fresh, force=how.force)
    if how.fresh and run.path.exists():
        _move_away(run, tell)
    group = EvalGroup(config, run, console) if config.eval.placement == "separate" else None
    interrupts = Interrupts()
    interrupts.listen()
    with sole_starter(run):  # until the last score: two evaluators would write every table twice
        if finished(run, config):
            tell(f"{run.path} is finished (step {config.steps})")
            code = EXIT_DONE
        else:
            _explain_extension(config, run, how.extend, console)
            code = _train(config, run, group, interrupts, how, console)
        if code == EXIT_DONE and group is not None:
            code = _wait_for_scores(group, run, interrupts, wait=wait, console=console)
        if group is not None:
            group.end()
    if code == EXIT_DONE and config.eval.placement != "none":
        _print_scores(run, console)
    return code


def _move_away(run: RunDir, tell: Callable[[str], None]) -> None:
    with sole_starter(run), kept_free(run):
        old = run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        run.path.rename(old)
    tell(f"the earlier run is now {old}")


def _explain_extension(config: Config, run: RunDir, extend: bool, console: Console) -> None:
    before = load_config(run.config).steps if extend and run.config.is_file() else config.steps
    if before != config.steps:
        console.print(
            f"extending from {before} to {config.steps} steps: the {config.schedule.name} schedule is drawn anew over "
            f"{config.steps} steps, so the learning rate jumps where the run goes on",
            markup=False,
        )


class EvalGroup:
    """The eval rank-group of a run: started, restarted when it dies, ended."""

    def __init__(self, config: Config, run: RunDir, console: Console) -> None:
        self.config, self.run, self.console = config, run, console
        self.process: subprocess.Popen[bytes] | None = None
        self.deaths, self.next_start = 0, 0.0
        self.scored_at_death = -1
        self.given_up = False

    def start(self) -> None:
        settings = self.config.eval
        given = self.run.path / "eval-config.yaml"
        if self.process is None:  # written once: its restart must not need room on the disk
            write_atomic(given, dump_config(self.config))
        command, environment = torchrun("eval", [str(given)], nproc=settings.nproc, threads=settings.threads_per_rank)
        self.process = start(command, environment, self.run.logs / "eval-torchrun.log")

    def tables(self) -> set[str]:
        """Names of the steps that are scored, on this reference set and in this dtype."""
        facts = read_json(self.config.reference_dir / "reference.json")
        folder = self.run.losses / f"{facts['name']}-{facts['fingerprints']['tokens'][:8]}"
        return {p.name.partition("@")[0] for p in folder.glob(f"step-*.{self.config.eval.dtype}.parquet")}

    def unscored(self) -> int:
        """Snapshots without a table."""
        scored = self.tables()
        return sum(step_name(s) not in scored for s in self.run.whole_steps(self.run.snapshots))

    def look_after(self, *, training: bool) -> bool:
        """Restarts the group if it died, or ended before training did; gives whether it is (or will be) running."""
        if self.process is None or self.given_up:
            return False
        code = self.process.poll()
        if code is None:
            return True
        if code == 0 and (not training or self.run.read_state().get("exit_code") is not None):
            return False
        if code == 0:  # it saw the last word of ranks that have been started again since
            self.next_start = -1.0
        if self.next_start == 0.0:
            self._note_death(code)
        if not self.given_up and time.monotonic() >= self.next_start:
            self.next_start = 0.0
            try:
                self.start()
            except OSError:  # no room for its log, say; it ends no training
                self.next_start = time.monotonic() + 30.0
        return not self.given_up

    def _note_death(self, code: int) -> None:
        try:
            scored = len(self.tables())
        except VernierError:  # the reference set cannot be read at this moment
            scored = self.scored_at_death
        progress = scored > self.scored_at_death
        self.scored_at_death = scored
        self.deaths = 1 if progress else self.deaths + 1
        if self.deaths > EVAL_RESTARTS:
            self.given_up = True
            told = f"the evaluator died {self.deaths} times without scoring anything; training goes on without it"
        else:
            self.next_start = time.monotonic() + min(30.0, 0.5 * 2**self.deaths)
            told = f"the evaluator died (torchrun's exit code {code}); it is started again"
        self.run.add_event("evaluator died", told, exit_code=code)
        self.console.print(f"{told}; see {self.run.logs / 'eval-rank-0.log'}", markup=False)

    def end(self) -> None:
        if self.process is not None:
            end(self.process)


def _train(
    config: Config, run: RunDir, group: EvalGroup | None, interrupts: Interrupts, how: Resume, console: Console
) -> int:
    """Runs the training ranks, again and again where the run's state asks for it; gives the exit code."""
    run.stop_request.unlink(missing_ok=True)
    furthest, without_progress = -1, 0
    while True:
        trainer = _start_ranks(config, run, how)
        if group is not None and group.process is None:
            group.start()
        killed = _watch(trainer, run, group, interrupts, console)
        why = run.read_state().get("again")
        if not why:
            return _outcome(run, trainer.returncode, killed, interrupts, console)
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


def _start_ranks(config: Config, run: RunDir, how: Resume) -> subprocess.Popen[bytes]:
    given = run.path / "train-config.yaml"  # config.yaml itself is the trainer's to write, once it holds the lock
    with kept_free(run, patience_s=DYING_S):  # rank 0 of an earlier start may still be dying
        run.write_state("pending", exit_code=None, failure=None, again=None, steps=config.steps)
        write_atomic(given, dump_config(config))
    flags = [*(["--extend"] if how.extend else []), *(["--force-resume"] if how.force else [])]
    nproc, threads = config.nproc or 1, config.threads_per_rank or 1
    command, environment = torchrun(
        "trainer", [*flags, str(given)], nproc=nproc, threads=threads, patience_s=SAVE_PATIENCE_S
    )
    return start(command, environment, run.logs / "torchrun.log")


def _watch(
    trainer: subprocess.Popen[bytes], run: RunDir, group: EvalGroup | None, interrupts: Interrupts, console: Console
) -> str:
    """Waits until the ranks have ended: asks them to stop when the user does, kills those that hang.

    Gives why it killed them, "" where it did not.
    """
    told, deadline, why = 0, math.inf, ""
    looked, ended, killed = 0.0, math.inf, ""
    while trainer.poll() is None:
        now = time.monotonic()
        if interrupts.count > told:
            told = interrupts.count
            if told == 1:
                try:
                    write_atomic(run.stop_request, "interrupt" if interrupts.by_ctrl_c else "stop")
                except OSError:  # a full disk; torchrun hands the signal on
                    trainer.send_signal(signal.SIGINT if interrupts.by_ctrl_c else signal.SIGTERM)
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
    return killed


def _outcome(run: RunDir, returncode: int, killed: str, interrupts: Interrupts, console: Console) -> int:
    state = run.read_state()
    code = state.get("exit_code")
    if code is None:  # killed before its last word
        code = EXIT_INTERRUPTED if interrupts.by_ctrl_c else EXIT_FAILED
        how = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
        with kept_free(run, patience_s=DYING_S):  # held by another trainer, which was quicker: the state is its own
            told = f"the training ranks ended without a word (torchrun: {how})"
            if killed:
                told = f"the training ranks were killed {killed}, before their checkpoint was whole"
            _fail(run, code, told, console)
        if code == EXIT_FAILED and returncode > 0:
            console.print(last_lines(run.logs / "torchrun.log"), markup=False)
        return int(code)
    failure = state.get("failure")
    if failure:
        rank, said = f"rank {failure['rank']}", failure["error"]
        console.print(f"error: {said if said.startswith(rank) else f'{rank}: {said}'}", markup=False)
        console.print(f"its log: {run.logs / ('rank-' + str(failure['rank']) + '.log')}", markup=False)
    elif code != EXIT_DONE:
        console.print(f"stopped at step {state.get('step')} with a checkpoint; the same command goes on", markup=False)
    return int(code)


def _fail(run: RunDir, code: int, told: str, console: Console) -> None:
    run.add_event("failed", told)
    console.print(f"error: {told}; the same command goes on from the last checkpoint", markup=False)
    if not run.record_failure(code, None, told):
        console.print(f"error: {run.state} cannot be written", markup=False)


def _wait_for_scores(group: EvalGroup, run: RunDir, interrupts: Interrupts, *, wait: bool, console: Console) -> int:
    waiting = group.unscored()
    if waiting and not wait:
        console.print(f"{waiting} snapshots are not scored yet; vernier train, once more, scores them", markup=False)
        return EXIT_DONE
    if waiting:
        console.print(f"waiting for {waiting} snapshots to be scored", markup=False)
    elif group.process is None:
        return EXIT_DONE
    from trainer.progress import ProgressLine

    teller = ProgressLine(Console(stderr=True, force_terminal=False, highlight=False, soft_wrap=True), 1, 0, run.events)
    if group.process is None:
        group.start()
    while group.look_after(training=False) and not interrupts.count:  # it ends by itself, with all it has to tell
        teller.tell_events()
        time.sleep(POLL_S)
    teller.tell_events()
    if interrupts.count:
        console.print("stopped waiting; vernier train, once more, scores the rest", markup=False)
        return EXIT_INTERRUPTED if interrupts.by_ctrl_c else EXIT_STOPPED
    left = group.unscored()
    if left:
        console.print(f"error: {left} snapshots could not be scored; see {run.logs / 'eval-rank-0.log'}", markup=False)
        return EXIT_FAILED
    return EXIT_DONE


def _print_scores(run: RunDir, console: Console) -> None:
    from eval.along import compare_run
    from launcher.compare import print_run_table

    if not any(run.losses.glob("*/step-*.parquet")):
        return
    out = Console(highlight=False)
    print_run_table(compare_run(run.path), out)
    out.print(f"\nrun        {_shown(run.path)}", markup=False, soft_wrap=True)
    out.print(f"snapshots  {_shown(run.snapshots)}", markup=False, soft_wrap=True)
    out.print(f"losses     {_shown(run.losses)}", markup=False, soft_wrap=True)
    out.print(f"watch it   {_command()} board {_shown(run.path)}", markup=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """A path as one would type it here, quoted for a shell."""
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def _command() -> str:
    """How one would type `vernier` here: after `make demo` the environment is not active."""
    own = Path(sys.executable).with_name("vernier")
    return _shown(own) if shutil.which("vernier") is None and own.is_file() else "vernier"
