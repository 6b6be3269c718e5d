"""`vernier logs`, as a user types it: the rank that failed first, any other, a job's; followed until the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, VERNIER, vernier

from configs.run.directory import RunDir
from launcher.jobs.log import add_job
from launcher.watch.logs import STANDING_S, Follower, Standing, Wanted, choose, tail
from launcher.watch.run_index import remember

ERROR = "RuntimeError: \x1b[31mno such thing"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two ranks that rank 1 has ended, in two jobs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = RunDir(tmp_path / "broken")
    run.logs.mkdir(parents=True)
    for rank in (0, 1):
        (run.logs / f"rank-{rank}.log").write_text("".join(f"rank {rank}, line {n}\n" for n in range(100)))
    (run.logs / "eval-rank-0.log").write_text("of the evaluator\n")
    for number, job in enumerate((9, 10)):
        (run.logs / f"slurm-train-{job}.out").write_text(f"job {job}\n")
        os.utime(run.logs / f"slurm-train-{job}.out", (1e9 + number,) * 2)
    (run.logs / "slurm-eval-11.out").write_text("job 11, which scores\n")
    run.write_state("running", steps=10, step=4)
    run.record_failure(1, 1, ERROR)
    return run


def test_of_a_failed_run_the_failing_rank_is_shown_with_its_error_first(run: RunDir) -> None:
    remember(run.path)
    told = vernier("logs", "broken", "--lines", 3).stdout.splitlines()
    assert told == [
        "rank 1: RuntimeError: \\x1b[31mno such thing",
        f"==> {run.logs / 'rank-1.log'} <==",
        *(f"rank 1, line {n}" for n in (97, 98, 99)),
    ]
    assert len(vernier("logs", run.path).stdout.splitlines()) == 2 + 50


def test_another_rank_the_evaluator_and_the_newest_job_can_be_asked_for(run: RunDir) -> None:
    assert vernier("logs", run.path, "--rank", 0, "--lines", 1).stdout.splitlines()[1:] == ["rank 0, line 99"]
    assert vernier("logs", run.path, "--eval").stdout.splitlines()[1:] == ["of the evaluator"]
    assert vernier("logs", run.path, "--job").stdout.splitlines()[1:] == ["job 10"]
    assert choose(run, Wanted(evaluator=True, job=True)).name == "slurm-eval-11.out"


def test_the_task_of_a_sweeps_member_is_found_in_the_sweeps_folder(tmp_path: Path) -> None:
    member = RunDir(tmp_path / "sweep" / "lr1e-3")
    member.logs.mkdir(parents=True)
    (tmp_path / "sweep" / "logs").mkdir()
    for job in ("7_0", "7_1", "8_0"):
        (tmp_path / "sweep" / "logs" / f"slurm-train-{job}.out").write_text(f"task {job}\n")
    add_job(member, "submitted", job="7_1", component="train")
    assert vernier("logs", member.path, "--job").stdout.splitlines()[1:] == ["task 7_1"]


def test_a_log_that_is_not_there_is_refused_with_those_that_are(run: RunDir) -> None:
    for rank in range(2, 12):
        (run.logs / f"rank-{rank}.log").touch()
    told = vernier("logs", run.path, "--rank", 12, code=2).stderr
    assert told.startswith(f"error: {run.logs / 'rank-12.log'}: no such log; there are eval-rank-0.log, rank-0.log, ")
    assert "rank-9.log, rank-10.log, rank-11.log" in told
    assert vernier("logs", run.path, "--job", "--rank", 1, code=2).stderr.startswith("error: --job ")
    assert "no run of that name is known" in vernier("logs", "nobody", code=2).stderr


def test_where_no_rank_told_why_what_started_them_is_shown(run: RunDir) -> None:
    failure = {"rank": None, "error": "the training ranks ended without a word", "time": 0}
    run.write_state("failed", failure=failure)
    assert choose(run, Wanted()).name == "slurm-train-10.out"
    (run.logs / "train-torchrun-0.log").write_text("torchrun's words\n")
    (run.logs / "eval-torchrun.log").write_text("not these\n")
    assert vernier("logs", run.path).stdout.splitlines() == [
        "the training ranks ended without a word",
        f"==> {run.logs / 'train-torchrun-0.log'} <==",
        "torchrun's words",
    ]


def test_nothing_in_a_log_steers_the_terminal(run: RunDir) -> None:
    log = run.logs / "rank-1.log"
    log.write_bytes(b"\x1b]0;title\x07 \x1b[2J\x1b[32mgreen\x1b[0m \x9b31m \x00 \xff\n 10 %\r 20 %\r 100 %\r\nlast")
    told = vernier("logs", run.path).stdout
    assert told.splitlines()[2:] == ["\\x1b]0;title\\x07 green \ufffd31m \\x00 \ufffd", " 100 %", "last"]
    assert not set(told) & {"\x1b", "\x07", "\x00", "\r", "\x9b"}


def test_only_the_end_of_a_large_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.log"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room
        file.seek(0, 2)
        file.write(b"\none\ntwo\nthr")
    assert tail(path, 2) == ([b"one", b"two", b"thr"], (1 << 40) + 12)
    path.write_bytes(b"")
    assert tail(path, 2) == ([b""], 0)


def test_following_it_shows_what_is_added_and_ends_with_the_run(run: RunDir) -> None:
    run.write_state("running", failure=None, exit_code=None)
    (run.logs / "rank-0.log").write_text("before\nhalf a ")
    process = subprocess.Popen(
        [*VERNIER, "logs", str(run.path), "--follow"], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [f"==> {run.logs / 'rank-0.log'} <==\n", "before\n"]
        with open(run.logs / "rank-0.log", "a") as log:
            log.write("line\nnext\nno newline")
        assert [process.stdout.readline() for _ in range(2)] == ["half a line\n", "next\n"]
        run.write_state("failed", exit_code=1, failure={"rank": 1, "error": "gone", "time": time.time()})
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    told = rest.splitlines()
    assert told[:3] == ["no newline", f"==> {run.logs / 'rank-1.log'} <==", "rank 1, line 50"]
    assert told[-3:] == ["rank 1, line 99", "rank 1: gone", "the run has ended: failed"]
    assert process.returncode == 0


def test_ctrl_c_ends_the_following_and_is_no_failure(run: RunDir) -> None:
    run.write_state("running", failure=None, exit_code=None)
    (run.logs / "rank-0.log").unlink()
    process = subprocess.Popen(
        [*VERNIER, "logs", str(run.path), "--follow"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have us ignore it
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"waiting for {run.logs / 'rank-0.log'}\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_another_file_in_the_place_of_a_log_is_followed_and_the_end_of_the_first_is_not_lost(run: RunDir) -> None:
    run.write_state("running", failure=None, exit_code=None)
    log = run.logs / "rank-0.log"
    follower = Follower(run, Wanted(), 1)
    assert list(follower.added()) == [f"==> {log} <==", "rank 0, line 99"]
    with open(log, "a") as file:
        file.write("last of the first\nunended")
    log.rename(run.logs / "old")
    log.write_text("first of the second\n")
    assert list(follower.added())[:3] == ["last of the first", "unended", f"==> {log} <=="]
    log.write_text("anew\n")  # the same file, cut short
    assert "anew" in list(follower.added())


def test_a_further_job_is_followed_from_its_beginning(run: RunDir) -> None:
    follower = Follower(run, Wanted(job=True), 5)
    assert list(follower.added()) == [f"==> {run.logs / 'slurm-train-10.out'} <==", "job 10"]
    later = run.logs / "slurm-train-12.out"
    later.write_text("".join(f"line {n}\n" for n in range(9)))
    assert list(follower.added()) == [f"==> {later} <==", *(f"line {n}" for n in range(9))]


def test_a_run_has_ended_once_that_has_held_for_some_seconds(run: RunDir) -> None:
    now = 0.0
    standing = Standing(run, evaluator=False, clock=lambda: now)
    assert standing.over() == ""
    now += STANDING_S
    run.write_state("running", exit_code=None, failure=None)  # it was started again
    assert standing.over() == ""
    run.write_state("stopping", exit_code=75)
    for _ in range(3):
        now += STANDING_S
        said = standing.over()
    assert said.startswith("stopped")


def test_it_loads_neither_torch_nor_what_reads_tables(run: RunDir) -> None:
    code = (
        "import sys\nimport launcher.watch.stop\n"
        "from launcher.watch.logs import Wanted, run_logs\nfrom pathlib import Path\n"
        "from rich.console import Console\n"
        f"run_logs(Path({str(run.path)!r}), Wanted(), follow=False, console=Console())\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'numpy', 'pyarrow', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
