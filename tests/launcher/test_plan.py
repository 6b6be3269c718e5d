"""`vernier plan`: its arithmetic against the paper's, against what a real run has left on the disk, and as typed."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
from conftest import TINY, vernier

from configs.errors import ConfigError
from configs.host_memory import (
    checkpoint_bytes,
    checkpoints_kept,
    saving_copy,
    snapshot_bytes,
    snapshots_kept,
    training_state,
)
from configs.load import load_config, resolve
from configs.rundir import RunDir, step_name
from launcher.plan import machine_memory, make_plan, warnings
from launcher.plan_model import find_model


def planned(*overrides: object, config: str = TINY) -> dict:
    return dict(json.loads(vernier("plan", config, *overrides, "--json").stdout))


def stored(directory: Path) -> int:
    """Bytes of the tensors in a directory's safetensors files, their headers left out."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def test_stages_of_zero_are_those_of_the_paper() -> None:
    told = []
    for stage in (0, 1, 2, 3):  # figure 1 of Rajbhandari et al.: 7.5 B parameters, 64 ranks, K = 12
        state = training_state(7_500_000_000, precision="fp16", stage=stage, ranks=64)
        told.append(round(state.device / 1e9, 1))
    assert told == [120.0, 31.4, 16.6, 1.9]


def test_full_precision_offloading_and_the_average() -> None:
    state = training_state(1000, precision="fp32", stage=0, ranks=4)
    assert (state.weights, state.gradients, state.optimizer) == (4000, 4000, 8000)
    state = training_state(1000, precision="amp", stage=2, ranks=4, offload=True, average=True)
    assert (state.weights, state.gradients, state.optimizer, state.average) == (4000, 1000, 3000, 1000)
    assert (state.device, state.host) == (4000, 5000)
    copy = saving_copy(1000, dtype="bf16", ranks=4, average=True)
    assert (copy.checkpoint, copy.snapshot, copy.average, copy.most) == (4000, 500, 500, 5000)


def test_checkpoints_and_snapshots_take_what_was_planned(tiny_run: Path, tiny_data: Path) -> None:
    found = planned(f"data.dir={tiny_data}", f"run.dir={tiny_run}")
    run = RunDir(tiny_run)
    assert found["parameters"] == json.loads(run.manifest.read_text())["parameters"]
    assert found["notes"] == []
    for kind, folder in (("checkpoint", run.checkpoints), ("snapshot", run.snapshots)):
        steps = run.whole_steps(folder)
        assert len(steps) == found["disk"][f"{kind}s"]
        for step in steps:
            assert stored(folder / step_name(step)) == pytest.approx(found["disk"][kind], rel=0.05)
    held = [path.stat().st_size for path in (run.checkpoints / step_name(20)).glob("rank-*.safetensors")]
    assert len(held) == found["ranks"]
    assert max(held) == pytest.approx(found["saving_a_rank"]["checkpoint"], rel=0.05)
    with open(run.metrics) as file:
        last = [json.loads(line) for line in file][-1]
    assert (last["tokens"], last["ranks"], last["micro"]) == (found["tokens"], found["ranks"], found["micro"])


def made(steps: int, every: int, at: list[int]) -> list[int]:
    return sorted({*range(every, steps + 1, every), *at, steps})


def test_what_is_kept_is_counted_as_retention_keeps_it() -> None:
    draw = random.Random(1)
    for _ in range(500):
        steps, every, keep = draw.randint(1, 60), draw.randint(1, 20), draw.randint(1, 5)
        keep_every = draw.choice([None, draw.randint(1, 30)])
        at = sorted(draw.sample(range(steps + 1), min(3, steps)))
        asked = {"every": every, "keep_every": keep_every}

        there: list[int] = []
        most = 0
        for step in made(steps, every, []):
            there.append(step)
            most = max(most, len(there))
            there = [s for s in there if s in there[-keep:] or (keep_every and s % keep_every == 0)]
        assert checkpoints_kept(steps, keep=keep, **asked) >= most  # type: ignore[arg-type]
        assert checkpoints_kept(steps, keep=keep, **asked) <= most + 1  # type: ignore[arg-type]

        everything = {0, *made(steps, every, at)}
        assert snapshots_kept(steps, at=at, keep=None, **asked) == len(everything)  # type: ignore[arg-type]
        there, most = [], 0
        best = draw.choice(sorted(everything))
        for step in sorted(everything):
            there.append(step)
            most = max(most, len(there))
            there = [s for s in there if s in (*there[-keep:], best) or (keep_every and s % keep_every == 0)]
        assert most <= snapshots_kept(steps, at=at, keep=keep, **asked) <= most + 3  # type: ignore[arg-type]


