"""The file `SAVE` in a run directory: a checkpoint and a snapshot of the step it is at, and training goes on."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, TINY, VERNIER, lines, losses, vernier, wait_for

RARELY = ["eval.placement=none", "checkpoint.every=100000", "snapshot.every=100000"]


def steps_made(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def events(run: Path, kind: str) -> list[dict]:
    path = run / "events.jsonl"
    return [line for line in lines(path) if line["kind"] == kind] if path.is_file() else []


def train_until(what: Callable[[], None], settings: list[str]) -> str:
    """Trains for as long as `what` takes, then stops; gives what was said."""
    command = [*VERNIER, "train", TINY, *settings]
    training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        what()
        training.send_signal(signal.SIGTERM)
        said, _ = training.communicate(timeout=90)
    finally:
        training.kill()
    assert training.returncode == 75, said
    return said


def test_asked_for_it_is_written_once_and_leads_to_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*RARELY, "steps=100000", "ema.decay=0.9", f"data.dir={tiny_data}", f"run.dir={run}"]
    seen = []

    def ask() -> None:
        wait_for(lambda: steps_made(run) > 20)
        seen.append(steps_made(run))
        (run / "SAVE").touch()
        wait_for(lambda: not (run / "SAVE").exists())
        seen.append(steps_made(run))
        wait_for(lambda: steps_made(run) > seen[-1] + 50)  # training goes on

    said = train_until(ask, settings)
    (event,) = events(run, "saved on request")
    saved = event["step"]
    assert seen[0] <= saved <= seen[1] + 1
    assert f"saved on request: snapshot and checkpoint of step {saved}" in said
    stopped = json.loads((run / "state.json").read_text())["step"]
    names = {step: f"step-{step:08d}" for step in (0, saved, stopped)}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {names[saved], names[stopped]}
    for folder in ("snapshots", "ema"):
        assert {path.name for path in (run / folder).iterdir()} == {names[0], names[saved]}

    before = losses(run)
    shutil.rmtree(run / "checkpoints" / names[stopped])

    def go_on() -> None:
        wait_for(lambda: len(events(run, "resumed")) == 1)
        wait_for(lambda: steps_made(run) > saved + 30)

    assert f"going on from step {saved}," in train_until(go_on, settings)
    after = losses(run)
    common = min(len(before), len(after))
    assert common > saved + 20
    assert after[:common] == before[:common]


def test_asked_for_before_the_start_or_at_the_end_the_file_goes(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "SAVE").touch()
    vernier("train", TINY, *RARELY, "steps=5", f"data.dir={tiny_data}", f"run.dir={run}")
    assert not (run / "SAVE").exists()
    (event,) = events(run, "saved on request")
    assert (run / "checkpoints" / f"step-{event['step']:08d}").is_dir()
    assert (run / "snapshots" / f"step-{event['step']:08d}").is_dir()
