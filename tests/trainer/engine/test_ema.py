"""The moving average of the weights is the average that its formula says, goes on to the same bits, and is scored."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, lines, vernier
from safetensors.torch import load_file

SETTINGS = ["steps=4", "snapshot.every=1", "checkpoint.every=2", "checkpoint.keep=9", "eval.placement=none"]
DECAY = 0.9


def train(run: Path, data: Path, *settings: str) -> None:
    vernier("train", TINY, *SETTINGS, f"data.dir={data}", f"run.dir={run}", *settings)


@pytest.fixture(scope="module")
def averaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at ZeRO-2 on two ranks."""
    run = tmp_path_factory.mktemp("ema") / "run"
    train(run, tiny_data, f"ema.decay={DECAY}", "zero.stage=2")
    return run


def state(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v.double() for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def fingerprint(run: Path, folder: str, step: int) -> str:
    return json.loads((run / folder / f"step-{step:08d}" / "manifest.json").read_text())["weights"]


def back_at_step_2(run: Path, to: Path) -> Path:
    """A copy of a run as if it had been killed just after its checkpoint 2."""
    shutil.copytree(run, to)
    for path in to.glob("*/step-0000000[34]"):
        shutil.rmtree(path)
    (to / "state.json").unlink()
    return to


def assert_average_of_snapshots(run: Path, steps: int) -> None:
    expected = state(run / "snapshots" / "step-00000000")
    for step in range(1, steps + 1):
        for name, weight in state(run / "snapshots" / f"step-{step:08d}").items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight
        found = state(run / "ema" / f"step-{step:08d}")
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


def test_it_is_the_average_by_hand_of_each_steps_weights(averaged: Path) -> None:
    assert fingerprint(averaged, "ema", 0) == fingerprint(averaged, "snapshots", 0)
    assert fingerprint(averaged, "ema", 4) != fingerprint(averaged, "snapshots", 4)
    assert_average_of_snapshots(averaged, 4)


@pytest.mark.parametrize("settings", [["zero.stage=3"], ["zero.stage=0", "precision=bf16", "snapshot.dtype=fp32"]])
def test_so_it_is_at_other_stages(settings: list[str], tiny_data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_data, f"ema.decay={DECAY}", *settings)
    assert_average_of_snapshots(tmp_path / "run", 4)


def test_training_is_the_same_with_and_without_it(averaged: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_data, "zero.stage=2")
    assert fingerprint(tmp_path / "run", "snapshots", 4) == fingerprint(averaged, "snapshots", 4)
    assert not (tmp_path / "run" / "ema").exists()


def test_it_goes_on_to_the_same_bits(averaged: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = back_at_step_2(averaged, tmp_path / "run")
    train(run, tiny_data, f"ema.decay={DECAY}", "zero.stage=2")
    for step in (3, 4):
        assert fingerprint(run, "ema", step) == fingerprint(averaged, "ema", step)


def test_on_other_ranks_and_stages_it_goes_on_from_the_very_same_average(
    averaged: Path, tiny_data: Path, tmp_path: Path
) -> None:
    for nproc, stage in ((1, 3), (4, 1), (2, 0)):
        run = back_at_step_2(averaged, tmp_path / f"zero{stage}")
        # With a decay of all but 1 what was read from the checkpoint stands still, and shows.
        train(run, tiny_data, "ema.decay=0.999999999999", f"nproc={nproc}", f"zero.stage={stage}")
        expected = state(averaged / "ema" / "step-00000002")
        for name, weight in state(run / "ema" / "step-00000004").items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-12)


def test_switched_on_or_off_when_going_on_it_says_so(averaged: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = back_at_step_2(averaged, tmp_path / "run")
    train(run, tiny_data, "ema.decay=null", "zero.stage=2")
    (said,) = [line["message"] for line in lines(run / "events.jsonl") if line["kind"] == "ema"]
    assert said == "the checkpoint's moving average of the weights is ignored, since ema.decay is null"
    assert not (run / "ema" / "step-00000004").exists()

    train(run, tiny_data, "steps=5", "ema.decay=0.5", "zero.stage=2", "--extend")
    said = [line["message"] for line in lines(run / "events.jsonl") if line["kind"] == "ema"][-1]
    assert said == "the checkpoint has no moving average of the weights; it starts from those of step 4"
    before, after = (state(run / "snapshots" / f"step-{step:08d}") for step in (4, 5))
    for name, weight in state(run / "ema" / "step-00000005").items():
        torch.testing.assert_close(weight, (before[name] + after[name]) / 2, rtol=0, atol=1e-6)


def test_vernier_eval_scores_it_beside_the_steps_own_table(averaged: Path, tiny_data: Path) -> None:
    models = [averaged / folder / "step-00000004" for folder in ("snapshots", "ema")]
    vernier("eval", *models, "--reference", tiny_data / "reference", "--dtype", "fp32")
    found = {path.name for path in averaged.glob("losses/*/*.parquet")}
    assert found == {"step-00000004@causal.fp32.parquet", "step-00000004.ema@causal.fp32.parquet"}


def test_a_decay_that_is_none_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    done = vernier("train", TINY, f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", "ema.decay=1", code=2)
    assert "ema.decay" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
