"""One run over other numbers of ranks and other ZeRO stages: the same windows, the same state at each hand-over."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, by_agent, lines, losses, vernier
from safetensors import safe_open

STEPS = 40
# (steps made so far, ranks, ZeRO stage)
LEGS = ((10, 2, 1), (20, 1, 3), (30, 3, 2), (STEPS, 2, 1))
SETTINGS = ["batch.global=24", "batch.micro=4", f"steps={STEPS}", "schedule.warmup_steps=4", "snapshot.every=1000"]
SETTINGS += ["checkpoint.every=10", "checkpoint.keep=9", "model.attention_dropout=0.1", "eval.placement=none"]


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Masters and moments of all ranks put together, by kind and name."""
    state = json.loads((checkpoint / "state.json").read_text())
    files = {path.name: safe_open(path, "pt") for path in checkpoint.glob("*.safetensors")}
    return {
        f"{kind}/{name}": torch.cat([files[file].get_tensor(f"{kind}/{name}") for _, _, file in entry["parts"]])
        for name, entry in state["parameters"].items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("elastic") / "straight"
    vernier("train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}", "zero.stage=1")
    return run


@pytest.fixture(scope="module")
def elastic(straight: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, one, three, two again; each leg goes on from the checkpoint of the one before."""
    run = tmp_path_factory.mktemp("elastic") / "run"
    for number, (end, ranks, stage) in enumerate(LEGS):
        settings = [f"data.dir={tiny_data}", f"run.dir={run}", f"nproc={ranks}", f"zero.stage={stage}"]
        said = vernier("train", TINY, *SETTINGS, *settings).stderr
        if number:
            before, was, zero = LEGS[number - 1]
            assert f"going on from step {before}, written by {was} ranks at ZeRO-{zero}" in said
        for later in range(end + 10, STEPS + 1, 10):  # as if it had been stopped after `end`
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
        if end < STEPS:
            (run / "state.json").unlink()
    return run


def test_positions_windows_and_losses_are_those_of_the_straight_run(straight: Path, elastic: Path) -> None:
    a, b = lines(straight / "metrics.jsonl"), lines(elastic / "metrics.jsonl")
    assert [line["position"] for line in b] == [line["position"] for line in a] == list(range(STEPS))
    assert [line["windows"] for line in b] == [line["windows"] for line in a]
    assert len({line["windows"] for line in a}) == STEPS
    assert [line["tokens"] for line in b] == [line["tokens"] for line in a]
    ranks = [line["ranks"] for line in b]
    assert ranks == [2] * 10 + [1] * 10 + [3] * 10 + [2] * 10
    assert np.max(np.abs(np.array(losses(elastic)) / np.array(losses(straight)) - 1)) < 1e-4


def test_the_state_is_handed_over_to_the_bit(elastic: Path, tmp_path: Path) -> None:
    for (end, _, _), (_, ranks, stage) in itertools.pairwise(LEGS):
        checkpoint = elastic / "checkpoints" / f"step-{end:08d}"
        out = tmp_path / str(end)
        given = [elastic / "train-config.yaml", checkpoint, out, stage]
        subprocess.run(
            [*by_agent(ranks), "tests.trainer.checkpoint.handover", *map(str, given)],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=240,
        )
        again = out / "checkpoints" / checkpoint.name
        assert json.loads((again / "state.json").read_text())["world"] == ranks
        assert same(whole_state(again), whole_state(checkpoint))


def test_the_weights_of_a_named_step_are_those_of_that_step(elastic: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings = [f"data.dir={tiny_data}", "eval.placement=none", "steps=4", "snapshot.at=[]"]
    model = tmp_path / "a.yaml"
    model.write_text((ROOT / TINY).read_text().split("model:")[0] + "batch: {global: 16, micro: 4}\n")
    for step in (10, 30):
        run = tmp_path / f"from-{step}"
        vernier("train", model, *settings, f"run.dir={run}", f"model.path={elastic}@{step}")
        files = [safe_open(f, "pt") for f in (run / "snapshots" / "step-00000000").glob("*.safetensors")]
        started = {name: file.get_tensor(name).flatten() for file in files for name in file.keys()}  # noqa: SIM118
        masters = whole_state(elastic / "checkpoints" / f"step-{step:08d}")
        assert same({f"master/{n}": t for n, t in started.items()}, {n: t for n, t in masters.items() if "master" in n})
    said = vernier("train", model, *settings, f"run.dir={tmp_path / 'x'}", f"model.path={elastic}@15", code=2).stderr
    assert "no snapshot and no checkpoint of step 15; it has: 0, 10, 20, 30, 40" in said
    assert not (tmp_path / "x").exists()


def test_torchs_own_reader_opens_a_checkpoint(elastic: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    checkpoint = elastic / "checkpoints" / "step-00000030"
    wanted = whole_state(checkpoint)
    read = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    assert same(read, wanted)
