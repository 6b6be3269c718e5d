"""What the evaluator's TensorBoard files hold, as TensorBoard itself reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.scoring.tensorboard import EvalBoard, differences_percent, last_shown
from eval.tables import LossTable
from eval.tags import ACCURACY, CHANGE, DESCRIPTIONS, DIFFERENCES, HIGH, LOSS, LOW, PERPLEXITY, WIN_RATE


def a_table(change: float, seed: int, documents: int = 80) -> LossTable:
    rng, own = np.random.default_rng(7), np.random.default_rng(seed)
    tokens = rng.integers(32, 129, 2 * documents).astype(np.int32)
    loss = tokens * rng.normal(2.2, 0.3, 2 * documents) * (1 + own.normal(change, 0.002, 2 * documents))
    return LossTable(
        np.arange(2 * documents),
        np.repeat(np.arange(documents), 2),
        tokens,
        tokens,
        loss,
        correct=tokens // 2,
        meta={"reference": "r", "objective": "causal", "dtype": "fp32"},
    )


def read(folder: Path):  # an EventAccumulator, which is slow to import
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


def test_scalars_with_bands_and_a_histogram_can_be_read_back(tmp_path: Path) -> None:
    tables = [a_table(-0.01 * k, seed=k) for k in range(3)]
    board = EvalBoard(tmp_path / "eval")
    told = [board.add(10 * k, tables[k], tables[k - 1] if k else None, max(1, k)) for k in range(3)]
    board.close()
    found = read(tmp_path / "eval")
    loss = found.Scalars(LOSS)
    assert [(event.step, event.value) for event in loss] == [
        (10 * k, pytest.approx(told[k]["b"]["loss"])) for k in range(3)
    ]
    change = found.Scalars(CHANGE)
    assert [event.step for event in change] == [10, 20]
    low, high = (read(tmp_path / f"eval{end}").Scalars(CHANGE) for end in (LOW, HIGH))
    assert all(a.value < x.value < b.value for a, x, b in zip(low, change, high, strict=True))
    assert [event.value for event in found.Scalars(ACCURACY)] == pytest.approx([0.5] * 3, abs=0.01)

    histograms = found.Histograms(DIFFERENCES)
    assert [event.step for event in histograms] == [10, 20]
    for k, event in enumerate(histograms, start=1):
        value = event.histogram_value
        assert value.num == len(tables[k])
        assert value.sum / value.num == pytest.approx(told[k]["difference"]["percent"], abs=0.05)
    for tag in (LOSS, CHANGE, ACCURACY, WIN_RATE, PERPLEXITY):
        assert found.SummaryMetadata(tag).summary_description == DESCRIPTIONS[tag]


def test_a_board_opened_again_goes_on_after_what_was_written(tmp_path: Path) -> None:
    for k in range(2):
        board = EvalBoard(tmp_path / "eval")
        board.add(10 * k, a_table(-0.01 * k, k), a_table(0, 0) if k else None, 1)
        board.close()
    found = read(tmp_path / "eval")
    assert [event.step for event in found.Scalars(LOSS)] == [0, 10]


def test_infinite_bounds_are_left_out(tmp_path: Path) -> None:
    board = EvalBoard(tmp_path / "eval")
    board.add(10, a_table(-0.01, 1, documents=4), a_table(0, 0, documents=4), 1)
    board.close()
    tags = read(tmp_path / "eval").Tags()["scalars"]
    assert CHANGE in tags
    assert read(tmp_path / f"eval{LOW}").Tags()["scalars"] == [LOSS]


def test_a_few_far_samples_do_not_stretch_the_histogram() -> None:
    a, b = a_table(0, 0, documents=300), a_table(0, 1, documents=300)
    b.loss[5] *= 40
    values = differences_percent(a, b)
    assert len(values) == len(a)
    assert values.max() < 5


def test_the_newest_step_shown_is_found_behind_a_record_that_a_kill_has_cut(tmp_path: Path) -> None:
    assert last_shown(tmp_path / "eval") == -1
    board = EvalBoard(tmp_path / "eval")
    for step in (0, 10, 20):
        board.add(step, a_table(-0.001 * step, step), None, 1)
    board.close()
    assert last_shown(tmp_path / "eval") == 20
    (written,) = (tmp_path / "eval").glob("events.out.tfevents.*")
    content = written.read_bytes()
    written.write_bytes(content[: content.rindex(ACCURACY.encode()) + 5])
    assert last_shown(tmp_path / "eval") == 20
    written.write_bytes(content[: len(content) // 2])
    assert last_shown(tmp_path / "eval") in (0, 10)