def test_before_data_is_prepared_the_vocabulary_is_that_of_the_settings(tmp_path: Path) -> None:
    told = vernier("plan", TINY, f"data.dir={tmp_path / 'none'}").stdout
    assert "is not prepared, so its vocabulary is taken to have 512 entries (data.vocab_size)" in told
    assert "2 ranks × 4 × 2 = 16 windows a step" in told
    assert "1,024 a step; 20 steps: 20,480\n" in told
    assert "written in the background" in told
    found = planned(f"data.dir={tmp_path / 'none'}", "model.vocab_size=600", "checkpoint.background=false")
    assert found["notes"] == []
    assert found["saving_a_rank"]["background"] is False


def test_a_model_by_path_is_counted_from_its_files(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    snapshot = tiny_run / "snapshots" / step_name(20)
    settings = [f"data.dir={tiny_data}", f"model.path={snapshot}"]
    config = resolve(load_config(TINY, settings))
    expected = json.loads((tiny_run / "manifest.json").read_text())["parameters"]
    assert find_model(config, None).parameters == expected
    strange = tmp_path / "strange"
    strange.mkdir()
    described = json.loads((snapshot / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**described, "model_type": "unheard-of"}))
    for path in snapshot.glob("*.safetensors"):
        (strange / path.name).symlink_to(path)
    model = find_model(resolve(load_config(TINY, [settings[0], f"model.path={strange}"])), None)
    assert (model.name, model.parameters) == ("unheard-of", expected)
    for path in strange.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no safetensors files"):
        find_model(resolve(load_config(TINY, [settings[0], f"model.path={strange}"])), None)


def test_what_does_not_fit_is_said_with_the_settings_that_change_it(tiny_data: Path) -> None:
    large = ["model.hidden_size=16384", "model.num_hidden_layers=400", "model.intermediate_size=65536"]
    told = vernier("plan", TINY, f"data.dir={tiny_data}", *large, "ema.decay=0.9").stdout
    memory, disk = (line for line in told.splitlines() if line.startswith("does not fit: "))
    assert "are more than this machine's" in memory
    for setting in ("zero.stage=3 needs", "snapshot.dtype=bf16 needs", "ema.decay=null needs"):
        assert setting in memory
    assert "set checkpoint.keep or snapshot.keep, or another run.dir" in disk
    config = resolve(load_config(TINY, [f"data.dir={tiny_data}"]))
    assert warnings(make_plan(config)) == []


def test_the_memory_of_a_container_is_what_it_may_take(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemAvailable:   1024 kB\n")
    (tmp_path / "max").write_text("max\n")
    assert machine_memory(tmp_path / "meminfo", tmp_path / "max") == 2 << 20
    (tmp_path / "max").write_text("4096\n")
    assert machine_memory(tmp_path / "meminfo", tmp_path / "max") == 4096


def test_wrong_settings_are_refused_in_one_line(tiny_data: Path) -> None:
    told = vernier("plan", TINY, f"data.dir={tiny_data}", "model.hiden_size=3", code=2).stderr
    assert told == "error: model.hiden_size: llama has no such field; did you mean hidden_size?\n"
    assert "batch.global: 15 is not divisible by 2 ranks" in vernier("plan", TINY, "batch.global=15", code=2).stderr


def test_sizes_of_what_is_saved() -> None:
    assert checkpoint_bytes(10) == 120
    assert checkpoint_bytes(10, average=True) == 160
    assert snapshot_bytes(10, "bf16") == 20
