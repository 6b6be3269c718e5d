"""`vernier twin` as a user types it, on real trainings: what it makes, goes on with, and says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import lines, losses, vernier


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps, checkpoints of steps 10 and 20, and two twins from step 10."""
    path = tmp_path_factory.mktemp("twins") / "run"
    shutil.copytree(tiny_run, path)
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config.replace(str(tiny_run), str(path)))
    vernier("twin", path, "--at", 10)
    return path


def test_a_twin_goes_on_from_the_checkpoint_and_differs_by_nearly_nothing(run: Path) -> None:
    twins = sorted((run / "twins").iterdir())
    assert [twin.name for twin in twins] == ["step-00000010.1", "step-00000010.2"]
    own = losses(run)
    for twin in twins:
        found = losses(twin)
        assert found[:10] == own[:10]
        assert found[10:] != own[10:]
        assert found == pytest.approx(own, rel=1e-4)
        assert [line["windows"] for line in lines(twin / "metrics.jsonl")] == [
            line["windows"] for line in lines(run / "metrics.jsonl")
        ]
        assert [line["lr"] for line in lines(twin / "metrics.jsonl")] == [
            line["lr"] for line in lines(run / "metrics.jsonl")
        ]
    assert losses(twins[0])[10:] != losses(twins[1])[10:]


def test_what_twins_differ_by_is_told_and_gates_go_by_it(run: Path) -> None:
    said = vernier("compare", run).stdout
    assert "twins: 2, scores differ by" in said
    assert "twins of 10 steps: noise grows for longer than that" in said
    assert "twins from step 10: what chance did before is not in them" in said
    content = json.loads(vernier("compare", run, "--json").stdout)
    assert (content["twins"]["degrees_of_freedom"], content["twins"]["steps"]) == (2, 10)
    assert 0 < content["twins"]["percent"] < 0.01
    assert [row["runs"] for row in content["twins"]["by_steps"]] == [3]
    pair = (f"{run}@10", f"{run}@20")
    assert "above what twins of the run differ by" in vernier("compare", *pair).stdout
    refused = vernier("compare", *pair, "--gate", "better", "--of", "run", code=2).stderr
    assert "what twins of the run differ by, after 10 steps, is a lower bound" in refused


def test_asked_again_it_makes_only_what_is_not_there(run: Path) -> None:
    before = (run / "twins/step-00000010.1/metrics.jsonl").read_bytes()
    vernier("twin", run, "--at", 10, "--count", 1)
    assert (run / "twins/step-00000010.1/metrics.jsonl").read_bytes() == before


def test_from_the_start_and_for_fewer_steps(run: Path) -> None:
    vernier("twin", run, "--at", 0, "--count", 1, "--steps", 6)
    own, twin = losses(run), losses(run / "twins/step-00000000.1")
    assert len(twin) == 6
    assert twin != own[:6]
    assert twin == pytest.approx(own[:6], rel=1e-4)
    lr = [line["lr"] for line in lines(run / "twins/step-00000000.1/metrics.jsonl")]
    assert lr == [line["lr"] for line in lines(run / "metrics.jsonl")][:6]  # the schedule is the whole run's
    vernier("twin", run, "--at", 0, "--count", 1, "--steps", 8)  # a longer one goes on
    assert losses(run / "twins/step-00000000.1")[:6] == twin
    assert len(losses(run / "twins/step-00000000.1")) == 8
    shutil.rmtree(run / "twins/step-00000000.1")


def test_what_cannot_be_split_is_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    refused = vernier("twin", run, "--at", 7, code=2).stderr
    assert "has no checkpoint of step 7; it has 0, 10, 20 (0: the start)" in refused
    assert "step 20 is the last" in vernier("twin", run, "--at", 20, code=2).stderr
    assert "is a twin itself" in vernier("twin", run / "twins/step-00000010.1", code=2).stderr
    vernier("twin", tmp_path / "none", code=2)


def test_a_run_may_ask_for_its_twins(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["twins.count=1", "twins.steps=12", "checkpoint.every=4", "checkpoint.keep=1"]
    vernier("train", "tests/tiny.yaml", f"data.dir={tiny_data}", f"run.dir={run}", *settings)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000020"]
    assert [path.name for path in (run / "twins").iterdir()] == ["step-00000008.1"]
    assert len(losses(run / "twins/step-00000008.1")) == 20


def test_folders_alone_are_made_for_a_cluster_and_trained_by_train(run: Path) -> None:
    vernier("twin", run, "--at", 0, "--count", 1, "--steps", 4, "--no-train")
    twin = run / "twins/step-00000000.1"
    assert not (twin / "metrics.jsonl").exists()
    vernier("train", twin / "config.yaml")
    assert losses(twin) == pytest.approx(losses(run)[:4], rel=1e-4)
    assert losses(twin) != losses(run)[:4]
    shutil.rmtree(twin)
