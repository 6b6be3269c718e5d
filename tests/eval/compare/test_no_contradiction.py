"""Verdict, p, interval and gate of one comparison never contradict each other; the same weights are no verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_compare import a_table, write_run

from eval.compare.gate import gate_holds
from eval.compare.pair import compare_tables
from eval.tables import LossTable, write_table
from launcher.compare.command import run_compare
from launcher.compare.options import Options


def test_p_interval_and_gate_never_contradict_each_other() -> None:
    """VERDICTS: one document of 400 nats a token, or looks that share the error, made them disagree."""
    rng = np.random.default_rng(5)
    for case in range(200):
        documents = int(rng.choice([8, 20, 60]))
        a = a_table(documents=documents, seed=case)
        heavy = np.where(a.document == 0, rng.choice([1.0, 50.0]), 1.0)
        a = replace(a, loss=a.loss * heavy)
        b = replace(a, loss=a.loss * rng.normal(1 + rng.normal(0, 3e-4), 1e-3, len(a)))
        found = compare_tables(a, b, looks=int(rng.choice([1, 5, 50])))
        low, high = found.ci95_percent
        assert (high < 0) == (found.verdict == "better") == gate_holds(found, "better")
        assert (low > 0) == (found.verdict == "worse")
        assert gate_holds(found, "not-worse") == (high < 0)
        content = found.to_json()
        assert (content["difference"]["p_adjusted"] < 0.05) == (content["verdict"] in ("better", "worse"))


def test_the_same_weights_scored_twice_are_no_verdict() -> None:
    a = a_table(source="x")
    b = replace(a, loss=a.loss * np.random.default_rng(1).normal(1 + 3e-8, 1e-9, len(a)))
    found = compare_tables(a, b)
    assert (found.verdict, found.limited_by) == ("same weights", None)
    assert not gate_holds(found, "better")
    assert gate_holds(found, "not-worse")
    assert compare_tables(a_table(source="x"), a_table(-0.001, source="x", seed=2)).verdict == "better"


def at_random(rng: np.random.Generator) -> LossTable:
    documents = int(rng.choice([3, 8, 20, 60, 120]))
    a = a_table(documents=documents, seed=int(rng.integers(1 << 30)))
    heavy = np.where(a.document == 0, rng.choice([1.0, 30.0]), 1.0)
    return replace(a, loss=a.loss * heavy, family=a.document // 2 if rng.random() < 0.2 else None)


def moved(a: LossTable, rng: np.random.Generator) -> LossTable:
    """Another model's losses: at the border of what can be seen, at times skewed, at times not moved at all."""
    size = rng.choice([0.0, 1e-4, 1e-3])
    own = rng.normal(0, size, len(a)) if rng.random() < 0.6 else size * (rng.lognormal(0, 1, len(a)) - 1.6)
    return replace(a, loss=a.loss * (1 + rng.normal(0, 0.2) * size + own))


def asked(capsys: pytest.CaptureFixture[str], targets: list[str], **options: Any) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON) of `vernier compare`, as the command line has it."""
    code = run_compare(targets, json_out=True, console=Console(file=StringIO()), options=Options(**options))
    return code, json.loads(capsys.readouterr().out)


def said(targets: list[str]) -> str:
    out = StringIO()
    run_compare(targets, json_out=False, console=Console(file=out, width=1000))
    return out.getvalue().splitlines()[0]


def agrees(pair: dict[str, Any], better: bool, not_worse: bool) -> None:
    """Verdict, p, interval and the two gates of one comparison."""
    low, high = pair["difference"]["ci95_percent"]
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    verdict, p = pair["verdict"], pair["difference"]["p_adjusted"]
    assert (verdict in ("better", "worse")) == (p < 0.05)
    assert (verdict == "better") == (high < 0) == better
    assert (verdict == "worse") == (low > 0)
    assert not_worse == (high < 0 or verdict == "identical")
    if verdict in ("better", "worse"):
        assert (pair["difference"]["percent"] < 0) == (verdict == "better")


@pytest.mark.parametrize("draws", [100, pytest.param(2000, marks=pytest.mark.long)])
def test_no_output_of_the_command_contradicts_itself(
    draws: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs (three of four) and runs that are over: the JSON, the sentence and both gates, each asked for by itself."""
    rng, told = np.random.default_rng(draws), []
    for case in range(draws):
        first = at_random(rng)
        if case % 4:
            targets = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
            for path, table in zip(targets, (first, moved(first, rng)), strict=True):
                write_table(Path(path), table)
        else:
            tables = [first]
            for _ in range(int(rng.integers(1, 5))):
                tables.append(moved(tables[-1], rng))
            steps = {10 * at: table for at, table in enumerate(tables)}
            targets = [str(write_run(tmp_path / f"run{case}", steps))]
        _, content = asked(capsys, targets)
        gates = [asked(capsys, targets, gate=gate) for gate in ("better", "not-worse")]
        assert all(again == content for _, again in gates)
        better, not_worse = (code == 0 for code, _ in gates)
        rows = [p["versus_previous"] for p in content["checkpoints"][1:]] if "checkpoints" in content else [content]
        agrees(rows[-1], better, not_worse)
        for row in rows[:-1]:
            agrees(row, row["verdict"] == "better", row["verdict"] in ("better", "identical"))
        if case % 4 and case % 8 < 4:
            assert content["verdict"] in said(targets)
        told.append(rows[-1]["verdict"])
    assert {"better", "worse", "no difference seen", "identical"} <= set(told)
