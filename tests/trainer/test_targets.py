"""Training on prompts: batches in which nothing is a target, as a user sees them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, lines, losses, vernier

from trainer.data.shards import Windows
from trainer.order import windows_at

LENGTH, SEED = 64, 3
SETTINGS = ["eval.placement=none", "batch.global=2", "schedule.name=constant", "schedule.warmup_steps=0"]


def masked(tiny_data: Path, data: Path, every: int | None) -> Path:
    """The tiny data with targets in each `every`-th window only; None: in none."""
    shutil.copytree(tiny_data, data)
    place = np.arange(len(np.load(data / "shards" / "train-00000.npy")))
    scored = np.zeros(len(place), bool) if every is None else (place - 1) // LENGTH % every == 0
    np.save(data / "shards" / "train-00000.scored.npy", scored)
    return data


@pytest.fixture(scope="module")
def sparse(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return masked(tiny_data, tmp_path_factory.mktemp("sparse") / "data", 5)


@pytest.fixture(scope="module")
def run(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    cut = ["nproc=1", "batch.micro=2", "steps=12", "checkpoint.every=6"]
    vernier("train", TINY, f"data.dir={sparse}", f"run.dir={run}", *SETTINGS, *cut)
    return run


def test_batches_without_a_target_are_passed_over_and_no_loss_is_zero(run: Path, sparse: Path) -> None:
    data = Windows(sparse, LENGTH)
    found = lines(run / "metrics.jsonl")
    counts = [
        int(data.target_counts(windows_at(p, batch=2, windows=len(data), seed=SEED)).sum())
        for p in range(found[-1]["position"] + 1)
    ]
    assert [line["position"] for line in found] == [p for p, count in enumerate(counts) if count]
    assert len(found) == 12 < len(counts) / 2
    assert min(losses(run)) > 1
    assert [line["targets"] for line in found] == [count for count in counts if count]
    assert [line["tokens"] for line in found] == np.cumsum([line["targets"] for line in found]).tolist()
    (told,) = [event for event in lines(run / "events.jsonl") if event["kind"] == "skipped"]
    assert "no token to train on" in told["message"]


def test_going_on_passes_over_the_same_batches(run: Path, sparse: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    common = [TINY, f"data.dir={sparse}", f"run.dir={other}", *SETTINGS, "nproc=1", "batch.micro=2"]
    vernier("train", *common, "steps=6")
    vernier("train", *common, "steps=12", "--extend")
    drop = ("step_s", "tokens_per_s", "memory_gib")
    courses = [
        [{k: v for k, v in line.items() if k not in drop} for line in lines(one / "metrics.jsonl")]
        for one in (run, other)
    ]
    assert courses[0] == courses[1]


@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_and_micro_batches_without_a_target_change_nothing(
    stage: int, run: Path, sparse: Path, tmp_path: Path
) -> None:
    other = tmp_path / "run"  # one of the two ranks has no target at most steps
    cut = ["nproc=2", "batch.micro=1", "steps=12", f"zero.stage={stage}"]
    vernier("train", TINY, f"data.dir={sparse}", f"run.dir={other}", *SETTINGS, *cut)
    assert np.max(np.abs(np.array(losses(run)) / losses(other) - 1)) < 1e-4


def test_data_without_any_target_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    data = masked(tiny_data, tmp_path / "data", None)
    said = vernier("train", TINY, f"data.dir={data}", f"run.dir={tmp_path / 'run'}", *SETTINGS, code=2).stderr
    assert "has a token to train on" in said
    assert not (tmp_path / "run").exists()


def rows(path: Path, words: int) -> Path:
    """Questions of so many words, with answers of one."""
    texts = Path("tests/data/corpus.jsonl").read_text().split()
    content = [{"prompt": " ".join(texts[i * words : (i + 1) * words]) + f" {i}?", "text": f" {i}"} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_prepare_says_how_many_windows_have_no_target(tmp_path: Path) -> None:
    source, data = rows(tmp_path / "rows.jsonl", 100), tmp_path / "data"
    settings = [f"data.source={source}", "data.prompt_field=prompt", "reference.documents=10"]
    said = vernier("prepare", TINY, f"data.dir={data}", *settings).stdout
    windows = Windows(data, LENGTH)
    without = int((windows.target_counts(np.arange(len(windows))) == 0).sum())
    assert without > len(windows) / 2
    assert f"{without:,} windows have no token to train on" in said
    assert f"{without:,} of {len(windows):,} training windows" in said
    assert json.loads((data / "dataset.json").read_text())["train"]["windows_without_target"] == without
