"""Whom a run and its data are for is the umask's to say: a group can go on with what is its own, and nobody else."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, vernier


@pytest.fixture(params=[pytest.param(0o002, id="group"), pytest.param(0o077, id="private", marks=pytest.mark.long)])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.real
def test_every_file_of_data_and_run_has_the_mode_that_the_umask_gives(umask: int, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    settings = [TINY, f"data.dir={data}", f"run.dir={run}", "steps=2", "schedule.warmup_steps=1"]
    settings += ["checkpoint.every=1", "snapshot.every=2"]
    vernier("prepare", *settings)
    vernier("train", *settings, "ema.decay=0.9", "eval.placement=separate")
    vernier("eval", run / "snapshots" / "step-00000002", "--reference", data / "reference", "--out", tmp_path / "out")
    vernier("compare", run, "--parquet", tmp_path / "out" / "rows.parquet", "--plots", tmp_path / "out" / "plots")
    found = [path for folder in ("data", "run", "out") for path in (tmp_path / folder).rglob("*")]
    assert {"lock", "state.json", "events.jsonl", "train-config.yaml"} <= {path.name for path in found}
    wrong = {}
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong[str(path.relative_to(tmp_path))] = oct(mode)
    assert not wrong
