"""Runs launched on a real Slurm: over nodes, through time limits and lost nodes, to the bits of a local run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, lines, losses, remade, table_of, vernier
from testbed import Cluster

from configs.run.directory import RunDir
from tests.faults.same import differences
from trainer.data.shards import Windows
from trainer.order import share_of, windows_at

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

TWO = ["launch.nodes=2", "launch.ranks_per_node=1", "launch.time=20", "launch.signal_s=60", "launch.preflight=false"]
LONG = ["steps=1200", "checkpoint.every=100", "snapshot.every=300"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile under which no two jobs share a node."""
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text("queue: {partition: main, sbatch: [--exclusive]}\n")
    return path


def launched(run: Path, data: Path, *settings: object) -> dict[str, str]:
    """Launches a run; gives its jobs by what they are for."""
    vernier("launch", TINY, "--on", "slurm", f"data.dir={data}", f"run.dir={run}", *TWO, *settings)
    return {one["component"]: one["job"] for one in lines(run / "jobs.jsonl") if one["kind"] == "submitted"}


def steps_made(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def ended(cluster: Cluster, run: Path, job: str, state: str = "COMPLETED") -> None:
    found = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=400)
    logs = "".join(path.read_text()[-3000:] for path in run.glob("logs/slurm-*.out"))
    assert found == state, logs


