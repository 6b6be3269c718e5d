"""Of checkpoints and snapshots those stay that were asked for; nothing goes that nobody has scored, nor too early."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY, lines, vernier

from configs.files.atomic import whole_directory, write_atomic
from configs.load import load_config
from configs.run.directory import RunDir, step_name
from configs.schema import CheckpointSettings, Config
from eval.tables import LossTable, read_table, table_name, write_table
from trainer.checkpoint.retention import thin_checkpoints, thin_snapshots

SETTINGS = ["snapshot.every=2", "checkpoint.every=2", "ema.decay=0.9"]
THINNED = ["snapshot.keep=2", "snapshot.keep_every=8", "checkpoint.keep=1", "checkpoint.keep_every=6"]


def steps_in(folder: Path) -> list[int]:
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def scored(run: Path) -> list[str]:
    return [line["message"] for line in lines(run / "events.jsonl") if line["kind"] == "scored"]


def mean_losses(run: Path) -> dict[int, float]:
    tables = {int(p.name[5:13]): read_table(p) for p in run.glob("losses/*/*.parquet")}
    return {step: float(table.loss.sum() / table.tokens.sum()) for step, table in tables.items()}


def test_a_thinned_run_has_what_was_asked_for_and_the_same_verdicts(tiny_data: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    vernier("train", TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={whole}")
    vernier("train", TINY, *SETTINGS, *THINNED, f"data.dir={tiny_data}", f"run.dir={run}")
    assert steps_in(whole / "snapshots") == list(range(0, 21, 2))
    loss = mean_losses(run)
    assert loss == mean_losses(whole)
    best = min(loss, key=lambda step: loss[step])
    stayed = sorted({0, 8, 16, 18, 20, best})
    assert steps_in(run / "snapshots") == steps_in(run / "ema") == stayed
    assert steps_in(run / "checkpoints") == [6, 12, 18, 20]
    assert scored(run) == scored(whole)  # compared with the same steps before, at the same looks
    assert vernier("compare", run).stdout.count("\n") >= 11

    for step in (12, 18, 20):  # made again on other ranks: tables of snapshots that are gone must not stay for new ones
        shutil.rmtree(run / "checkpoints" / step_name(step))
    (run / "state.json").unlink()
    vernier("train", TINY, *SETTINGS, *THINNED, "nproc=1", f"data.dir={tiny_data}", f"run.dir={run}")
    assert set(mean_losses(run)) == set(loss)
    for path in run.glob("losses/*/step-*.parquet"):
        snapshot = run / "snapshots" / path.name[:13]
        if snapshot.is_dir():
            assert read_table(path).meta["source"] == json.loads((snapshot / "manifest.json").read_text())["weights"]
    assert mean_losses(run)[10] != loss[10]
    assert list((run / "replaced" / "step-00000010.1").glob("*.parquet"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run with snapshots 10 to 60, of which 60 is not scored, 40 was scored with other weights, and 20 is best."""
    given = [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}", "snapshot.keep=1", "eval.dtype=fp32"]
    config = load_config(ROOT / TINY, given)
    run = RunDir(config.run_dir)
    reference = {"name": "tiny", "fingerprints": {"tokens": "0123456789"}}
    config.reference_dir.mkdir(parents=True)
    write_atomic(config.reference_dir / "reference.json", json.dumps(reference))
    for step, loss in {10: 5.0, 20: 1.0, 30: 3.0, 40: 2.0, 50: 4.0, 60: None}.items():
        for folder, kind in ((run.snapshots, "snapshot"), (run.checkpoints, "checkpoint"), (run.ema, "snapshot")):
            with whole_directory(folder / step_name(step), {"kind": kind, "weights": f"w{step}"}) as part:
                (part / "model.safetensors").write_bytes(b"weights")
        if loss is not None:
            ones = np.ones(3, dtype=np.int32)
            ids = np.arange(3)
            meta = {"source": "other" if step == 40 else f"w{step}"}
            path = run.losses / "tiny-01234567" / table_name(step_name(step), "causal", "fp32")
            write_table(path, LossTable(ids, ids, ones, ones, loss * ones, meta=meta))
    return config


def test_the_best_and_the_unscored_stay_with_the_newest(config: Config) -> None:
    run = RunDir(config.run_dir)
    thin_snapshots(run, config)
    assert steps_in(run.snapshots) == steps_in(run.ema) == [20, 40, 60]


def test_without_a_reference_set_nothing_is_scored_so_all_stay(config: Config) -> None:
    run = RunDir(config.run_dir)
    (config.reference_dir / "reference.json").unlink()
    thin_snapshots(run, config)
    assert len(steps_in(run.snapshots)) == 6


def test_nothing_goes_where_the_newest_is_not_readable(config: Config) -> None:
    run = RunDir(config.run_dir)
    for folder in (run.snapshots, run.checkpoints):
        (folder / step_name(60) / "manifest.json").write_text("{")
    thin_snapshots(run, config)
    thin_checkpoints(run, CheckpointSettings(keep=1))
    assert len(steps_in(run.snapshots)) == len(steps_in(run.checkpoints)) == 6


def test_what_a_kill_left_of_a_removal_counts_for_nothing_and_goes(config: Config) -> None:
    run = RunDir(config.run_dir)
    (run.checkpoints / step_name(30)).rename(run.checkpoints / f".{step_name(30)}.gone")
    assert run.whole_steps(run.checkpoints) == [10, 20, 40, 50, 60]
    thin_checkpoints(run, CheckpointSettings(keep=2, keep_every=20))
    assert steps_in(run.checkpoints) == [20, 40, 50, 60]


def test_a_damaged_table_makes_no_snapshot_the_worst(config: Config) -> None:
    run = RunDir(config.run_dir)
    path = run.losses / "tiny-01234567" / table_name(step_name(20), "causal", "fp32")
    content = pq.read_table(path)
    pq.write_table(content.set_column(4, "loss", pa.array([9.0, 9.0, 9.0])), path)
    thin_snapshots(run, config)
    assert steps_in(run.snapshots) == [20, 30, 40, 60]  # 20 counts as not scored; of the rest 30 is best
