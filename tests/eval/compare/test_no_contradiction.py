"""Verdict, p, interval and gate of one comparison never contradict each other; the same weights are no verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from test_compare import a_table

from eval.compare.gate import gate_holds
from eval.compare.pair import compare_tables


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
