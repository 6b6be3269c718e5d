"""A training in which a rank hangs ends in bounded time, and says which rank, its last step and where it is.

What is a hang, and who is named, is shown case by case in test_hang_verdict; here are real ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT, by_agent

from configs.run.directory import RunDir

HANG_S = 3.0
BOUND_S = HANG_S + 15.0  # about 7 s on a machine of its own
STEP = 5  # at which it happens


class Group:
    """Ranks at work in a run directory."""

    def __init__(self, run: RunDir, process: subprocess.Popen[bytes], log: Path) -> None:
        self.run, self.process, self.log = run, process, log

    def pid(self, rank: int) -> int:
        return int((self.run.path / f"pid-{rank}").read_text())

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 90
        while not (self.run.path / name).exists():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def seconds_to_end(self, ranks: list[int]) -> float:
        """From what happens to the end of these ranks' processes."""
        self.wait_for("happened")
        began = time.monotonic()
        while any(is_alive(self.pid(rank)) for rank in ranks):
            assert time.monotonic() - began < 60, self.log.read_text()
            time.sleep(0.05)
        return time.monotonic() - began

    def hung(self) -> dict:
        """The event of a hang, which is all that was told."""
        (event,) = self.run.read_events()
        assert event["kind"] == "hung"
        return event


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def group(path: Path, what: str, culprit: int, *, world: int, steps: int = 1000, **environment: str) -> Iterator[Group]:
    """Ranks that make steps, until something happens to one of them."""
    run, log = RunDir(path / "run"), path / "log"
    run.path.mkdir()
    program = ["tests.trainer.faults.hanging", str(run.path), what, str(culprit), str(steps)]
    command = [*by_agent(world), *program] if world > 1 else [sys.executable, "-m", *program]
    if environment:  # torchrun's own store, which heeds it
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone", "-m"]
        command = [*torchrun, *program]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment}
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    started = Group(run, process, log)
    try:
        yield started
    finally:
        pids = [int(file.read_text() or 0) for file in run.path.glob("pid-*")]
        for pid in [process.pid, *pids]:
            with suppress(ProcessLookupError):
                if pid == process.pid or is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)


def test_a_frozen_rank_is_named_with_its_last_step_and_the_others_end(tmp_path: Path) -> None:
    with group(tmp_path, "frozen", 0, world=3) as ranks:  # the teller, until another one takes its place
        assert ranks.seconds_to_end([1, 2]) < BOUND_S
        frozen = ranks.pid(0)
        assert is_alive(frozen)
        event, state = ranks.hung(), ranks.run.read_state()
        assert (event["rank"], event["step"], event["detail"]["ranks"]) == (0, STEP, [0])
        assert event["message"].startswith("rank 0 (host ")
        assert f"pid {frozen}) does not answer: its process is frozen or gone" in event["message"]
        assert f"; rank 1 waits at step {STEP}, in" in event["message"]
        assert event["detail"]["seconds"] >= 4
        assert set(event["detail"]["stacks"]) == {"1", "2"}
        assert "all_reduce" in event["detail"]["stacks"]["1"]
        assert (state["state"], state["exit_code"]) == ("failed", 1)
        assert state["failure"]["rank"] == 0
        assert state["failure"]["error"] == event["message"]

        os.kill(frozen, signal.SIGCONT)  # comes back too late
        deadline = time.monotonic() + BOUND_S
        while is_alive(frozen):
            assert time.monotonic() < deadline, ranks.log.read_text()
            time.sleep(0.05)
        assert ranks.hung() == event
        assert ranks.run.read_state() == state


def test_the_first_rank_frozen_with_the_store_that_it_holds_is_named(tmp_path: Path) -> None:
    with group(tmp_path, "frozen", 0, world=3, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as ranks:
        assert ranks.seconds_to_end([1, 2]) < BOUND_S
        event = ranks.hung()  # one, though each of the others has only itself to ask
        assert (event["rank"], event["step"]) == (0, STEP)
        assert "does not answer: rank 0, which holds it, is frozen or gone" in event["message"]
        assert ranks.run.read_state()["failure"]["rank"] == 0


def test_a_rank_that_hangs_in_python_is_named_with_its_line(tmp_path: Path) -> None:
    with group(tmp_path, "endless", 1, world=2) as ranks:
        assert ranks.seconds_to_end([0, 1]) < BOUND_S
        event = ranks.hung()
        assert (event["rank"], event["step"], event["detail"]["ranks"]) == (1, STEP, [1])
        assert "the line that hangs" in event["message"]
        stacks = event["detail"]["stacks"]
        assert list(stacks) == ["1", "0"]
        assert "the line that hangs" in stacks["1"]
        assert "all_reduce" in stacks["0"]
        assert "the line that hangs" in ranks.log.read_text()
        assert ranks.run.read_state()["failure"]["rank"] == 1


def test_neither_a_long_pause_of_one_rank_nor_a_suspended_job_is_a_hang(tmp_path: Path) -> None:
    with group(tmp_path, "paused", 1, world=2, steps=150) as ranks:
        ranks.wait_for("happened")
        time.sleep(7.0)  # the pause: rank 0 waits for it, for longer than it may wait for a rank that hangs
        pids = [ranks.pid(0), ranks.pid(1)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * HANG_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert ranks.process.wait(timeout=60) == 0, ranks.log.read_text()
        assert ranks.run.read_events() == []
        assert ranks.run.read_state()["state"] == "running"


def test_a_process_alone_says_where_it_hangs_and_leaves_a_later_attempts_state_alone(tmp_path: Path) -> None:
    with group(tmp_path, "asleep", 0, world=1) as ranks:
        ranks.wait_for("happened")
        ranks.run.write_state("running", attempt=8)
        assert ranks.process.wait(timeout=60) == 1
        assert "time.sleep(1000) # the line that hangs" in ranks.log.read_text()
        assert ranks.run.read_events() == []
        assert ranks.run.read_state()["state"] == "running"
