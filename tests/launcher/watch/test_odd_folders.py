"""`status`, `logs` and `stop` given what is no run, and a sweep's folder: its members are meant."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from conftest import vernier
from test_unanswered import own_index, put  # noqa: F401  # a fixture

from configs.run.directory import RunDir
from launcher.jobs.log import add_job
from launcher.watch.run_status import all_runs


def make_run(path: Path, state: str = "done", **facts: object) -> RunDir:
    path.mkdir(parents=True)
    run = RunDir(path)
    run.write_state(state, step=3, steps=3, exit_code=0 if state == "done" else None, **facts)
    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of three members: one is done, one has failed, one has not begun."""
    folder = tmp_path / "sweep"
    make_run(folder / "a")
    make_run(folder / "b", "failed", failure={"rank": 1, "error": "no luck", "time": time.time()})
    (folder / "c").mkdir()
    members = [{"name": name, "seed": 0, "values": {}} for name in ("a", "b", "c", "gone")]
    (folder / "sweep.json").write_text(json.dumps({"kind": "sweep", "members": members}))
    return folder


def test_what_is_no_run_hides_none_that_is(tmp_path: Path) -> None:
    here = tmp_path / "runs"
    make_run(here / "a")
    make_run(here / "b")
    (here / "empty").mkdir()
    (here / "notes.txt").write_text("mine")
    told = vernier("status", *sorted(here.iterdir()))
    assert [line.split()[0] for line in told.stdout.splitlines() if "3/3" in line] == ["a", "b"]
    assert [line.split(":")[1].strip() for line in told.stderr.splitlines()] == [
        str(here / "empty"),
        str(here / "notes.txt"),
    ]
    assert len(json.loads(vernier("status", *here.iterdir(), "--json").stdout)) == 2
    refused = vernier("status", here / "empty", here / "notes.txt", code=2).stderr
    assert refused.startswith(f"error: {here / 'empty'}: not a run directory")
    assert refused.count("\n") == 1


def test_of_a_sweep_status_shows_the_members(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(vernier("status", sweep, "--json").stdout)
    assert [(one["name"], one["state"]) for one in found] == [("a", "done"), ("b", "failed"), ("c", "not started")]
    monkeypatch.chdir(sweep.parent)
    assert [run.path.name for run in all_runs(Path())] == ["a", "b", "c"]
    (sweep / "sweep.json").write_text("{")
    assert "sweep.json" in vernier("status", sweep, code=2).stderr


def test_of_a_sweep_logs_shows_the_first_member_that_failed(sweep: Path) -> None:
    log = sweep / "b" / "logs" / "rank-1.log"
    log.parent.mkdir()
    log.write_text("here it broke\n")
    told = vernier("logs", sweep).stdout
    assert "rank 1: no luck" in told
    assert "here it broke" in told
    RunDir(sweep / "b").write_state("done", failure=None)
    told = vernier("logs", sweep, code=2).stderr
    assert "no member has failed; name one by its path: a (done), b (done), c (not started)" in told


def test_a_stop_of_a_sweep_stops_all_its_members(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none of the 3 members is running" in vernier("stop", sweep).stdout
    put(
        monkeypatch,
        tmp_path,
        "squeue",
        f"""
        state=$([ -e {tmp_path}/cancelled ] && echo CANCELLED || echo PENDING)
        echo '{{"errors": [], "jobs": ['
        for n in 1 2; do
            echo '{{"job_id": 2'$n', "array_job_id": 20, "array_task_id": '$n', "job_state": "'$state'"}}'
            [ $n = 2 ] || echo ,
        done
        echo ']}}'""",
    )
    put(monkeypatch, tmp_path, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    for name, job in (("b", "20_1"), ("c", "20_2")):
        run = RunDir(sweep / name)
        add_job(run, "submitted", component="train", backend="slurm", job=job)
        run.write_state("pending", failure=None, exit_code=None, job=job)
        run.lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    told = vernier("stop", sweep).stdout
    assert "b: stopped before its first checkpoint" in told
    assert "c: stopped before its first checkpoint" in told
    assert (tmp_path / "cancelled").read_text().splitlines()[0] == "--state=PENDING 20_1 20_2"
