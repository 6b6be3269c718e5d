"""`vernier status`, as a user types it, on real run directories and on ones that a fault has left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, WITHOUT_SLURM, losses, table_of, vernier

from configs.errors import DataError
from configs.files.seal import sealed, unsealed
from configs.run.directory import RunDir
from configs.run.last_words import tail_lines
from configs.scheduler import SlurmJob
from eval.tables import read_mean_loss
from launcher.jobs.log import add_job
from launcher.text import duration
from launcher.watch.events import event_rows
from launcher.watch.run_status import all_runs, facts_of


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of this machine's runs, and nothing is left for it to know."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDir:
    """A copy of a run, to be changed."""
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    return RunDir(tmp_path / "run")


def set_state(run: RunDir, *, heard: float | None = None, **facts: Any) -> None:
    """Puts facts into state.json; `heard`: seconds since the last sign of life."""
    before = json.loads(run.state.read_text())
    when = time.time() - (heard or 0)
    run.state.write_text(json.dumps(sealed({**unsealed(before), **facts, "heartbeat": when})))
    run.lock.touch()
    os.utime(run.lock, (when, when))


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """The run's lock in the hands of a trainer."""
    with open(run.lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "attempt": 3, "job": None}, file)
        file.flush()
        yield


def test_of_a_finished_run_it_says_losses_checkpoint_and_score(tiny_run: Path) -> None:
    told = vernier("status", tiny_run).stdout
    assert told.startswith("run  done\n")
    assert "20 of 20, 100.0 %" in told
    assert "mean of the last 20 steps" in told
    assert "(standard error)" in told
    assert "exit code 0" in told
    found = json.loads(vernier("status", tiny_run, "--json").stdout)
    assert found["loss"] == losses(tiny_run)[-1]
    assert found["loss_mean"] == pytest.approx(np.mean(losses(tiny_run)))
    assert found["loss_se"] == pytest.approx(np.std(losses(tiny_run), ddof=1) / 20**0.5)
    assert (found["checkpoint"], found["steps_to_lose"]) == (20, 0)
    assert (found["scored"], found["waiting"]) == (20, 0)
    assert found["reference_loss"] == pytest.approx(read_mean_loss(table_of(tiny_run, 20))[0])
    assert found["reference_se"] > 0
    assert "events" not in found


def test_several_runs_are_a_table_and_a_list(tiny_run: Path, run: RunDir) -> None:
    told = vernier("status", tiny_run, run.path).stdout
    assert [line.split()[:4] for line in told.splitlines() if "20/20" in line] == [
        ["run", "done", "20/20", "100.0"]
    ] * 2
    assert [one["state"] for one in json.loads(vernier("status", tiny_run, run.path, "--json").stdout)] == ["done"] * 2


