"""Runs in a real Slurm, watched from another directory: status, logs, stop and the board, over both jobs of a run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, ask, losses, vernier
from faults.running import the

pytestmark = pytest.mark.cluster

LONG = ["steps=100000", "checkpoint.every=20", "snapshot.every=100000", "launch.nodes=2", "launch.ranks_per_node=1"]
LONG += ["launch.preflight=false", "launch.time=20"]


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def launch(run: Path, data: Path, *settings: str) -> None:
    """Launches an endless training on two nodes; its name is known from here on."""
    vernier("launch", TINY, *LONG, f"data.dir={data}", f"run.dir={run}", *settings)
    vernier("status", run)


def status(name: str) -> dict:
    """As a user has it in another directory, by the run's name."""
    return json.loads(vernier("status", name, "--json").stdout)


def steps(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").is_file() else 0


def test_a_run_is_watched_over_a_requeue_and_stopped_with_both_its_jobs(
    cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "watched"
    launch(run, tiny_data, "launch.board=true", "eval.placement=separate")
    cluster.wait(lambda: steps(run) > 5 and (run / "board.json").is_file(), 240)

    found = status("watched")
    assert [(job["component"], job["state"]) for job in found["jobs"]] == [("train", "RUNNING"), ("eval", "RUNNING")]
    train, scores = (job["job"] for job in found["jobs"])
    told = vernier("status", "watched").stdout
    assert told.startswith("watched  running\n")
    assert f"train {train} RUNNING on node[" in told
    board = found["board"]
    assert board["host"].startswith("node")
    port = board["port"]
    assert re.fullmatch(rf"ssh -J \S+ -N -L {port}:127\.0\.0\.1:{port} (\S+@)?{board['host']}", board["ssh"])
    assert board["ssh"] in told
    curve = f"{board['url']}data/plugin/scalars/scalars?run=train&tag=1_loss/nats_per_token"
    cluster.wait(lambda: len(ask(curve) or []) > 3, 60)
    assert [step for _, step, _ in ask(curve)][:3] == [1, 2, 3]

    follower = subprocess.Popen(
        [*VERNIER, "logs", "watched", "--job", "--follow"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert follower.stdout is not None
    lines = follower.stdout
    reader = threading.Thread(target=lambda: said.extend(lines), daemon=True)
    reader.start()
    try:
        cluster.wait(lambda: any("ranks meet at" in line for line in said), 30)
        cluster.ask("scontrol", "requeue", train)
        seen = set()

        def waits() -> bool:
            seen.add((status("watched")["state"], vernier("status", "watched").stdout.splitlines()[0]))
            return any("waiting in the queue: (" in words for _, words in seen)

        cluster.wait(waits, 60)
        assert not [words for _, words in seen if "died" in words or "silent" in words]

        def runs_again() -> bool:
            found = status("watched")
            return bool(found["state"] == "running" and found["requeues"] == 1)

        cluster.wait(runs_again, 240, lambda: vernier("status", "watched").stdout + "".join(said[-20:]))
        assert sum("ranks meet at" in line for line in said) == 2
        assert follower.poll() is None

        told = vernier("stop", "watched").stdout
        step = len(losses(run))
        assert f"watched: stopped with a checkpoint; step {step}, its last checkpoint is of step {step}" in told
        assert json.loads((run / "state.json").read_text())["exit_code"] == 75
        for job in (train, scores):
            cluster.wait(lambda job=job: cluster.state(job) in ("COMPLETED", "FAILED"), 120)
        assert cluster.state(scores) == "COMPLETED"  # by itself
        assert cluster.jobs()[train]["restart_cnt"] == 1  # not queued again
        assert follower.wait(60) == 0
        reader.join(10)
        assert said[-1].startswith("the run has ended: stopped with a checkpoint")
    finally:
        follower.kill()
    cluster.wait(lambda: ask(board["url"]) is None or status("watched")["board"] is None, 30)


def test_rank_1_and_its_error_are_named_and_its_log_is_shown_from_elsewhere(
    cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "hanging"
    launch(run, tiny_data, "guards.hang_s=3", "eval.placement=none")
    cluster.wait(lambda: steps(run) > 5, 240)
    os.kill(the(run, "rank", "trainer", 1), signal.SIGSTOP)
    cluster.wait(lambda: status("hanging")["state"] == "failed", 120)
    told = vernier("status", "hanging").stdout
    assert re.search(r"ended .*; rank 1[: ].*; exit code 1", told)
    logs = vernier("logs", "hanging", "--lines", 5).stdout.splitlines()
    assert logs[0].startswith("rank 1")
    assert logs[1] == f"==> {run}/logs/rank-1.log <=="
    (job,) = status("hanging")["jobs"]
    cluster.wait_for(job["job"], "FAILED", seconds=60)


def test_what_waits_in_the_queue_is_taken_out_and_what_runs_is_ended_at_once(
    cluster, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, site = tmp_path / "waiting", tmp_path / "site.yaml"
    site.write_text("queue: {sbatch: ['--begin=now+1hour']}\n")
    launch(waiting, tiny_data, "eval.placement=separate", "--site", str(site))
    assert vernier("status", "waiting").stdout.startswith("waiting  waiting in the queue: (BeginTime)\n")
    jobs = [job["job"] for job in status("waiting")["jobs"]]
    assert len(jobs) == 2
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
        told = vernier("status", "waiting").stdout
        assert told.startswith(f"waiting  pending; job {jobs[0]} was submitted\n")
        assert "Slurm cannot be asked just now: " in told
    told = vernier("stop", "waiting").stdout
    assert told.splitlines()[-1] == "waiting: stopped before its first checkpoint; step 0, no checkpoint"
    assert {cluster.state(job) for job in jobs} == {"CANCELLED"}
    assert "waiting is not running: stopped before its first checkpoint" in vernier("stop", "waiting").stdout

    run = tmp_path / "stuck"
    launch(run, tiny_data, "eval.placement=separate")
    cluster.wait(lambda: steps(run) > 25, 240)
    for rank in (0, 1):
        os.kill(the(run, "rank", "trainer", rank), signal.SIGSTOP)  # no step ends any more
    begun = time.monotonic()
    told = vernier("stop", "stuck", "--now").stdout
    assert time.monotonic() - begun < 90
    assert "cancelling train " in told
    found = status("stuck")
    assert found["state"] == "stopped"
    assert {job["state"] for job in found["jobs"]} == {"CANCELLED"}
    assert found["checkpoint"] >= 20
    assert not (run / "STOP").exists()
