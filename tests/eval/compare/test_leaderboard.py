"""Leaderboards: order, groups that are not told apart, adjusted p-values, and what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_compare import a_table, write_run

from configs.errors import DataError
from eval.compare.along_run import compare_run
from eval.compare.leaderboard import leaderboard, letters
from eval.compare.pair import compare_tables
from eval.compare.parquet import comparison_row, leaderboard_rows, run_rows, write_rows
from eval.statistics import benjamini_hochberg, holm
from eval.tables import LossTable, write_table


def four() -> tuple[list[LossTable], list[str]]:
    """The second and third are alike; the first is far off and the fourth lowest."""
    changes = (0.01, 0.0, 0.0, -0.01)
    return [a_table(change, seed=i) for i, change in enumerate(changes)], ["far", "one", "other", "best"]


def test_models_come_by_loss_and_the_alike_share_a_letter() -> None:
    board = leaderboard(*four())
    names = [entry.name for entry in board.entries]
    assert names[0] == "best"
    assert names[3] == "far"
    assert [entry.group for entry in board.entries] == ["a", "b", "b", "c"]
    assert board.entries[1].not_told_from == (names[2],)
    assert [entry.loss for entry in board.entries] == sorted(entry.loss for entry in board.entries)
    assert [(p.comparison.a.name, p.comparison.b.name) for p in board.pairs] == list(combinations(names, 2))
    assert sum(pair.told_apart for pair in board.pairs) == 5


def test_p_values_are_adjusted_for_all_pairs() -> None:
    board = leaderboard(*four())
    p = [pair.comparison.difference.p for pair in board.pairs]
    assert [pair.p_holm for pair in board.pairs] == holm(p).tolist()
    assert [pair.p_bh for pair in board.pairs] == benjamini_hochberg(p).tolist()
    content = board.to_json()
    json.dumps(content, allow_nan=False)
    assert set(content) == {"reference", "unit", "alpha", "entries", "pairs", "cautions"}
    assert {"p", "p_holm", "p_bh", "win_rate"} <= set(content["pairs"][0]["difference"])
    assert content["entries"][1]["not_told_apart_from"] == [board.entries[2].name]


def test_the_verdict_of_a_pair_is_that_of_all_pairs_together() -> None:
    tables = [a_table(seed=seed) for seed in range(12)]
    board = leaderboard(tables, [str(seed) for seed in range(12)])
    alone = [pair for pair in board.pairs if pair.comparison.difference.p < 0.05 <= pair.p_holm]
    assert alone  # of 66 pairs of equals some are clear by chance
    for pair, row in zip(board.pairs, leaderboard_rows(board), strict=True):
        content = pair.to_json()
        assert content["difference"]["p_adjusted"] == row["p_adjusted"] == pair.p_holm
        assert content["told_apart"] == (content["verdict"] in ("better", "worse"))
        assert (row["verdict"], row["limited_by"]) == (content["verdict"], content["limited_by"])
    assert alone[0].to_json()["limited_by"] == "samples"


def test_ten_equal_models_are_one_group() -> None:
    names = [f"m{i}" for i in range(10)]
    board = leaderboard([a_table(seed=i) for i in range(10)], names)
    assert {entry.group for entry in board.entries} == {"a"}


def test_letters_are_shared_exactly_by_the_alike() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 12, 30):
        names = [f"m{i}" for i in range(count)]
        alike = {frozenset(pair): bool(rng.random() < 0.5) for pair in combinations(names, 2)}
        found = letters(names, lambda a, b, alike=alike: alike[frozenset((a, b))])  # type: ignore[misc]
        for a, b in combinations(names, 2):
            split = (
                set(word.split()) if " " in "".join(found.values()) else set(word) for word in (found[a], found[b])
            )
            assert bool(set.intersection(*split)) == alike[frozenset((a, b))]
        assert all(found.values())


def test_another_tokenizer_puts_all_in_bits_per_byte() -> None:
    tables, names = four()
    other = tables[0]
    merged = LossTable(
        sample=np.arange(100),
        document=np.arange(100),
        tokens=np.full(100, 150, np.int32),
        bytes=other.bytes.reshape(100, 3).sum(1).astype(np.int32),
        loss=other.loss.reshape(100, 3).sum(1),
        meta={**other.meta, "reference": "f" * 64},
    )
    board = leaderboard([merged, *tables[1:]], names)
    assert board.unit == "bits per byte"
    assert {pair.comparison.unit for pair in board.pairs} == {"bits per byte"}
    assert len({entry.documents for entry in board.entries}) == 1
    assert sum("bits per byte" in caution for caution in board.cautions) == 1


def test_the_one_that_does_not_fit_is_named() -> None:
    tables, names = four()
    tables[2] = replace(tables[2], meta={**tables[2].meta, "reference": "e" * 64, "reference_text": "else"})
    with pytest.raises(DataError, match="other does not fit the others") as caught:
        leaderboard(tables, names)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="one is given twice"):
        leaderboard(four()[0], ["one", "one", "other", "best"])


def test_results_are_flat_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "out" / "result.parquet"
    tables, names = four()
    board = leaderboard(tables, names)
    assert write_rows(path, leaderboard_rows(board)) is False
    table = pq.read_table(path)
    assert table.num_rows == 6
    assert {"a_name", "b_name", "percent", "low_percent", "high_percent", "p_holm", "verdict", "b_group"} <= set(
        table.column_names
    )
    few = compare_tables(a_table(documents=5), a_table(documents=5, seed=1))
    assert write_rows(path, [comparison_row(few)]) is True
    (row,) = pq.read_table(path).to_pylist()
    assert row["low_percent"] is None
    assert row["method"] == "sign flips"
    run = write_run(tmp_path / "run", {s: a_table(-0.01 * s, seed=s) for s in (0, 1, 2)})
    write_rows(path, run_rows(compare_run(run)))
    assert [(r["step"], r["versus"]) for r in pq.read_table(path).to_pylist()] == [
        (1, "previous"),
        (1, "first"),
        (2, "previous"),
        (2, "first"),
    ]


def test_a_loss_table_is_never_overwritten_by_a_result(tmp_path: Path) -> None:
    path = tmp_path / "x@causal.fp32.parquet"
    write_table(path, a_table())
    before = path.read_bytes()
    with pytest.raises(DataError, match="is not a result of vernier compare"):
        write_rows(path, [comparison_row(compare_tables(a_table(), a_table(seed=1)))])
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="nothing to write"):
        write_rows(tmp_path / "new.parquet", [])
