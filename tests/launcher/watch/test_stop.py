"""`vernier stop` on this machine: a checkpoint and a clean end, or with less patience just an end; both may go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, WITHOUT_SLURM, lines, losses, vernier, wait_for
from faults.running import processes

from configs.run.directory import RunDir, is_locked
from launcher.jobs.log import add_job, read_jobs
from launcher.watch.run_index import remember
from launcher.watch.stop import trainer_here

pytestmark = pytest.mark.real

ENDLESS = ["steps=100000", "checkpoint.every=100000", "snapshot.every=100000", "eval.placement=none"]


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@contextmanager
def training(run: Path, data: Path, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """A training that has made some steps."""
    command = [*VERNIER, "train", TINY, *ENDLESS, f"data.dir={data}", f"run.dir={run}", *settings]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    made = len(lines(run / "metrics.jsonl")) if run.exists() else 0
    try:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(lines(run / "metrics.jsonl")) > made + 10)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_stop_is_a_checkpoint_and_a_clean_end_and_less_patience_ends_it_too(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "endless"
    with training(run, tiny_data) as process:
        remember(run)
        told = vernier("stop", "endless").stdout.splitlines()
        assert process.wait(20) == 75
    step = len(losses(run))
    assert told[0].startswith("endless: asked to stop at step ")
    assert told[-1] == f"endless: stopped with a checkpoint; step {step}, its last checkpoint is of step {step}"
    assert not (run / "STOP").exists()
    assert not (run / "jobs.jsonl").exists()  # it never had one
    told = vernier("stop", run).stdout
    assert told == "endless is not running: stopped with a checkpoint (it was asked to stop)\n"
    assert not (run / "STOP").exists()

    with training(run, tiny_data) as process:
        ranks = list(processes(run, "rank", "trainer"))
        assert len(ranks) == 2
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)  # nothing of it will ever come to the end of a step
        begun = time.monotonic()
        told = vernier("stop", run, "--now").stdout
        assert time.monotonic() - begun < 60
        assert process.wait(20) == 1
        assert "SIGTERM to process" in told
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 20)
    assert not is_locked(run / "lock")
    assert f"its last checkpoint is of step {step}" in told
    assert json.loads((run / "state.json").read_text())["state"] == "failed"  # it did not get as far as a checkpoint
    with training(run, tiny_data):  # and goes on
        vernier("stop", run)


def test_only_the_process_that_has_the_lock_open_is_taken_for_the_trainer(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    run.lock.write_text(json.dumps(here))
    assert trainer_here(run) is None  # nobody holds it
    with subprocess.Popen(["flock", run.lock, "sleep", "60"], start_new_session=True) as other:
        try:
            wait_for(run.is_held)
            assert trainer_here(run) is None  # we are not who holds it, whatever the file says
            run.lock.write_text(json.dumps({**here, "pid": other.pid}))
            assert trainer_here(run) == other.pid
            run.lock.write_text(json.dumps({"host": "elsewhere", "pid": other.pid}))
            assert trainer_here(run) is None
        finally:
            os.killpg(other.pid, signal.SIGKILL)


@WITHOUT_SLURM
def test_what_runs_elsewhere_is_asked_and_said_not_to_be_in_reach(variable: str, value: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "far")
    run.path.mkdir()
    run.write_state("running", steps=10, step=3)
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "12"}))
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    beating = subprocess.Popen(["sh", "-c", f"while sleep 1; do touch {run.lock}; done"], start_new_session=True)
    try:
        told = vernier("stop", run.path, "--now", code=2, env={**os.environ, variable: value})
    finally:
        os.killpg(beating.pid, signal.SIGKILL)
        beating.wait()
    assert told.stderr == (
        "error: far: what trains it on elsewhere in job 12 cannot be signalled from here; STOP is asked for\n"
    )
    assert "Slurm cannot be asked" in told.stdout
    assert run.stop_request.read_text() == "stop"
    assert read_jobs(run)[-1]["kind"] == "stop asked"


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    told = vernier("stop", tmp_path, code=2).stderr
    assert told == f"error: {tmp_path}: not a run directory (it has neither config.yaml nor state.json)\n"
