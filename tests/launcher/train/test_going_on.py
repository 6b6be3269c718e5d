"""A training that is stopped or killed goes on with the same command, to the same bits, and leaves no orphan."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, lines, losses, table_of, vernier, wait_for
from faults.running import processes, the

STEPS = 240
SETTINGS = [f"steps={STEPS}", "checkpoint.every=20", "snapshot.every=120", "model.attention_dropout=0.1"]


def at_step(run: Path, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        path = run / "metrics.jsonl"
        return path.is_file() and path.read_text().count("\n") >= step

    return reached


def start(*settings: str) -> subprocess.Popen[str]:
    command = [*VERNIER, "train", TINY, *SETTINGS, *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def gone_within(run: Path, seconds: float) -> None:
    wait_for(lambda: not processes(run), seconds)


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    vernier("train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}")
    return run


def weights(run: Path) -> str:
    return json.loads((run / "snapshots" / f"step-{STEPS:08d}" / "manifest.json").read_text())["weights"]


@pytest.mark.real
def test_stopped_and_killed_it_goes_on_to_the_same_bits(straight: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "eval.nproc=2"]

    training = start(*where)  # Ctrl-C: a checkpoint of the step it was at
    wait_for(at_step(run, 30))
    training.send_signal(signal.SIGINT)
    said, _ = training.communicate(timeout=60)
    assert training.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    gone_within(run, 10)
    stopped_at = json.loads((run / "state.json").read_text())["step"]
    assert (run / "checkpoints" / f"step-{stopped_at:08d}").is_dir()

    training = start(*where)  # kill -9 of the agent: its ranks and the evaluator go with it
    wait_for(at_step(run, max(70, stopped_at + 30)))
    os.kill(the(run, "agent", "trainer"), signal.SIGKILL)
    said, _ = training.communicate(timeout=60)
    assert training.returncode == 1, said
    gone_within(run, 10)
    assert f"going on from step {stopped_at}, written by 2 ranks" in said
    assert json.loads((run / "state.json").read_text())["state"] == "failed"

    training = start(*where)  # kill -9 of the evaluator: training does not notice; kill -9 of vernier: all go
    wait_for(at_step(run, 120))
    os.kill(the(run, "agent", "eval"), signal.SIGKILL)
    wait_for(lambda: "evaluator died" in (run / "events.jsonl").read_text())
    training.kill()
    training.communicate(timeout=60)
    gone_within(run, 10)

    done = vernier("train", TINY, *SETTINGS, *where)  # and on to the end
    assert "going on from step" in done.stderr
    gone_within(run, 10)
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    for step in (0, 120, 240):
        assert table_of(run, step).read_bytes() == table_of(straight, step).read_bytes()

    again = vernier("train", TINY, *SETTINGS, *where)  # a finished run says so
    assert "is finished" in again.stderr


def test_extended_when_asked_anew_when_asked_and_not_from_a_damaged_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = [TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "checkpoint.every=5"]
    vernier("train", *where, "steps=10")
    said = vernier("train", *where, "steps=20", "--extend").stderr
    assert "the cosine schedule is drawn anew over 20 steps" in said
    assert len(losses(run)) == 20
    vernier("train", *where, "--fresh", "model.vocab_size=100", code=2)  # refused before anything is moved
    assert len(losses(run)) == 20
    vernier("train", *where, "steps=10", "--fresh")
    assert len(losses(run)) == 10
    (old,) = tmp_path.glob("run.old-*")
    assert len(losses(old)) == 20

    shard = next((run / "checkpoints" / "step-00000010").glob("rank-00001*"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1  # one bit
    shard.write_bytes(content)
    said = vernier("train", *where, "steps=20", "--extend").stderr
    assert said.count("rank-00001.safetensors: changed since it was written") == 1
    assert "going on from step 5, written by 2 ranks" in said
    assert (run / "quarantine" / "step-00000010.1").is_dir()
    assert len(losses(run)) == 20


@pytest.mark.real
def test_a_second_trainer_started_by_hand_is_refused_and_a_stop_at_start_is_not_lost(
    tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "steps=100000"]
    first = start(*where)
    wait_for(lambda: (run / "checkpoints").is_dir())
    second = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
            *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "trainer", TINY, *SETTINGS, *where),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert second.returncode == 1
    assert "is held by process" in second.stderr
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["exit_code"], state["failure"]) == ("running", None, None)
    first.send_signal(signal.SIGTERM)
    assert "stopped at step" in first.communicate(timeout=60)[0]
    assert first.returncode == 75

    third = start(*where)  # asked to stop before its ranks are up
    wait_for(lambda: json.loads((run / "state.json").read_text())["state"] == "pending")
    third.send_signal(signal.SIGTERM)
    said, _ = third.communicate(timeout=90)
    assert third.returncode == 75, said
    gone_within(run, 10)


def test_gradients_that_are_never_finite_end_the_training_with_their_reason(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["optimizer.lr=1e30", "clip_grad_norm=null", "steps=400", "eval.placement=none"]
    settings += ["guards.non_finite=101"]
    done = vernier("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}", *settings, code=1)
    assert "no update could be made with 100 batches in a row" in done.stderr
    skipped = [line for line in lines(run / "events.jsonl") if line["kind"] == "skipped"]
    assert len(skipped) == 100


def test_killed_before_a_step_is_scored_inline_it_is_scored_on_going_on(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*VERNIER, "train", TINY, f"data.dir={tiny_data}", f"run.dir={run}"]
    faults = {**os.environ, "VERNIER_FAULTS": "kill=thinned:0:2"}  # step 10's snapshot and checkpoint are there
    killed = subprocess.run(command, cwd=ROOT, env=faults, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == 1, killed.stderr
    assert (run / "checkpoints" / "step-00000010").is_dir()
    assert not list(run.glob("losses/*/step-00000010@*.parquet"))
    said = vernier("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}").stderr
    assert "going on from step 10," in said
    for step in (0, 10, 20):
        assert table_of(run, step).is_file()
