"""The rank that failed first is what the state, `status` and `logs` name, however it died and however early."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, lines, vernier

from configs.run.directory import RunDir
from configs.run.last_words import first_end, follows_another, last_words, of_rank


def failed(data: Path, run: Path, *settings: str, **variables: str) -> tuple[dict, subprocess.CompletedProcess[str]]:
    """(the failure in the state of a training that fails, how `vernier train` ended)."""
    arguments = [TINY, f"data.dir={data}", f"run.dir={run}", "eval.placement=none", *settings]
    done = vernier("train", *arguments, code=1, env={**os.environ, **variables})
    return json.loads((run / "state.json").read_text())["failure"], done


@pytest.mark.parametrize("start", ["fork", "exec"])
@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("early:1:raise", "RuntimeError: asked to fail at early"),
        ("joined:1:7", "ended without a word (exit code 7)"),
        ("joined:1:SIGKILL", "ended without a word (signal 9 (SIGKILL))"),
        ("early:1:SIGABRT", "ended without a word (signal 6 (SIGABRT)): terminate called after throwing"),
    ],
)
def test_the_first_to_fail_is_named(start: str, end: str, said: str, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    failure, done = failed(tiny_data, run, f"launch.start={start}", VERNIER_FAULTS=f"end={end}")
    assert failure["rank"] == 1
    assert failure["error"].startswith(said)
    assert done.stderr.splitlines()[-2].startswith(f"error: rank 1: {said}")
    assert f"rank 1: {said}" in vernier("status", "--json", run).stdout.replace('\\"', '"')
    assert f"rank 1: {said}" in vernier("logs", run).stdout


def test_a_network_interface_that_is_not_there_is_named(tiny_data: Path, tmp_path: Path) -> None:
    failure, done = failed(tiny_data, tmp_path / "run", GLOO_SOCKET_IFNAME="nope0")
    assert failure["error"].endswith("Unable to find address for: nope0")
    assert done.stderr.startswith("error: rank "), done.stderr
    assert "nope0" in (tmp_path / "run" / "logs" / f"rank-{failure['rank']}.log").read_text()


def test_an_evaluator_that_dies_says_of_what(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "eval.nproc=2", "steps=6"]
    settings += ["checkpoint.every=6", "snapshot.every=6"]
    faults = {**os.environ, "VERNIER_FAULTS": "end=scoring:1:SIGABRT"}
    vernier("train", TINY, *settings, "--no-wait", env=faults)
    died = [event["message"] for event in lines(run / "events.jsonl") if event["kind"] == "evaluator died"]
    assert died[0].startswith("the evaluator died (rank 1: signal 6 (SIGABRT): terminate called after throwing")


def test_ranks_started_by_hand_clear_only_what_is_of_an_earlier_start(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    earlier = {"rank": 0, "error": "of an earlier start", "time": time.time() - 10}
    RunDir(run).write_state("failed", exit_code=1, failure=earlier)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29613"]
    command += ["-m", "trainer", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "steps=4"]
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 240, "check": False}
    environment = {key: value for key, value in os.environ.items() if key != "VERNIER_TERMINAL"}
    faults = {**environment, "VERNIER_FAULTS": "end=early:1:raise"}
    assert subprocess.run(command, env=faults, **settings).returncode == 1
    assert RunDir(run).read_state()["failure"]["error"] == "RuntimeError: asked to fail at early"
    done = subprocess.run(command, env=environment, **settings)
    assert done.returncode == 0, done.stderr
    assert RunDir(run).read_state()["failure"] is None


def test_a_cause_replaces_what_followed_from_it_and_never_the_other_way(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    reset, own = "RuntimeError: Connection reset by peer", "ended without a word (signal 9 (SIGKILL))"
    run.start_afresh("pending")
    assert run.record_failure(1, 0, reset)
    assert run.record_failure(2, 1, own)
    for later in (reset, "something else"):
        assert run.record_failure(1, 0, later)
    assert not run.take_up("running", since=0.0)
    state = run.read_state()
    assert (state["failure"]["rank"], state["failure"]["error"], state["exit_code"]) == (1, own, 2)
    assert state["state"] == "failed"
    run.start_afresh("pending")
    assert run.read_state()["failure"] is None


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("python: a.c:7: f: Assertion `n > 0' failed.\n", "python: a.c:7: f: Assertion `n > 0' failed."),
        ("free(): invalid pointer\nFatal Python error: Aborted\n", "free(): invalid pointer"),
        (
            "W: warns\nTraceback (most recent call last):\n  File\n    x\nImportError: no y\n",
            "ImportError: no y",
        ),
        ("/bin/python: No module named trainer\n", "/bin/python: No module named trainer"),
        ("all is well\n", ""),
    ],
)
def test_what_a_log_ends_with(log: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("Traceback (most recent call last):\n  File\nKeyError: of an earlier start\n" + log)
    assert last_words(path, path.stat().st_size - len(log)) == said


def test_who_ended_first_by_what_started_the_ranks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    said = "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).\n"
    for text, found in {
        said: (1, "signal 9 (Killed)"),
        "  Process name: [[48914,1],1]\n  Exit code:    7\n": (1, "exit code 7"),
        "srun: error: node2: task 3: Killed\n": (3, "Killed"),
        "rank 0 (pid 7): exit code 1: KeyError: 'a'\nrank 1 (pid 8): exit code 1\n": (0, "exit code 1: KeyError: 'a'"),
    }.items():
        path.write_text(text)
        assert first_end(path) == found
    assert not follows_another("could not join its rank-group: Unable to find address for: nope0")


def test_a_rank_is_named_once() -> None:
    assert of_rank(1, "out of memory") == "rank 1: out of memory"
    assert of_rank(1, "rank 1 of 2: could not join its rank-group") == "rank 1 of 2: could not join its rank-group"
    assert of_rank(None, "no rank has started") == "no rank has started"
