"""`vernier board` and the board inside of a job: on loopback only, on a port that is free, told how it is reached."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, VERNIER, ask, vernier, wait_for

from configs.run.directory import RunDir
from configs.scheduler import SlurmJob
from launcher.watch.tensorboard import OPEN_TO_ALL, live_board


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with a curve to show."""
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = RunDir(tmp_path / "shown")
    run.logs.mkdir(parents=True)
    run.write_state("running", steps=10, step=3)
    writer = SummaryWriter(str(run.train_board))
    for step in (1, 2, 3):
        writer.add_scalar("train/loss", 10.0 - step, step)
    writer.close()
    return run


def listening(session: int) -> set[str]:
    """The addresses that a session's processes listen on, as the kernel has them (hexadecimal)."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                sockets |= {os.readlink(link) for link in (process / "fd").iterdir()}
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


def session_of_tensorboard(run: RunDir) -> int:
    """The session that TensorBoard and its helpers are in."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"tensorboard.main" in command and str(run.path).encode() in command:
            return os.getsid(int(process.name))
    raise AssertionError("no TensorBoard")


def steps_shown(url: str) -> list[int]:
    scalars = ask(f"{url}data/plugin/scalars/scalars?run=train&tag=train/loss") or []
    return [step for _, step, _ in scalars]


def test_in_a_job_it_says_where_it_is_listens_on_loopback_only_and_leaves_nothing(run: RunDir) -> None:
    taken, held = socket.socket(), False
    try:
        taken.bind(("127.0.0.1", 6006))  # TensorBoard's own port may be somebody else's
        taken.listen()
        held = True
    except OSError:
        pass  # it is, and may be given back meanwhile
    environment = {**os.environ, "SLURMD_NODENAME": "node7", "SLURM_JOB_ID": "12", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "launcher.watch.tensorboard", str(run.path), "--in-job"]
    board = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for((run.path / "board.json").is_file)
        found = json.loads((run.path / "board.json").read_text())
        assert (found["host"], found["address"], found["job"], found["pid"]) == ("node7", "127.0.0.1", "12", board.pid)
        assert found["port"] != 6006 or not held
        assert found["url"] == f"http://127.0.0.1:{found['port']}/"
        wait_for(lambda: steps_shown(found["url"]) == [1, 2, 3])
        assert listening(session_of_tensorboard(run)) <= {"0100007F", "00000000000000000000000001000000"}
        board.send_signal(signal.SIGTERM)
        assert board.wait(20) == 0
    finally:
        board.kill()
        taken.close()
    assert not (run.path / "board.json").exists()
    assert ask(found["url"]) is None


def test_it_ends_with_the_script_that_started_it(run: RunDir) -> None:
    command = f"{sys.executable} -m launcher.watch.tensorboard {run.path} --in-job & wait $!"
    script = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for((run.path / "board.json").is_file)
        url = json.loads((run.path / "board.json").read_text())["url"]
    finally:
        script.kill()
        script.wait()
    wait_for(lambda: not (run.path / "board.json").exists(), 20)
    wait_for(lambda: ask(url) is None, 20)


def test_a_board_is_live_only_while_its_job_runs_where_it_was_started(run: RunDir) -> None:
    told: dict[str, Any] = {"host": "node7", "address": "127.0.0.1", "port": 6007, "pid": 3, "job": "12", "restarts": 1}
    (run.path / "board.json").write_text(json.dumps({**told, "url": "http://127.0.0.1:6007/"}))

    def live(state: str, restarts: int) -> dict[str, Any] | None:
        return live_board(run, {"12": SlurmJob("12", "n", state, "", 0, restarts, "node7")}, "gate.example")

    found = live("RUNNING", 1)
    assert found is not None
    assert re.fullmatch(r"ssh -J gate\.example -N -L 6007:127\.0\.0\.1:6007 (\S+@)?node7", found["ssh"])
    assert live("RUNNING", 2) is None
    assert live("PENDING", 1) is None
    assert live_board(run, {}, None) is None
    assert live_board(run, None, None) is None
    (run.path / "board.json").write_text("[")
    assert live("RUNNING", 1) is None


def test_on_this_machine_it_says_how_it_is_reached_and_who_else_may_look(run: RunDir) -> None:
    vernier("status", run.path)  # known from here on
    board = subprocess.Popen([*VERNIER, "board", "shown"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert board.stdout is not None
        said = [board.stdout.readline().rstrip("\n") for _ in range(4)]
        address = re.fullmatch(r"TensorBoard of shown: (http://127\.0\.0\.1:(\d+)/)", said[0])
        assert address
        assert re.fullmatch(rf"  ssh -N -L {address[2]}:127\.0\.0\.1:{address[2]} \S+", said[2])
        assert said[3] == OPEN_TO_ALL
        wait_for(lambda: steps_shown(address[1]) == [1, 2, 3])
    finally:
        board.send_signal(signal.SIGTERM)
        assert board.wait(20) == 0


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    told = vernier("board", tmp_path, code=2).stderr
    assert told == f"error: board: {tmp_path} has no tensorboard/ folder; is it a run directory?\n"
    assert "no run of that name is known" in vernier("board", "nobody", code=2).stderr
