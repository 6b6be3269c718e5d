"""The running difference to a baseline: what it shows, while either run may be ahead, and at what cost."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

import trainer.callbacks.baseline
from trainer.callbacks.baseline import MOST_BLOCKS, Baseline, RunningDifference


def line(step: int, loss: float, position: int | None = None) -> dict:
    where = step - 1 if position is None else position
    return {"step": step, "position": where, "tokens": 1024 * (where + 1), "loss": loss}


def append(run: Path, *told: dict) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(one) + "\n" for one in told)


def test_the_mean_is_that_of_all_steps_however_many_blocks_were_joined() -> None:
    rng = np.random.default_rng(0)
    difference, targets = rng.normal(size=20_003), rng.integers(900, 1025, 20_003)
    running = RunningDifference(20_000)
    for value, weight in zip(difference, targets, strict=True):
        running.add(value, weight)
    assert running.mean() == pytest.approx(np.average(difference, weights=targets), rel=1e-9)
    assert len(running.sums) < MOST_BLOCKS
    half = running.half()
    assert half is not None
    assert 2 / math.sqrt(20_000) < half < 5 / math.sqrt(20_000)  # about 3 standard errors: it holds at all times


def test_a_band_is_told_once_there_is_enough_to_tell_it_from() -> None:
    running = RunningDifference(1000)
    for value in np.random.default_rng(1).normal(-1, 1, 255):
        running.add(value, 16)
    assert running.half() is None
    running.add(-1.0, 16)
    half = running.half()
    assert half is not None
    assert half < 1
    assert running.mean() + half < 0


def test_the_band_errs_at_most_one_time_in_twenty_however_often_it_is_looked_at() -> None:
    rng, claimed = np.random.default_rng(2), 0
    for _ in range(100):
        running = RunningDifference(1200)
        value, found = 0.0, False
        for step, noise in enumerate(rng.normal(size=1200), start=1):
            value = 0.3 * value + noise  # about what differences of real runs show
            running.add(value, 16)
            half = running.half() if step % 60 == 0 else None
            found |= half is not None and abs(running.mean()) > half
        claimed += found
    assert claimed <= 10  # 5 allowed, 2 expected


def test_steps_that_the_baseline_has_not_made_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, line(1, 5.0), line(2, 4.0))
    beside = Baseline(tmp_path, 100)
    assert [p.value for p in beside.add(line(1, 5.5))] == [0.5]
    assert [p.value for p in beside.add(line(2, 4.25))] == [0.25]
    assert beside.add(line(3, 3.0)) == []
    append(tmp_path, line(3, 2.0), line(4, 1.0))
    assert beside.add(line(4, 1.5)) == []  # read a moment ago: it does not look again at every step
    monkeypatch.setattr(trainer.callbacks.baseline, "REREAD_S", 0.0)
    assert [(p.step, p.value) for p in beside.add(line(5, 1.0))] == [(3, 1.0), (4, 0.5)]


def test_batches_that_either_skipped_are_left_out(tmp_path: Path) -> None:
    append(tmp_path, line(1, 5.0), line(2, 4.0, position=2), line(3, 3.0, position=3))  # skipped position 1
    beside = Baseline(tmp_path, 100)
    told = [beside.add(line(1, 6.0)), beside.add(line(2, 6.0)), beside.add(line(3, 6.0, position=3))]
    assert [[p.value for p in points] for points in told] == [[1.0], [], [3.0]]


def test_a_baseline_that_went_on_from_a_checkpoint_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.callbacks.baseline, "REREAD_S", 0.0)
    append(tmp_path, line(1, 5.0), line(2, 4.0))
    beside = Baseline(tmp_path, 100)
    beside.add(line(1, 5.0))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "old")
    append(tmp_path, line(1, 5.0), line(2, 4.0), line(3, 3.0))
    assert [p.value for p in beside.add(line(2, 4.5))] == [0.5]
    assert [p.value for p in beside.add(line(3, 3.5))] == [0.5]
    (tmp_path / "metrics.jsonl").unlink()
    assert beside.add(line(4, 3.0)) == []  # and one that is gone ends no training


def test_a_step_costs_next_to_nothing(tmp_path: Path) -> None:
    append(tmp_path, *(line(step, 3.0) for step in range(1, 20_001)))
    beside = Baseline(tmp_path, 20_000)
    beside.add(line(1, 3.0))
    started = time.perf_counter()
    for step in range(2, 10_001):
        beside.add(line(step, 3.1))
    assert (time.perf_counter() - started) / 10_000 < 1e-3


def test_what_a_baseline_has_not_made_again_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.callbacks.baseline, "REREAD_S", 0.0)
    append(tmp_path, line(1, 5.0), line(2, 4.0), line(3, 3.0))
    beside = Baseline(tmp_path, 100)
    beside.add(line(1, 5.0))
    (tmp_path / "metrics.jsonl").unlink()
    append(tmp_path, line(1, 5.0), line(2, 4.0))
    assert [p.value for p in beside.add(line(2, 4.5))] == [0.5]
    assert beside.add(line(3, 3.5)) == []
    append(tmp_path, line(3, 2.0), line(4, 1.0))
    assert [p.value for p in beside.add(line(4, 1.5))] == [1.5, 0.5]
