"""Being told to stop by whatever reaches one process: a checkpoint of the step it is at, 75, and nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, lines, losses, wait_for
from faults.running import processes, the

pytestmark = pytest.mark.real

RARELY = ["checkpoint.every=100000", "snapshot.every=100000", "steps=100000"]


def state_of(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


def steps_made(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def stopped_by(act: Callable[[int], None], run: Path, settings: list[str], code: int = 75) -> str:
    """Trains on for 20 steps, acts (given vernier's pid), and gives what was said; all must have gone as promised."""
    command = [*VERNIER, "train", TINY, *RARELY, *settings]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        last = steps_made(run)
        wait_for(lambda: steps_made(run) > last + 20)
        act(training.pid)
        said, _ = training.communicate(timeout=90)
    finally:
        training.kill()
    assert training.returncode == code, said
    assert "Traceback" not in said
    wait_for(lambda: not processes(run), 10)
    state = state_of(run)
    assert (state["state"], state["exit_code"], state["failure"]) == ("stopping", code, None)
    newest = max((run / "checkpoints").iterdir()).name
    assert newest == f"step-{state['step']:08d}"
    assert state["step"] == len(losses(run))
    return said


def test_whatever_is_signalled_all_ranks_stop_with_a_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none"]

    def one_rank(_: int) -> None:
        before = steps_made(run)
        os.kill(the(run, "rank", "trainer", 1), signal.SIGTERM)
        wait_for(lambda: state_of(run)["exit_code"] is not None)
        assert state_of(run)["step"] <= before + 500  # of 100,000: at once, at most one more step after it was heard

    def agent(_: int) -> None:
        os.kill(the(run, "agent", "trainer"), signal.SIGUSR1)

    def all_at_once(vernier: int) -> None:  # as Slurm does; the agent's copies for its ranks come on top
        for pid in [vernier, *processes(run, module="trainer")]:
            os.kill(pid, signal.SIGUSR2)

    stopped_by(one_rank, run, settings)
    for act in (agent, all_at_once):
        before = state_of(run)["step"]
        assert f"going on from step {before}" in stopped_by(act, run, settings)
    stopped_by(lambda _: (run / "STOP").touch(), run, settings)


def test_an_evaluator_that_is_signalled_ends_no_training(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "eval.nproc=2"]

    def evaluator_then_vernier(vernier: int) -> None:
        wait_for(lambda: len(processes(run, "rank", "eval")) == 2)
        os.kill(the(run, "rank", "eval", 1), signal.SIGTERM)
        wait_for(lambda: "evaluator died" in (run / "events.jsonl").read_text())
        made = steps_made(run)
        wait_for(lambda: steps_made(run) > made + 20)
        os.kill(vernier, signal.SIGTERM)

    stopped_by(evaluator_then_vernier, run, settings)


def test_a_second_signal_within_moments_is_the_same_wish_and_a_later_one_ends_at_once(tmp_path: Path) -> None:
    code = """if True:
        import time
        from pathlib import Path
        from configs.run.directory import RunDir
        from trainer import stop_requests
        stop_requests.ONE_WISH_S = 1.0
        stop_requests.listen()
        requests = stop_requests.Requests(RunDir(Path()), watch_files=False)
        print("listening", flush=True)
        while not requests.poll().stop:
            time.sleep(0.01)
        print("stopping", flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rank = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "listening\n"
        rank.send_signal(signal.SIGUSR1)
        assert rank.stdout.readline() == "stopping\n"
        rank.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        assert rank.poll() is None
        rank.send_signal(signal.SIGTERM)
        _, said = rank.communicate(timeout=10)
    finally:
        rank.kill()
    assert rank.returncode == 128 + signal.SIGTERM
    assert said == "SIGTERM again, 1 s after the first: ending at once\n"


def test_of_two_started_at_once_one_trains_and_the_other_has_written_nothing(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*VERNIER, "train", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none"]
    both = [
        subprocess.Popen(
            [*command, f"checkpoint.keep={keep}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for keep in (3, 4)
    ]
    said = [training.communicate(timeout=120)[0] for training in both]
    assert sorted(training.returncode for training in both) == [0, 2], said
    won = 0 if both[0].returncode == 0 else 1
    assert f"run.dir: {run} is held by process " in said[1 - won]
    assert f"keep: {3 + won}" in (run / "config.yaml").read_text()
    assert f"keep: {3 + won}" in (run / "train-config.yaml").read_text()
    assert len(losses(run)) == 20
    assert (state_of(run)["state"], state_of(run)["attempt"]) == ("done", 1)
    assert [line["kind"] for line in lines(run / "events.jsonl")].count("started") == 1


def without_nohup() -> None:
    """What the suite itself may have been started by, and a user's command here is not."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_terminal_that_is_closed_is_a_wish_to_stop_like_any_other(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none"]
    ours, theirs = os.openpty()
    command = [*VERNIER, "train", TINY, *RARELY, *settings]
    training = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=without_nohup)
    try:
        os.close(theirs)
        wait_for(lambda: steps_made(run) > 20)
        os.close(ours)  # nothing can be said from here on
        training.send_signal(signal.SIGHUP)
        assert training.wait(90) == 75
    finally:
        training.kill()
    state = state_of(run)
    assert (state["state"], state["exit_code"], state["failure"]) == ("stopping", 75, None)
    assert (run / "checkpoints" / f"step-{state['step']:08d}").is_dir()