def test_without_a_name_all_runs_of_the_folder_are_found(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.path.parent / "runs"
    folder.mkdir()
    run.path.rename(folder / "b")
    (folder / "a").mkdir()
    RunDir(folder / "a").write_state("pending", steps=20)  # not far enough for a config.yaml
    (folder / "no-run").mkdir()
    monkeypatch.chdir(run.path.parent)
    assert [(one.path.name, facts_of(one).state) for one in all_runs()] == [("a", "pending"), ("b", "done")]


def test_running_is_whoever_holds_the_lock(run: RunDir) -> None:
    set_state(run, state="running", exit_code=None, step=20, steps=1000)
    with held(run):
        told = vernier("status", run.path).stdout
        facts = facts_of(run)
    assert told.startswith("run  running\n")
    assert "20 of 1,000, 2.0 %; about" in told
    assert f"{os.getpid()} on {socket.gethostname()}, attempt 3, since" in told
    assert facts.seconds_left == pytest.approx(980 * (facts.step_s or 0))


def test_a_run_that_nobody_holds_and_that_is_silent_has_died(run: RunDir) -> None:
    set_state(run, state="running", exit_code=None, steps=1000, heard=300)
    shutil.rmtree(run.checkpoints / "step-00000020")
    told = vernier("status", run.path).stdout
    assert told.startswith("run  died\n")
    assert "no sign of life for 5 min" in told
    assert "step 10; 10 steps after it are to be made again" in told
    with held(run):
        os.utime(run.lock, (time.time() - 300,) * 2)
        assert facts_of(run).words == "running, but silent for 5 min"  # a rank that hangs, say


def test_on_another_host_it_is_judged_by_its_heartbeat(run: RunDir) -> None:
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    set_state(run, state="running", exit_code=None, heard=30)
    assert facts_of(run).state == "running"
    set_state(run, state="running", exit_code=None, heard=300)
    assert facts_of(run).state == "died"


def test_why_it_has_ended_is_said(run: RunDir) -> None:
    set_state(run, state="stopping", exit_code=75)
    told = vernier("status", run.path).stdout
    assert told.startswith("run  stopped with a checkpoint\n")
    assert "it was asked to stop; exit code 75" in told
    with open(run.metrics, "a") as file:
        file.write('{"step": 21, "loss": 4.0}\n')
    assert facts_of(run).words == "stopped before a checkpoint of its last steps"
    set_state(run, state="stopping", exit_code=75, again="micro-batches of 2", heard=300)
    assert facts_of(run).words == "waits to be started again"
    assert facts_of(run).why == "micro-batches of 2"
    failure = {"rank": 1, "error": "RuntimeError: \x1b[31mno", "time": time.time()}
    set_state(run, state="failed", exit_code=1, failure=failure)
    told = vernier("status", run.path).stdout
    assert "rank 1: RuntimeError: \\x1b[31mno; exit code 1" in told


def in_slurm(state: str, job: str = "12", reason: str = "", restarts: int = 0, nodes: str = "") -> dict[str, SlurmJob]:
    """What Slurm says of one job."""
    return {job: SlurmJob(job, "tiny", state, reason, 0, restarts, nodes)}


def test_a_run_that_waits_in_the_queue_says_so_and_has_not_died(run: RunDir) -> None:
    set_state(run, state="running", exit_code=None, steps=1000, heard=300)
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    waiting = facts_of(run, told=in_slurm("PENDING", reason="Resources"))
    assert (waiting.state, waiting.words, waiting.why) == ("pending", "waiting in the queue: (Resources)", None)
    add_job(run, "started", component="train", backend="slurm", job="12")
    set_state(run, state="requeued", exit_code=75, job="12", heard=3000)
    add_job(run, "requeued", component="train", backend="slurm", job="12")
    again = facts_of(run, told=in_slurm("PENDING", reason="BeginTime", restarts=1))
    assert (again.state, again.words, again.requeues) == ("requeued", "waiting in the queue: (BeginTime)", 1)
    assert (again.exit_code, again.ended) == (None, None)
    # A node was lost: Slurm queues the job again, and nobody could write that down.
    set_state(run, state="running", exit_code=None, job="12", heard=3000)
    assert facts_of(run, told=in_slurm("PENDING", reason="BeginTime", restarts=2)).requeues == 2


def test_a_turn_that_a_successor_takes_is_one(run: RunDir) -> None:
    add_job(run, "submitted", component="train", backend="slurm", job="11")
    add_job(run, "started", component="train", backend="slurm", job="11")
    add_job(run, "requeued", component="train", backend="slurm", job="11")
    add_job(run, "successor", component="train", backend="slurm", job="12", after="11")
    assert facts_of(run, told=in_slurm("PENDING")).requeues == 1
    add_job(run, "started", component="train", backend="slurm", job="12")
    assert facts_of(run, told=in_slurm("RUNNING")).requeues == 1


def test_a_job_that_slurm_starts_again_is_not_shown_as_stopped(run: RunDir) -> None:
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    add_job(run, "started", component="train", backend="slurm", job="12", restart=0)
    set_state(run, state="stopping", exit_code=75, job="12")  # it was preempted, with a checkpoint
    assert facts_of(run, told=in_slurm("COMPLETING")).words == "stopped for now; Slurm has its job still"
    again = facts_of(run, told=in_slurm("RUNNING", restarts=1))
    assert (again.state, again.words) == ("requeued", "starting again in job 12 (RUNNING)")
    assert facts_of(run, told=in_slurm("CANCELLED")).state == "stopped"
    set_state(run, state="stopping", exit_code=75, job_ended=True)
    assert facts_of(run, told=in_slurm("COMPLETING")).state == "stopped"


def test_a_job_that_runs_has_not_died_however_long_it_takes_to_start(run: RunDir) -> None:
    set_state(run, state="pending", exit_code=None, job="12", heard=3000)
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    facts = facts_of(run, told=in_slurm("RUNNING", nodes="node[1-2]"))
    assert (facts.state, facts.words) == ("pending", "starting in job 12 (RUNNING)")
    line = unsealed(json.loads(run.jobs.read_text()))
    run.jobs.write_text(json.dumps({**line, "time": time.time() - 9000}) + "\n")
    set_state(run, state="running", exit_code=None, job="12", heard=3000)
    facts = facts_of(run, told=in_slurm("RUNNING", nodes="node[1-2]"))
    assert (facts.state, facts.words) == ("running", "running, but silent for 50 min")


def test_a_run_whose_job_is_gone_has_died(run: RunDir) -> None:
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    set_state(run, state="running", exit_code=None, job="12", heard=30)
    run.lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "job": "12"}))
    set_state(run, heard=30)
    for told, how in (
        ({}, "Slurm does not know it any more"),
        (in_slurm("NODE_FAIL", reason="NodeDown"), "(NodeDown)"),
    ):
        facts = facts_of(run, told=told)
        assert (facts.state, facts.words) == ("died", "died")
        assert how in (facts.why or "")
    assert facts_of(run, told=None).state == "running"  # nobody knows of the job, and 30 s is no long silence
    set_state(run, state="requeued", exit_code=75, job="12", heard=300)
    assert facts_of(run, told=in_slurm("CANCELLED")).words == "died in the queue"
    with held(run):  # it trains here by now, outside of any job
        set_state(run, state="running", exit_code=None)
        assert facts_of(run, told={}).words == "running"