def kill_node(cluster: Cluster, node: str) -> None:
    """`kill -9` of a node's slurmd and of all that it runs: a machine that lost its power."""
    doomed = {cluster.daemon(node)}
    named = f"SLURMD_NODENAME={node}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if named not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            while (entry / "comm").read_text().strip() not in ("slurmd", "systemd", "init") and entry.name != "1":
                doomed.add(int(entry.name))
                if (entry / "comm").read_text().strip() == "slurmstepd":
                    break
                parent = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)
                entry = Path("/proc") / (parent[1] if parent else "1")
        except OSError:
            continue
    doomed -= {1, os.getpid()}
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    return cluster.ask("scontrol", "show", "hostnames", str(cluster.jobs()[job]["nodes"])).split()


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run on two local ranks, scored inline, that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    vernier("train", TINY, *LONG, f"data.dir={tiny_data}", f"run.dir={run}")
    return run


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(["eval.placement=separate", "eval.nodes=2"], id="two jobs, 2 + 2 nodes", marks=pytest.mark.smoke),
        pytest.param(["eval.placement=het"], id="heterogeneous, 2 + 1 nodes"),
    ],
)
def test_two_nodes_train_and_others_score_to_the_bits_of_a_local_run(
    how: list[str], cluster: Cluster, site: Path, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    jobs = launched(run, tiny_data, "--site", site, *how)
    for job in jobs.values():
        ended(cluster, run, job)
    assert json.loads((run / "state.json").read_text())["state"] == "done"
    for step in (0, 10, 20):
        assert table_of(run, step).read_bytes() == table_of(tiny_run, step).read_bytes()
    found = json.loads(vernier("compare", run, "--json").stdout)
    local = json.loads(vernier("compare", tiny_run, "--json").stdout)
    assert [{**one, "versus_first": 0} for one in found["checkpoints"]] == [
        {**one, "versus_first": 0} for one in local["checkpoints"]
    ]


def test_ranks_whose_port_is_taken_meet_at_another(
    cluster: Cluster, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launched(run, tiny_data, "eval.placement=none")["train"]
    log = run / "logs" / f"slurm-train-{job}.out"

    def ports() -> list[int]:
        said = log.read_text() if log.is_file() else ""
        return [int(port) for port in re.findall(r"^ranks meet at \S+:(\d+);", said, re.MULTILINE)]

    cluster.wait(lambda: bool(ports()), 60)
    with socket.create_server(("127.0.0.1", ports()[0])):  # while the ranks' agents are still importing
        ended(cluster, run, job)
    assert len(set(ports())) == 2
    assert losses(run) == losses(tiny_run)


def test_a_time_limit_and_a_lost_node_leave_the_bits_of_an_undisturbed_run(
    cluster: Cluster, site: Path, tiny_data: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launched(run, tiny_data, "--site", site, *LONG, "eval.placement=separate")
    cluster.wait(lambda: steps_made(run) > 150, 120)
    cluster.ask("scancel", "--batch", "--signal=USR1", job["train"])  # as --signal=B:USR1 does before a time limit
    cluster.wait(lambda: cluster.jobs()[job["train"]]["restart_cnt"] == 1, 120)
    requeued_at = max(RunDir(run).whole_steps(run / "checkpoints"))
    assert requeued_at > 150
    cluster.wait(lambda: steps_made(run) > requeued_at + 150, 200)
    lost = nodes_of(cluster, job["train"])[1]
    kill_node(cluster, lost)
    cluster.wait(lambda: cluster.jobs()[job["train"]]["restart_cnt"] == 2, 120)
    try:
        ended(cluster, run, job["train"])
        assert lost not in nodes_of(cluster, job["train"])
        ended(cluster, run, job["eval"])
    finally:
        cluster.start_node(lost)
    assert differences(straight, run) == []
    starts = [one for one in lines(run / "jobs.jsonl") if one["kind"] == "started" and one["component"] == "train"]
    assert [one["restart"] for one in starts] == [0, 1, 2]


def test_an_evaluator_that_is_cancelled_or_whose_node_dies_is_nothing_to_the_training(
    cluster: Cluster, site: Path, tiny_data: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launched(run, tiny_data, "--site", site, *LONG, "eval.placement=separate")
    # A job that runs may still be on its way to its node; one that has scored is there.
    cluster.wait(lambda: steps_made(run) > 50 and any(run.glob("losses/*/step-*.parquet")), 240)
    (lost,) = nodes_of(cluster, job["eval"])
    kill_node(cluster, lost)
    try:
        cluster.wait(lambda: cluster.jobs()[job["eval"]]["restart_cnt"] == 1, 120)
        cluster.ask("scancel", job["eval"])
        ended(cluster, run, job["train"])
    finally:
        cluster.start_node(lost)
    assert cluster.jobs()[job["train"]]["restart_cnt"] == 0
    assert json.loads((run / "state.json").read_text())["attempt"] == 1
    again = launched(
        run, tiny_data, "--site", site, *LONG, "eval.placement=separate"
    )  # finished: only scores are missing
    ended(cluster, run, again["eval"])
    assert again["train"] == job["train"]
    assert differences(straight, run) == []


def test_a_training_that_fails_makes_a_failed_job_and_names_its_rank(
    cluster: Cluster, site: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    batch = windows_at(12, batch=16, windows=len(Windows(tiny_data, 64)), seed=3)
    window = int(np.concatenate(share_of(batch, rank=1, world=2, micro=4))[5])

    def change(part: Path) -> None:
        shard = np.load(part / "shards" / "train-00000.npy")
        shard[64 * window + 30] = 65535  # no such token; only rank 1 meets it
        np.save(part / "shards" / "train-00000.npy", shard)

    data = remade(tiny_data, tmp_path / "data", change)
    job = launched(run, data, "--site", site, "eval.placement=none")
    ended(cluster, run, job["train"], "FAILED")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    told = vernier("status", run, env=environment).stdout
    assert "failed" in told
    assert "rank 1" in told
    assert "IndexError" in told
    logs = vernier("logs", run, env=environment).stdout
    assert "index out of range" in logs
    assert "rank 1" in logs


def test_what_sbatch_refuses_is_told_with_the_setting_to_mend(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = ["launch", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "launch.time=3-00:00:00"]
    assert "time limit is invalid" in (said := vernier(*asked, code=2).stderr)
    assert "see launch.time" in said
    assert not (run / "state.json").exists()


def test_queueing_again_without_progress_has_an_end(
    cluster: Cluster, site: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["--site", site, "eval.placement=none", "launch.requeue_limit=1"]

    def starts() -> int:
        return sum(one["kind"] == "started" for one in lines(run / "jobs.jsonl"))

    cluster.ask("scontrol", "update", "nodename=ALL", "state=drain", "reason=test")
    try:
        job = launched(run, tiny_data, *settings)["train"]
        done = vernier("launch", TINY, f"data.dir={tiny_data}", f"run.dir={run}", *settings, *TWO, code=2)
        assert f"job {job} (train, pending)" in done.stderr
    finally:
        cluster.ask("scontrol", "update", "nodename=ALL", "state=resume")
    cluster.wait(lambda: starts() == 1, 60)  # and at once requeued: before it can have made a step
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(lambda: starts() == 2, 60)
    cluster.ask("scontrol", "requeue", job)
    ended(cluster, run, job, "FAILED")
    assert starts() == 2
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "failed"
    assert "queued again 2 times without a new checkpoint" in state["failure"]["error"]


def test_a_job_that_is_cancelled_by_hand_stays_ended(
    cluster: Cluster, site: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launched(run, tiny_data, "--site", site, *LONG, "eval.placement=separate")
    cluster.wait(lambda: steps_made(run) > 20, 120)
    cluster.ask("scancel", job["train"])
    ended(cluster, run, job["train"], "CANCELLED")
    ended(cluster, run, job["eval"])  # it sees that nothing more will come
    assert set(cluster.jobs()) >= set(job.values())
    assert [one["kind"] for one in lines(run / "jobs.jsonl")].count("submitted") == 2
    assert cluster.jobs()[job["train"]]["restart_cnt"] == 0
    assert RunDir(run).whole_steps(run / "checkpoints")  # it had the time for one


def test_a_sweep_is_an_array_whose_members_are_ranked(
    cluster: Cluster, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    settings = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'lr'}", *TWO, "launch.nodes=1"]
    asked = [*settings, "--sweep", "optimizer.lr=5e-4,5e-3", "--at-once", 1]
    vernier("launch", TINY, "--on", "slurm", *asked)
    refused = vernier("launch", TINY, "--on", "slurm", *asked, code=2)
    assert re.search(r"has job \d+_\d \(train, ", refused.stderr)
    sweep = tmp_path / "lr-sweep"
    assert not (sweep / "state.json").exists()  # a refusal is not the sweep's failure
    members = sorted(path.parent for path in sweep.glob("*/train-config.yaml"))
    cluster.wait(lambda: all(RunDir(one).read_state().get("state") == "done" for one in members), 240)
    assert len(members) == 2
    found = json.loads(vernier("compare", sweep, "--json").stdout)
    assert found["winner"]["values"] == {"optimizer.lr": "5e-3"}
    assert vernier("launch", TINY, "--on", "slurm", *asked).stdout.startswith("all members are finished")


def test_a_heterogeneous_job_ends_when_its_training_has_died(
    cluster: Cluster, site: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("VERNIER_FAULTS", "kill=copied:1:2")
    (job,) = launched(run, tiny_data, "--site", site, "eval.placement=het").values()
    ended(cluster, run, job, "FAILED")
    assert json.loads((run / "state.json").read_text())["state"] == "failed"
    assert table_of(run, 0).is_file()  # what there was is scored
