"""`vernier compare A B --training`, and training beside a baseline, as a user types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, lines, losses, vernier

from configs.errors import ConfigError
from configs.load import load_config
from eval.tags import BASELINE, BASELINE_MEAN
from trainer.callbacks.baseline import check_baseline


@pytest.fixture
def long_runs(tiny_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two run directories as training leaves them, with more steps than a test has time for; B lower by .02 nats."""
    windows = np.random.default_rng(0).normal(0, 0.15, 400)
    for number, (name, gain) in enumerate((("a", 0.0), ("b", 0.02)), start=1):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "manifest.json"):
            shutil.copy(tiny_run / file, tmp_path / name / file)
        loss = 3 + windows + np.random.default_rng(number).normal(0, 0.01, 400) - gain
        with open(tmp_path / name / "metrics.jsonl", "w") as out:
            for step, value in enumerate(loss, start=1):
                line = {"step": step, "position": step - 1, "tokens": 1024 * step, "ranks": 2, "micro": 4}
                out.write(json.dumps({**line, "loss": value}) + "\n")
    return tmp_path / "a", tmp_path / "b"


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard has of a run's training, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "train"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_command_says_that_it_is_of_training_losses_and_draws(long_runs: tuple[Path, Path], tmp_path: Path) -> None:
    told = vernier("compare", *long_runs, "--training", "--plots", tmp_path / "plots").stdout
    assert told.startswith("TRAINING loss: b is lower by 0.")
    assert "over steps 1–400" in told
    assert "1–100" in told
    assert (tmp_path / "plots" / "training-curve.png").read_bytes().startswith(b"\x89PNG")
    part = vernier("compare", *long_runs, "--training", "--from-step", 101, "--to-step", 400).stdout
    assert "over steps 101–400" in part


def test_json_is_alone_on_stdout(long_runs: tuple[Path, Path]) -> None:
    told = json.loads(vernier("compare", *long_runs, "--training", "--json").stdout)
    assert told["verdict"] == "lower"
    assert told["difference"]["nats"] == pytest.approx(-0.02, abs=0.003)


def test_what_is_no_run_or_too_short_is_refused_with_exit_code_2(tiny_run: Path, tmp_path: Path) -> None:
    told = vernier("compare", tiny_run, tmp_path / "nothing", "--training", code=2).stderr
    assert "is not a run directory" in told
    told = vernier("compare", tiny_run, tiny_run, "--training", code=2).stderr
    assert "20 steps in common are too few" in told


def test_beside_a_baseline_tensorboard_has_the_paired_difference_also_after_going_on(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "nproc=1", "optimizer.lr=6e-3"]
    vernier("train", TINY, *settings, "steps=10", f"baseline={tiny_run}")
    own, base = losses(run), losses(tiny_run)[:10]
    shown = scalars(run)[BASELINE]
    assert [step for step, _ in shown] == list(range(1, 11))
    assert [value for _, value in shown] == pytest.approx(np.subtract(own, base).tolist(), abs=1e-6)
    ((step, mean),) = scalars(run)[BASELINE_MEAN]
    assert (step, mean) == (10, pytest.approx(np.mean(np.subtract(own, base)), abs=1e-6))

    vernier("train", TINY, *settings, "steps=20", f"baseline={tiny_run}", "--extend")
    means = scalars(run)[BASELINE_MEAN]
    assert means[-1] == (20, pytest.approx(np.mean(np.subtract(losses(run), losses(tiny_run))), abs=1e-6))
    assert len(lines(run / "metrics.jsonl")) == 20


def test_a_baseline_on_other_windows_is_refused_before_anything_starts(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = ["train", TINY, f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", "eval.placement=none"]
    told = vernier(*settings, "seed=4", "batch.global=32", f"baseline={tiny_run}", code=2).stderr
    assert "do not meet the same windows: seed 3 and 4; batch.global 16 and 32" in told
    assert not (tmp_path / "run").exists()


def test_a_baseline_that_is_no_run_or_the_run_itself_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    config = load_config(ROOT / TINY, [f"run.dir={tiny_run}"])
    for baseline, reason in ((tmp_path, "not a run directory"), (tiny_run, "is this run itself")):
        with pytest.raises(ConfigError, match=f"baseline: .*{reason}"):
            check_baseline(config.model_copy(update={"baseline": baseline}), "d" * 64)
