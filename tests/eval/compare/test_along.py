"""Comparisons along a run: every look at its share of the error rate, and the run's own wobble."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_compare import ADDED, REFERENCE, TOP, a_table, write_run

from configs.errors import DataError
from eval.compare.along_run import KnownNoise, compare_run, with_noise
from eval.compare.pair import compare_tables
from eval.compare.targets import find_tables
from eval.tables import read_table
from launcher.compare.report import best_words


def test_along_a_run_that_is_over_the_rows_are_one_family(tmp_path: Path) -> None:
    tables = {
        0: a_table(seed=1),
        100: a_table(-0.1, seed=2),
        101: a_table(-0.101, seed=3),
        140: a_table(-0.1, seed=4),
    }
    run = write_run(tmp_path / "run", tables)
    lines = [{"step": s, "tokens": 1000 * s, "loss": 2.0} for s in range(1, 121)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 121, "to')
    found = compare_run(run)
    assert [(p.step, p.tokens) for p in found.checkpoints] == [
        (0, 0),
        (100, 100_000),
        (101, 101_000),
        (140, 120_000),
    ]
    assert found.checkpoints[0].versus_previous is None
    assert [p.versus_previous.verdict for p in found.checkpoints[1:] if p.versus_previous] == [
        "better",
        "better",
        "worse",
    ]
    third = found.checkpoints[3]
    assert third.versus_previous is not None
    assert third.versus_first is not None
    for versus in (third.versus_previous, third.versus_first):
        assert versus.difference.p <= versus.p_adjusted <= 3 * versus.difference.p  # Holm, of three
    assert (third.versus_first.a.name, third.versus_previous.a.name) == ("step-00000000", "step-00000101")

    content = found.to_json()
    own = {"wobble_percent", "twins", "sampling_percent", "best", "checkpoints"}
    assert set(content) == {"run", "reference", "unit", *own}
    assert content["reference"] == REFERENCE
    assert content["best"] == {"step": 101, "loss": found.best.side.loss, "worse_since": 140}
    assert best_words(found).endswith("; worse since step 140")
    assert set(content["checkpoints"][1]) == {
        "step",
        "tokens",
        "loss",
        "se",
        "versus_previous",
        "versus_first",
    }
    assert set(content["checkpoints"][1]["versus_first"]) == TOP | ADDED
    assert content["checkpoints"][0]["versus_first"] is None
    json.dumps(content, allow_nan=False)


def test_without_metrics_only_the_tokens_of_step_0_are_known(tmp_path: Path) -> None:
    found = compare_run(write_run(tmp_path / "run", {0: a_table(), 5: a_table(seed=1)}))
    assert [p.tokens for p in found.checkpoints] == [0, None]


def test_the_way_of_scoring_with_most_tables_is_taken_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {0: a_table(), 5: a_table(seed=1)})
    write_run(run, {5: a_table(seed=2)}, dtype="bf16")
    write_run(run, {5: a_table(seed=2, reference="fedc" * 16)}, folder="other-fedcfedc")
    (run / "losses" / "py-0123abcd" / "step-00000009@causal.fp32.partial.parquet").touch()
    found = compare_run(run)
    assert [p.step for p in found.checkpoints] == [0, 5]
    assert "py-0123abcd (causal, bf16)" in found.notes[0]
    assert "other-fedcfedc" in found.notes[0]


def test_a_run_with_nothing_scored_says_how(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {})
    with pytest.raises(DataError, match=r"nothing has been scored yet.*vernier eval"):
        compare_run(run)


def test_a_broken_table_of_a_run_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {0: a_table(), 5: a_table(seed=1)})
    path = next(run.glob("losses/*/step-00000005*"))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"step-00000005@causal\.fp32\.parquet: cannot be read"):
        compare_run(run)


def wobbling_run(path: Path, wobble: float, seed: int = 0) -> Path:
    """A run whose loss falls like a power law; each checkpoint is off by `wobble` (relative), all samples alike."""
    rng = np.random.default_rng(seed)
    steps = [0, *range(20, 601, 20), 601]
    off = dict(zip(steps, rng.normal(0, wobble, len(steps)), strict=True))
    off[601] = off[600]
    return write_run(path, {s: a_table(0.5 * (s + 30) ** -0.4 + off[s], noise=0.0002, seed=s) for s in steps})


def test_the_wobble_of_a_run_is_told_and_limits_what_is_below_it(tmp_path: Path) -> None:
    run = wobbling_run(tmp_path / "x", 0.003, seed=1)
    found = compare_run(run)
    assert found.wobble_percent == pytest.approx(0.3, rel=0.4)
    assert found.sampling_percent == pytest.approx(100 * 0.0002 * math.sqrt(2 / 300), rel=0.4)
    content = found.to_json()
    last_but_one = content["checkpoints"][-2]["versus_previous"]
    assert last_but_one["verdict"] in ("better", "worse")
    assert last_but_one["limited_by"] == "training noise"
    assert last_but_one["wobble_percent"] == content["wobble_percent"]
    assert content["checkpoints"][1]["versus_previous"]["limited_by"] is None
    one_step = found.checkpoints[-1].versus_previous
    assert one_step is not None
    assert one_step.one_step
    assert not any(p.versus_previous.one_step for p in found.checkpoints[1:-1] if p.versus_previous)


def test_a_pair_out_of_runs_knows_the_larger_wobble(tmp_path: Path) -> None:
    calm, wild = wobbling_run(tmp_path / "calm", 0.0005), wobbling_run(tmp_path / "wild", 0.01, seed=1)

    def wobble(*texts: str) -> float | None:
        a, b = find_tables(texts)
        pair = compare_tables(read_table(a.path), read_table(b.path))
        return with_noise(pair, a, b, KnownNoise()).wobble_percent

    own = {run: compare_run(run).wobble_percent for run in (calm, wild)}
    assert wobble(f"{calm}@40", f"{calm}@60") == own[calm]
    assert wobble(f"{calm}@40", f"{wild}@60") == own[wild]
    file = next(wild.glob("losses/*/step-00000100@*"))
    assert wobble(f"{calm}@40", str(file)) == own[wild]
    (tmp_path / "alone.parquet").write_bytes(file.read_bytes())
    assert wobble(str(tmp_path / "alone.parquet"), str(tmp_path / "alone.parquet")) is None


def test_a_broken_table_beside_a_pair_only_costs_the_wobble(tmp_path: Path) -> None:
    run = wobbling_run(tmp_path / "x", 0.003)
    next(run.glob("losses/*/step-00000200@*")).write_bytes(b"PAR1")
    a, b = find_tables([f"{run}@40", f"{run}@60"])
    found = with_noise(compare_tables(read_table(a.path), read_table(b.path)), a, b, KnownNoise())
    assert found.wobble_percent is None


def test_a_run_with_few_checkpoints_has_no_wobble(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", {s: a_table(-0.001 * s, seed=s) for s in (0, 10, 20, 30, 31)})
    content = compare_run(run).to_json()
    assert content["wobble_percent"] is None
    assert content["checkpoints"][1]["versus_previous"]["wobble_percent"] is None


def test_the_wobble_of_one_way_of_scoring_is_not_taken_for_another(tmp_path: Path) -> None:
    known = KnownNoise()
    wobbling_run(tmp_path / "w", 0.003)
    write_run(tmp_path / "w", {s: a_table(seed=s) for s in (20, 40)}, dtype="bf16")
    (folder,) = (tmp_path / "w" / "losses").iterdir()
    for dtype, has_wobble in (("bf16", False), ("fp32", True)):
        paths = sorted(folder.glob(f"*.{dtype}.parquet"))[:2]
        a, b = find_tables([str(path) for path in paths])
        found = with_noise(compare_tables(read_table(a.path), read_table(b.path)), a, b, known)
        assert (found.wobble_percent is not None) == has_wobble
