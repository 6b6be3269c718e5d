"""Plots: whole PNG files of every kind of comparison, also where bounds are infinite or nothing differs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import DataError
from eval.compare.along_run import compare_run
from eval.compare.leaderboard import leaderboard
from eval.compare.pair import compare_tables
from eval.compare.plots import plot_leaderboard, plot_pair, plot_run
from eval.statistics import gaussian_fit
from eval.tables import LossTable, write_table


def a_table(change: float = 0.0, *, seed: int = 0, documents: int = 60, **meta: Any) -> LossTable:
    rng, own = np.random.default_rng(7), np.random.default_rng(seed)
    tokens = rng.integers(32, 129, 3 * documents).astype(np.int32)
    loss = tokens * rng.normal(2.2, 0.3, 3 * documents) * (1 + own.normal(change, 0.002, 3 * documents))
    document = np.repeat(np.arange(documents), 3)
    facts = {"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32", **meta}
    return LossTable(np.arange(3 * documents), document, tokens, (4 * tokens).astype(np.int32), loss, meta=facts)


def are_pictures(paths: list[Path], directory: Path) -> None:
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    each = [path.with_suffix(suffix) for path in paths for suffix in (".png", ".pdf", ".svg")]
    assert sorted(directory.iterdir()) == sorted(each)  # nothing half written beside them
    assert all(path.read_bytes().startswith((b"\x89PNG", b"%PDF", b"<?xml")) for path in each)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (a_table(seed=1), a_table(-0.01, seed=2)),
        (a_table(seed=1), a_table(seed=1)),
        (a_table(seed=1, documents=4), a_table(-0.01, seed=2, documents=4)),
        (a_table(seed=1, documents=2), a_table(seed=2, documents=2)),
        (a_table(seed=1), a_table(-0.01, seed=2, reference="another tokenizer")),
    ],
    ids=["different", "identical", "infinite bounds", "two documents", "bits per byte"],
)
def test_a_pair_has_three_plots(a: LossTable, b: LossTable, tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    paths = plot_pair(a, b, compare_tables(a, b, names=("$a$", "a_{very}" * 20)), directory)
    assert [path.name for path in paths] == ["losses.png", "differences.png", "error-bar.png"]
    are_pictures(paths, directory)


def test_equal_tables_give_equal_files(tmp_path: Path) -> None:
    a, b = a_table(seed=1), a_table(seed=2)
    first, second = (plot_pair(a, b, compare_tables(a, b), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("documents", [4, 60])
def test_a_run_has_its_curve(steps: int, documents: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for k in range(steps):
        table = a_table(0.5 * math.exp(-k) - 0.001 * k, seed=k, documents=documents)
        write_table(run / "losses" / "r-0" / f"step-{10 * k:08d}@causal.fp32.parquet", table)
    (run / "config.yaml").touch()
    found = compare_run(run)
    are_pictures(plot_run(found, found.tables, tmp_path / "plots"), tmp_path / "plots")
    with pytest.raises(DataError, match="no scored step"):
        plot_run(found, {}, tmp_path / "plots")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("models", "documents"), [(2, 60), (4, 4), (12, 60)])
def test_a_leaderboard_has_its_forest(models: int, documents: int, tmp_path: Path) -> None:
    tables = [a_table(0.001 * k, seed=k, documents=documents) for k in range(models)]
    board = leaderboard(tables, [f"model {k}" for k in range(models)])
    are_pictures(plot_leaderboard(board, tmp_path), tmp_path)


def test_a_file_in_the_place_of_the_directory_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "plots").touch()
    a = a_table()
    with pytest.raises(DataError, match=r"--plots: .* cannot be made a directory") as caught:
        plot_pair(a, a, compare_tables(a, a), tmp_path / "plots")
    assert "\n" not in str(caught.value)


def test_the_unpaired_error_bar_is_that_of_two_independent_means() -> None:
    fit = gaussian_fit(np.random.default_rng(0).normal(3.0, 0.6, 4000))
    assert fit.unpaired_percent == pytest.approx(100 * math.sqrt(2) * fit.sd / math.sqrt(4000) / fit.mean)
    means = np.random.default_rng(1).normal(3.0, 0.6, (2, 500, 400)).mean(2)
    drawn = 100 * float(np.std(means[0] - means[1])) / 3.0
    assert replace(fit, count=400).unpaired_percent == pytest.approx(drawn, rel=0.1)
    assert gaussian_fit([-1.0, 1.0]).unpaired_percent == math.inf
