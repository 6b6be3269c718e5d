"""The preflight of a job on a real Slurm: it names the node that is slow, read-only or silent, and no other."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, lines

pytestmark = pytest.mark.cluster

NODES = ("node1", "node2", "node3")
SHORT_S = 30  # the import of torch thrice on two cores fits into half of it
# In a mount namespace of its own, where the folder given first cannot be written.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as a job finds it."""
    return new_run(tmp_path / "run")


def new_run(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text("name: preflight\n")
    (directory / "state.json").write_text('{"state": "pending"}')
    return directory


def started(run: Path, *options: str, port: int | None = None) -> subprocess.Popen[str]:
    """`srun` of the preflight on three nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free), "OMP_NUM_THREADS": "1"}
    if port == 0:
        del environment["MASTER_ADDR"]
    command = ["srun", "-N", "3", "-w", ",".join(NODES), "--ntasks-per-node=1", "--kill-on-bad-exit=1", "-t", "5"]
    command += [sys.executable, "-m", "launcher.preflight", str(run), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str], run: Path, code: int) -> tuple[dict[str, Any], str]:
    """(preflight.json, what was printed) once it has ended with an exit code."""
    try:
        out, error = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    # The first task that ends with 1 has srun end the others: its own code may then be that of a signal.
    assert bool(process.returncode) == bool(code), f"{process.returncode}\n{out}\n{error}"
    return json.loads((run / "preflight.json").read_text()), out


def pid_of(run: Path, node: str, phase: str = "started") -> int:
    """The process of a node's task, as soon as it has told that it has come to a phase."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in run.glob(f"preflight/*/{node}.json"):
            told = json.loads(path.read_text())
            if told.get("phase") == phase:
                return int(told["pid"])
        time.sleep(0.02)
    raise AssertionError(f"{node} has not come so far as {phase}")


def named(report: dict[str, Any], *, beside_slow: bool = True) -> dict[str, str]:
    """Why each bad node is bad. This machine is all the nodes and may have other work, which makes any of them slow:
    those that are bad for nothing else are left out, unless they are asked for.
    """
    why = {entry["node"]: entry["why"] for entry in report["bad"]}
    return {node: said for node, said in why.items() if not (beside_slow and said.startswith("slow: "))}


@contextmanager
def stopped(pid: int, share: float) -> Iterator[None]:
    """A process that the system lets run for only a part of the time."""
    over = threading.Event()

    def cycle() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.1 * share)
                os.kill(pid, signal.SIGCONT)
                over.wait(0.1 * (1 - share))

    thread = threading.Thread(target=cycle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def read_only(cluster, node: str, folder: Path) -> Iterator[None]:
    """A node whose slurmd sees a folder read-only."""
    before = ("unshare", "-m", "sh", "-c", READ_ONLY, str(folder))
    tried = subprocess.run([*before, "true"], capture_output=True, text=True, timeout=20, check=False)
    if tried.returncode and not os.environ.get("REQUIRE_CLUSTER"):
        pytest.skip(f"no folder can be mounted read-only for a process here: {tried.stderr.strip()}")
    try:
        _end(cluster.daemon(node))
        cluster.start_node(node, *before)
        yield
    finally:
        with suppress(OSError):  # it may not be there
            _end(cluster.daemon(node))
        cluster.start_node(node)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fit(tmp_path: Path) -> tuple[Path, dict[str, Any], str]:
    """(run, preflight.json, what was printed) of fit nodes; tried thrice where other work here makes one slow."""
    for attempt in range(3):
        run = new_run(tmp_path / f"run-{attempt}")
        process = started(run)
        out, error = process.communicate(timeout=300)
        report = json.loads((run / "preflight.json").read_text())
        assert named(report) == {}, f"{out}\n{error}"
        if report["good"]:
            break
    assert process.returncode == 0, f"{out}\n{error}"
    return run, report, out


@pytest.mark.smoke
def test_three_fit_nodes_are_good_and_each_has_its_line(cluster, tmp_path: Path) -> None:
    run, report, said = fit(tmp_path)
    assert (report["bad"], report["slow"], report["failed"]) == ([], [], None)
    assert list(report["nodes"]) == list(NODES)
    assert report["all_reduce"] > 0
    for node in NODES:
        # "note" is for what is between: all nodes of this cluster are one machine, which may have other work.
        assert re.search(rf"^preflight: {node}  (ok|note) .*FLOP/s", said, re.MULTILINE)
        assert set(report["nodes"][node]["exchange"]["pairs"]) == set(NODES) - {node}
    assert json.loads((run / "state.json").read_text())["state"] == "pending"
    assert [event["kind"] for event in lines(run / "events.jsonl")] == ["preflight"]


def test_a_node_made_slow_by_signals_is_named(cluster, run: Path) -> None:
    process = started(run)
    # From when it is about to be measured: what it imports before would otherwise take it to the time limit. It has an
    # eighth of the time, since where others are at work the rest have no whole core either.
    with stopped(pid_of(run, "node2", "ready"), 0.875):
        report, said = ended(process, run, 1)
    assert named(report) == {}
    assert "node2" in [entry["node"] for entry in report["slow"]]
    assert named(report, beside_slow=False)["node2"].startswith("slow: ")
    assert report["nodes"]["node2"]["looks"] == 3
    shares = {node: report["shares"][node]["speed"] for node in NODES}
    assert min(shares, key=lambda node: shares[node]) == "node2"
    assert shares["node2"] < 0.6
    assert "preflight: node2  BAD   slow: " in said
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 1)
    assert "node2: slow: " in state["failure"]["error"]


@pytest.mark.parametrize("node", ["node3", "node1"])
def test_a_node_whose_shared_folder_is_read_only_is_named(cluster, run: Path, node: str) -> None:
    """The first node too, which then cannot write the verdict down: another one does."""
    with read_only(cluster, node, run.parent):
        report, said = ended(started(run), run, 1)
    why = "its shared folder cannot be written (Read-only file system)"
    assert list(named(report)) == [node]
    assert named(report)[node].startswith(why)
    assert f"preflight: {node}  BAD   {why}" in said
    assert f"{node}: {why}" in json.loads((run / "state.json").read_text())["failure"]["error"]
    assert report["nodes"][node]["speed"]["flops"] > 0


def test_without_an_address_files_tell_and_who_cannot_write_is_silent(cluster, run: Path) -> None:
    with read_only(cluster, "node2", run.parent):
        report, said = ended(started(run, "--timeout", str(SHORT_S), port=0), run, 1)
    assert list(named(report)) == ["node2"]
    assert f"did not answer within {SHORT_S} s: its shared folder cannot be written" in named(report)["node2"]
    assert "no data was exchanged: MASTER_ADDR and MASTER_PORT are not set" in said


@pytest.mark.parametrize("node", ["node3", "node1"])
def test_a_node_that_hangs_is_named_after_the_time_limit(cluster, run: Path, node: str) -> None:
    """The first node too: another one judges in its place."""
    process = started(run, "--timeout", str(SHORT_S))
    pid = pid_of(run, node)
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 180
        while not (run / "preflight.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):  # srun was quicker
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    report = json.loads((run / "preflight.json").read_text())
    if node == "node3":
        assert named(report) == {node: "did not finish: it hangs or crawls after its start"}
    else:
        assert node in named(report)