def test_both_jobs_are_told_as_one_run(run: RunDir) -> None:
    add_job(run, "submitted", component="train", backend="slurm", job="8")
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    add_job(run, "submitted", component="eval", backend="slurm", job="13")
    told = in_slurm("RUNNING", nodes="node[1-2]", restarts=1) | in_slurm("PENDING", "13", reason="Priority")
    found = [(j["component"], j["job"], j["state"], j["reason"], j["nodes"]) for j in facts_of(run, told=told).jobs]
    assert found == [("train", "12", "RUNNING", "", "node[1-2]"), ("eval", "13", "PENDING", "Priority", "")]
    assert json.loads(json.dumps(facts_of(run, told=told).to_json()))["jobs"][0]["restarts"] == 1


@WITHOUT_SLURM
def test_a_scheduler_that_cannot_be_asked_is_said_and_the_run_is_told_of(
    variable: str, value: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    set_state(run, state="requeued", exit_code=75, job="12", heard=300)
    told = vernier("status", run.path).stdout
    assert told.startswith("run  requeued; job 12 was submitted\n")
    assert "train 12: Slurm cannot be asked" in told
    assert "Slurm cannot be asked just now: " in told
    assert told.endswith("so this is what the runs' own files say\n")
    found = json.loads(vernier("status", run.path, "--json").stdout)
    assert (found["state"], found["jobs"][0]["state"]) == ("requeued", "unknown")
    table = vernier("status", run.path, run.path).stdout
    assert "12 ?" in table


def test_adaptations_guards_quarantine_and_what_waits_are_told(run: RunDir) -> None:
    adapted = {"micro": 2, "gradient_checkpointing": True, "passed_over": [37, 38], "returns": 0, "from_step": 0}
    (run.path / "adapted.json").write_text(json.dumps(adapted))
    (run.quarantine / "step-00000010.1").mkdir(parents=True)
    table_of(run.path, 20).unlink()
    run.add_event("spike", "a loss of 9", step=7, rank=0)
    run.add_event("spike", "a loss of 8", step=9, rank=0)
    told = vernier("status", run.path).stdout
    assert "micro-batches of at most 2 windows; activations are checkpointed; positions passed over: 37, 38" in told
    assert "spike ×2" in told
    assert "step-00000010.1" in told
    assert "step 10: reference loss" in told
    assert "1 snapshot waits" in told
    run.add_event("not scored", "a loss that is not finite", step=20)
    assert facts_of(run).waiting == 0  # nobody will try again


def test_only_the_end_of_a_long_run_is_read(run: RunDir) -> None:
    lines = run.metrics.read_bytes()
    with open(run.metrics, "wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room, and that nobody can read
        file.seek(0, 2)
        file.write(b"\n" + 4 * lines + b'{"step": 21, "lo')
    found = tail_lines(run.metrics, count=5)
    assert [line["step"] for line in found] == [16, 17, 18, 19, 20]
    assert facts_of(run).step == 20


def test_lines_longer_than_a_read_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"n": n, "text": "x" * 100_000}) + "\n" for n in range(5)))
    assert [line["n"] for line in tail_lines(path, count=2)] == [3, 4]
    assert [line["n"] for line in tail_lines(path)] == [0, 1, 2, 3, 4]
    assert [line["n"] for line in tail_lines(path, most_bytes=250_000)] == [3, 4]
    assert tail_lines(tmp_path / "none.jsonl", count=2) == []


