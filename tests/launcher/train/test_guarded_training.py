"""A training with bad batches, leaping losses or too little memory, as users see it (configs/fault_injection.py)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, lines, losses, vernier


def train(run: Path, data: Path, *settings: str, faults: str = "", code: int = 0) -> str:
    """Trains with faults; gives what stderr said."""
    arguments = [f"data.dir={data}", f"run.dir={run}", "eval.placement=none", *settings]
    done = vernier("train", TINY, *arguments, code=code, env={**os.environ, "VERNIER_FAULTS": faults})
    return done.stderr


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in lines(run / "events.jsonl") if event["kind"] == kind]


def course(run: Path) -> list[tuple[int, int, float, float]]:
    """(step, position, loss, gradient norm) of each update."""
    return [(m["step"], m["position"], m["loss"], m["grad_norm"]) for m in lines(run / "metrics.jsonl")]


def state(run: Path) -> dict:
    return json.loads((run / "state.json").read_text())


@pytest.fixture(scope="module")
def skipping(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that uses up three batches without an update, and stays where it is."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    train(run, tiny_data, "guards.non_finite=4", faults="nan=12,13,14")
    return run


def test_two_bad_batches_are_used_up_and_training_goes_on(skipping: Path) -> None:
    assert [e["step"] for e in events(skipping, "skipped")] == [12, 12, 12]
    assert not events(skipping, "went back")
    assert [position for _, position, *_ in course(skipping)] == [*range(12), *range(15, 23)]


@pytest.mark.parametrize("stage", [0, 2])
def test_three_in_a_row_go_back_to_the_checkpoint_and_are_passed_over(
    stage: int, tiny_data: Path, tmp_path: Path, skipping: Path
) -> None:
    run = tmp_path / "run"
    train(run, tiny_data, f"zero.stage={stage}", faults="nan=12,13,14")
    (event,) = events(run, "went back")
    assert event["message"].startswith(
        "at step 13 the batches at positions 12–14 gave no finite gradient; going back to the checkpoint of step 10 "
        "and passing over the batches at positions 12–14; documents "
    )
    assert event["detail"]["positions"] == [12, 13, 14]
    assert 0 < len(event["detail"]["documents"]) <= 50
    assert events(run, "resumed")[0]["step"] == 10
    adapted = json.loads((run / "adapted.json").read_text())
    assert (adapted["passed_over"], adapted["returns"], adapted["from_step"]) == ([12, 13, 14], 1, 10)
    assert len(losses(run)) == 20
    assert [line["position"] for line in lines(run / "metrics.jsonl")] == [*range(12), *range(15, 23)]
    assert (state(run)["state"], state(run)["again"]) == ("done", None)
    if stage == 2:  # as the recipe has it: passing over is the same course, to the bit, as using up
        assert course(run) == course(skipping)


def test_one_that_never_gives_a_finite_gradient_ends_in_one_line(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    bad = ",".join(map(str, range(3, 60)))
    said = train(run, tiny_data, "guards.non_finite=2", faults=f"nan={bad}", code=1)
    assert "after training had gone back to the start 3 times; lower optimizer.lr" in said
    assert len(events(run, "went back")) == 3
    assert state(run)["state"] == "failed"


def test_a_leap_of_the_loss_is_told(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, tiny_data, faults="spike=18")
    (event,) = events(run, "spike")
    assert (event["step"], event["detail"]["position"]) == (19, 18)
    assert "its update was made" in event["message"]
    assert [position for _, position, *_ in course(run)] == list(range(20))


def test_where_asked_for_a_leap_makes_no_update(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["guards.on_spike=skip", "zero.stage=3"]
    train(tmp_path / "leap", tiny_data, *settings, faults="spike=18")
    train(tmp_path / "bad", tiny_data, "zero.stage=3", faults="nan=18")
    (event,) = events(tmp_path / "leap", "spike")
    assert "no update was made with it" in event["message"]
    assert not events(tmp_path / "leap", "skipped")
    assert [position for _, position, *_ in course(tmp_path / "leap")] == [*range(18), 19, 20]
    assert course(tmp_path / "leap") == course(tmp_path / "bad")


def test_out_of_memory_halves_the_micro_batch_and_trains_the_same_batches(
    tiny_data: Path, tmp_path: Path, skipping: Path
) -> None:
    run = tmp_path / "run"
    train(run, tiny_data, faults="windows=2")
    found = events(run, "out of memory")
    assert found
    assert all("going on with micro-batches of 2 windows in place of 4" in event["message"] for event in found)
    assert json.loads((run / "adapted.json").read_text())["micro"] == 2
    assert {line["micro"] for line in lines(run / "metrics.jsonl")} == {2}
    np.testing.assert_allclose(losses(run)[:12], losses(skipping)[:12], rtol=1e-5)
    assert "micro: 4" in (run / "config.yaml").read_text()  # the user's own word stays


def test_at_one_window_activations_are_checkpointed(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, tiny_data, "batch.micro=1", "steps=4", faults="windows=0")
    assert "activations checkpointed" in events(run, "out of memory")[0]["message"]
    assert json.loads((run / "adapted.json").read_text())["gradient_checkpointing"] is True
    assert len(losses(run)) == 4


def test_out_of_memory_fails_in_one_line_where_it_may_not_adapt(tiny_data: Path, tmp_path: Path) -> None:
    said = train(tmp_path / "run", tiny_data, "guards.on_out_of_memory=fail", faults="windows=2", code=1)
    assert "ran out of memory making step 1; what helps: batch.micro lower" in said
    assert not (tmp_path / "run" / "adapted.json").exists()
