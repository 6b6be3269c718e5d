"""A disk that fills up in the middle of a save: the last good checkpoint stays, and everybody is told."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, lines, losses, vernier

from configs.files.atomic import verify

# 1.6 million parameters: a checkpoint of 19 MiB.
MODEL = ["model.hidden_size=192", "model.intermediate_size=768", "model.num_hidden_layers=2"]
SETTINGS = [*MODEL, "batch.global=4", "batch.micro=2", "steps=60", "checkpoint.every=10", "checkpoint.keep=1"]
SETTINGS += ["snapshot.every=60", "eval.placement=none"]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 64 MiB, mounted as the run's `checkpoints`."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_training_goes_on_then_stops_cleanly_and_later_goes_on(
    small_disk: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = small_disk.parent
    straight = tmp_path / "straight"
    vernier("train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={straight}")

    command = [*VERNIER, "train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}"]
    # Rank 1 waits before it writes, long enough for somebody else to take the room.
    environment = {**os.environ, "VERNIER_FAULTS": "pause=copied:1:4"}
    training = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while not (small_disk / "step-00000010").is_dir() or not (small_disk / ".step-00000020.partial").is_dir():
            assert time.monotonic() < deadline
            assert training.poll() is None
            time.sleep(0.02)
        somebodys = small_disk / "somebody-elses"
        with open(somebodys, "wb") as file:
            while os.statvfs(small_disk).f_bavail:
                try:
                    file.write(bytes(1 << 16))
                    file.flush()
                except OSError:
                    break
        said, _ = training.communicate(timeout=240)
    finally:
        training.kill()
    assert training.returncode == 1, said
    assert "a save failed: rank" in said
    assert "the last whole checkpoint is of step 10; training goes on" in said
    assert "training stops" in said
    assert "could not be written" in said
    assert "step 10" in said
    assert "Traceback" not in said
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["exit_code"]) == ("failed", 1)
    assert "No space left" in state["failure"]["error"] or "could not be written" in state["failure"]["error"]
    assert sorted(path.name for path in small_disk.iterdir()) == ["somebody-elses", "step-00000010"]
    verify(small_disk / "step-00000010", "checkpoint")
    assert [e["kind"] for e in lines(run / "events.jsonl")].count("save failed") >= 3

    somebodys.unlink()
    said = vernier("train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}").stderr
    assert "going on from step 10," in said
    assert losses(run) == losses(straight)


def test_a_full_disk_under_the_board_is_said_once_and_ends_no_training(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    board = run / "tensorboard"
    board.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(board)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (board / "somebody-elses").write_bytes(bytes(4096))
        vernier("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}")
    finally:
        subprocess.run(["umount", "-l", str(board)], check=True)
    assert len(losses(run)) == 20
    told = [event["message"] for event in lines(run / "events.jsonl") if event["kind"] == "not shown"]
    assert len(told) == 2  # training's, and the evaluator's
    for message in told:
        assert "No space left on device" in message