def test_a_loss_that_is_no_number_is_null_and_out_of_the_mean(run: RunDir) -> None:
    with open(run.metrics, "a") as file:
        file.write('{"step": 21, "loss": NaN, "lr": 0.001, "step_s": 0.1, "tokens_per_s": 100.0}\n')
    found = json.loads(vernier("status", run.path, "--json").stdout)
    assert found["step"] == 21
    assert found["loss"] is None
    assert found["loss_mean"] == pytest.approx(np.mean(losses(run.path)[:20]))


def test_events_are_a_table_and_bookkeeping_is_folded(run: RunDir) -> None:
    for step in range(30, 150, 10):
        run.add_event("checkpoint", f"step-{step:08d}", step=step, rank=0)
    for step in (5, 6, 7, 8, 9):
        run.add_event("spike", f"loss at {step}", step=step, rank=0)
    stacks = {"1": "File loop.py, line 1\nFile \x1b[2Jx.py, line 2"}
    run.add_event("hung", "rank 1 has made no step for 900 s", rank=1, stacks=stacks)
    told = vernier("status", run.path, "--events").stdout
    assert ["30–140", "0", "checkpoint", "×12"] in [line.split()[2:] for line in told.splitlines()]
    assert told.count("loss at ") == 5
    place = told.index("rank 1 has made no step for 900 s")
    assert told.index("stacks:") > place
    assert "      1:\n" in told
    assert "        File loop.py, line 1\n" in told
    assert "\x1b" not in told
    assert told.index("started") < told.index("hung")
    assert len(json.loads(vernier("status", run.path, "--events", "--json").stdout)["events"]) == len(run.read_events())


def test_what_stands_alone_is_not_folded_and_time_goes_forward() -> None:
    kinds = ["started", "checkpoint", "scored", "checkpoint", "scored", "skipped", "done"]
    rows = event_rows({"time": n, "step": n, "rank": 0, "kind": kind, "message": "m"} for n, kind in enumerate(kinds))
    assert [row.kind for row in rows] == kinds
    many = [{"time": n, "step": n, "kind": ("checkpoint", "scored")[n % 2], "message": ""} for n in range(20)]
    rows = event_rows([*many, {"time": 99, "kind": "failed", "message": "one\ntwo"}, *many[:2]])
    assert [(row.kind, row.step) for row in rows[:2]] == [("checkpoint", "0–18"), ("scored", "1–19")]
    assert [row.kind for row in rows[2:]] == ["failed", "checkpoint", "scored"]
    assert (rows[2].message, rows[2].detail) == ("one", ("two",))


def test_the_last_fifty_events_are_shown_unless_all_are_asked_for(run: RunDir) -> None:
    for number in range(70):
        run.add_event("spike", f"number {number}.", step=number, rank=0)
    told = vernier("status", run.path, "--events").stdout
    assert told.startswith("… ")
    assert "number 19." not in told
    assert "number 20." in told
    assert "number 0." in vernier("status", run.path, "--events", "--all").stdout
    assert "--all goes with --events" in vernier("status", run.path, "--all", code=2).stderr


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = vernier("status", tmp_path, code=2).stderr
    assert told == f"error: {tmp_path}: not a run directory (it has neither config.yaml nor state.json)\n"
    monkeypatch.chdir(tmp_path)
    from launcher.watch.status import run_status

    with pytest.raises(DataError, match="no runs under runs/"):
        run_status([], events=False, all_events=False, json_out=True, console=None)  # type: ignore[arg-type]


def test_settings_or_scores_that_cannot_be_read_do_not_silence_it(run: RunDir) -> None:
    run.config.write_text("steps: [")
    run.events.unlink()
    told = vernier("status", run.path).stdout
    assert "20 of 20" in told
    assert "config.yaml cannot be read" in told
    mean = read_mean_loss(table_of(run.path, 20))[0]
    assert f"step 20: reference loss {mean:.4f}, perplexity " in told  # from the table, which does not tell its error


def test_it_loads_neither_torch_nor_what_reads_tables(tiny_run: Path) -> None:
    code = (
        "import sys\nfrom launcher.cli import app\n"
        f"app(['status', {str(tiny_run)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_times_are_told_to_two_units() -> None:
    told = [duration(seconds) for seconds in (0, 59.6, 61, 3600, 93784)]
    assert told == ["0 s", "1 min", "1 min 1 s", "1 h", "1 d 2 h"]
