"""Going on with settings that may not change: refused with both values, or insisted on with what it breaks."""

import os
import subprocess
from pathlib import Path

from conftest import ROOT, TINY, VERNIER, lines, losses, table_of, vernier


def test_what_may_not_change_is_refused_and_forced_it_is_told_what_breaks(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = [TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "steps=10"]
    vernier("train", *where)
    changed = [*where[:-1], "steps=14", "seed=4", "optimizer.weight_decay=0.5", "model.num_hidden_layers=3"]
    said = vernier("train", *changed, code=2).stderr
    ways = "--force-resume goes on all the same, --fresh starts anew; or use another run.dir"
    assert f"error: seed: the run was started with 3, not 4; {ways}" in said
    assert "error: steps: the run was started with 10, not 14; --extend goes on to 14" in said
    assert len(losses(run)) == 10

    said = vernier("train", *changed[:-1], "--force-resume").stderr
    assert "forced: seed: 3 → 4: data order and dropout are others from here on" in said
    assert "losses are no longer paired with those of runs with seed 3" in said
    assert "forced: steps: 10 → 14: the schedule is drawn anew over 14 steps" in said
    assert "forced: optimizer.weight_decay: " in said
    assert "going on from step 10" in said
    assert len(losses(run)) == 14
    (event,) = [line for line in lines(run / "events.jsonl") if line["kind"] == "forced"]
    assert sorted(event["detail"]["keys"]) == ["optimizer.weight_decay", "seed", "steps"]
    assert "seed: 3 → 4" in event["message"]

    assert "is finished" in vernier("train", *changed[:-1]).stderr  # they are the run's settings by now
    said = vernier("train", *changed[:-1], "--fresh", "--force-resume", code=2).stderr
    assert "--fresh and --force-resume exclude each other" in said


def test_a_run_that_never_made_a_step_holds_nobody_to_its_settings(tiny_data: Path, tmp_path: Path) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    where = [TINY, f"data.dir={tiny_data}", "steps=4", "checkpoint.every=4", "snapshot.every=4"]
    other = [*where, "model.hidden_size=96", "clip_grad_norm=null", "seed=5"]
    crashing = {**os.environ, "VERNIER_FAULTS": "kill=thinned:0:1"}  # step 0 has its snapshot, and no step is made
    command = [*VERNIER, "train", *other, f"run.dir={run}"]
    subprocess.run(command, cwd=ROOT, env=crashing, capture_output=True, timeout=120, check=False)
    assert (run / "snapshots" / "step-00000000").is_dir()
    assert not (run / "metrics.jsonl").read_text()

    said = vernier("train", *where, f"run.dir={run}").stderr
    told = "run never made a step, so it starts anew; changed: "
    (line,) = [line for line in said.splitlines() if told in line]
    for key in ("seed", "clip_grad_norm", "model.hidden_size"):
        assert key in line
    vernier("train", *where, f"run.dir={straight}")
    assert losses(run) == losses(straight)
    for step in (0, 4):
        assert table_of(run, step).read_bytes() == table_of(straight, step).read_bytes()
    assert [event["kind"] for event in lines(run / "events.jsonl")].count("started anew") == 1

    said = vernier("train", *other, f"run.dir={run}", code=2).stderr  # by now it has made some
    assert "clip_grad_norm: the run was started with 1.0, not null; " in said
    assert "None" not in said
