"""A round as it happens: `vernier train`, killed as the round says, and the same command again, until it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from configs.process import kill_with_parent

from . import running
from .rounds import Kill, Round, Settings
from .same import not_whole

ROOT = Path(__file__).parents[2]
RECIPE = "tests/faults/torture.yaml"
STEPS = 100  # as the recipe says
POLL_S = 0.005
COMING_UP_S = 60.0  # for an evaluator that is started again
ENDING_S = 120.0  # for `vernier` to end when one that it watches over was killed
DYING_S = 10.0  # for the kernel, or the watch of a process for its parent
ATTEMPT_S = 240.0  # many times what an undisturbed run takes
SHELL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "VERNIER_FAULTS")


@dataclass
class Undergone:
    """What became of a round."""

    fired: list[Kill] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # before anything was compared
    attempts: int = 0
    ending_s: float = 0.0  # most that an attempt took to end after a kill from outside


def start(settings: Settings, data: Path, run: Path, *, faults: str = "") -> subprocess.Popen[bytes]:
    """`vernier train` as a user types it; what it says goes to `RUN.said`. It dies with this process."""
    command = [sys.executable, "-m", "launcher.cli", "train", RECIPE, *settings.overrides()]
    environment = {key: value for key, value in os.environ.items() if key not in SHELL}
    if faults:
        environment["VERNIER_FAULTS"] = faults
    with open(said(run), "ab") as output:
        return subprocess.Popen(
            [*command, f"data.dir={data}", f"run.dir={run}"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )


def said(run: Path) -> Path:
    """The file with what every `vernier train` of a run has printed."""
    return run.with_name(f"{run.name}.said")


def processes(run: Path) -> dict[int, str]:
    """Processes whose command line names the run: pid → which one it is ("rank 1", "agent", …)."""
    return {pid: _which(one) for pid, one in running.processes(run).items()}


def _which(one: running.Process) -> str:
    if one.kind == "agent":
        return "evaluator's agent" if one.module == "eval" else "agent"
    if one.kind == "rank":
        return "evaluator" if one.module == "eval" else f"rank {one.rank}"
    return one.kind


def pid_of(kill: Kill, run: Path) -> int | None:
    """The process to kill, if it is there. One that was just forked still goes by its parent's command line."""
    name = f"rank {kill.rank}" if kill.process == "rank" else kill.process
    return min((pid for pid, which in processes(run).items() if which == name), default=None)


def steps_made(run: Path) -> int:
    """Lines of `metrics.jsonl`."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def undergo(round_: Round, data: Path, run: Path) -> Undergone:
    """Trains and is killed, as `round_` says, to the end or until something is wrong. Leaves no process."""
    done, left = Undergone(), list(round_.kills)
    while not done.wrong:
        # An attempt sees the kills up to the first that ends it; those of the evaluator before that are in passing.
        fatal = next((kill for kill in left if kill.ends_training), None)
        from_outside = left if fatal is None else left[: left.index(fatal) + (fatal.how != "point")]
        log_size = len(_read(run / "logs" / "torchrun.log"))
        vernier = start(round_.settings, data, run, faults=fatal.asked() if fatal is not None else "")
        done.attempts += 1
        try:
            fired = _kill_in_turn(vernier, list(from_outside), run)
            killed = any(kill.ends_training for kill in fired)
            started = time.monotonic()
            done.wrong += _ended(vernier, run, ENDING_S if killed else ATTEMPT_S)
            if killed:
                done.ending_s = max(done.ending_s, time.monotonic() - started)
        finally:
            stop_all(vernier, run)
        code = vernier.returncode
        if code and fatal is not None and fatal.how == "point" and _killed_itself(run, log_size):
            fired.append(fatal)
        for kill in fired:
            left.remove(kill)
        done.fired += fired
        done.wrong += not_whole(run)
        if code == 0:
            break
        if fatal is None or fatal not in fired:
            done.wrong.append(f"exit code {code}, and nobody had killed it; {_last_words(run)}")
        elif code != (-signal.SIGKILL if fatal.process == "vernier" else 1):
            done.wrong.append(f"exit code {code} after `kill -9` of {fatal}, not 1; {_last_words(run)}")
    return done


def stop_all(vernier: subprocess.Popen[bytes], run: Path) -> None:
    """Ends what is left of an attempt, in whatever state it is."""
    if vernier.poll() is None:
        vernier.kill()
        vernier.wait()
    _wait(lambda: not processes(run), DYING_S)
    for pid in processes(run):
        _kill(pid)


def _kill_in_turn(vernier: subprocess.Popen[bytes], kills: list[Kill], run: Path) -> list[Kill]:
    """Kills one process after another, until one ends the training or the training ends; gives those killed."""
    fired: list[Kill] = []
    for kill in kills:
        if not _wait(_due(kill, vernier, run), ATTEMPT_S, vernier):
            break
        if kill.how == "step":
            time.sleep(kill.seconds)
        if not _wait(partial(_is_there, kill, vernier, run), COMING_UP_S, vernier):  # it may just be starting again
            break
        pid = _target(kill, vernier, run)
        if pid is None or not _kill(pid):
            break
        fired.append(kill)
        if kill.ends_training:
            break
        _wait(partial(_is_gone, pid, run), DYING_S)
    return fired


def _due(kill: Kill, vernier: subprocess.Popen[bytes], run: Path) -> Callable[[], bool]:
    """Whether the moment for it has come."""
    made = steps_made(run)  # of an earlier attempt too: some of them will be made again
    aim = min(STEPS, made + 1 + int(kill.fraction * (STEPS - made)))
    seen: dict[int, float] = {}  # pid → when it appeared

    def old_enough() -> bool:
        pid = _target(kill, vernier, run)
        return pid is not None and time.monotonic() >= seen.setdefault(pid, time.monotonic()) + kill.seconds

    return old_enough if kill.how == "start" else lambda: steps_made(run) >= aim


def _is_there(kill: Kill, vernier: subprocess.Popen[bytes], run: Path) -> bool:
    return _target(kill, vernier, run) is not None


def _is_gone(pid: int, run: Path) -> bool:
    return pid not in processes(run)


def _target(kill: Kill, vernier: subprocess.Popen[bytes], run: Path) -> int | None:
    return vernier.pid if kill.process == "vernier" else pid_of(kill, run)


def _ended(vernier: subprocess.Popen[bytes], run: Path, seconds: float) -> list[str]:
    """Waits for an attempt to end by itself, all of it; gives what did not."""
    if not _wait(lambda: vernier.poll() is not None, seconds):
        return [f"did not end in {seconds:.0f} s: {_alive(run)}; {_last_words(run)}"]
    if not _wait(lambda: not processes(run), DYING_S):
        return [f"orphans, {DYING_S:.0f} s after the end: {_alive(run)}"]
    return []


def _alive(run: Path) -> str:
    return ", ".join(f"{which} ({pid})" for pid, which in sorted(processes(run).items()))


def _killed_itself(run: Path, log_size: int) -> bool:
    """Whether the agent has seen a rank die of SIGKILL in this attempt."""
    return b"(SIGKILL)" in _read(run / "logs" / "torchrun.log")[log_size:]


def _wait(what: Callable[[], bool], seconds: float, vernier: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether something came to hold within some seconds, and before `vernier` ended."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline or (vernier is not None and vernier.poll() is not None):
            return False
        time.sleep(POLL_S)
    return True


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _last_words(run: Path) -> str:
    lines = _read(said(run)).decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return f"last words: {lines[-1] if lines else 'none'} (all in {said(run)})"
