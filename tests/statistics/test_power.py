"""What is seen where there is something to see: sweeps, late looks along a run, few documents; each beside what was."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eval.compare.pair import JUDGED
from eval.compare.sweep import rank
from eval.statistics import detectable, holm, paired_difference
from eval.statistics.power import flips_factor
from eval.tables import LossTable


def test_a_late_look_sees_what_an_early_one_does() -> None:
    """A true t of 4 at one of 50 rows: by α·6/(π²k²), as it was spent before, .29 at the fiftieth."""
    rng = np.random.default_rng(1)
    t_SK = rng.standard_normal((4000, 50))
    t_SK[:, 49] += 4
    p_SK = 2 * stats.t.sf(np.abs(t_SK), 399)
    by_holm = np.mean([holm(p_K)[49] < 0.05 for p_K in p_SK])
    shared = np.mean(p_SK[:, 49] < 0.05 / 50)
    before = np.mean(p_SK[:, 49] < 0.05 * 6 / (math.pi * 50) ** 2)
    assert before < 0.35
    assert by_holm >= 0.7
    assert shared >= 0.7


@pytest.mark.parametrize("documents", [6, 8, 10, 12, 20])
def test_with_few_documents_the_detectable_change_is_seen_four_times_of_five(documents: int) -> None:
    """By z quantiles: .44 at 6 documents, .67 at 8, .77 at 20."""
    rng, draws = np.random.default_rng(2), 1200
    change = flips_factor(documents) * detectable(1 / math.sqrt(documents), df=documents - 1)
    a, m, clusters = np.full(documents, 1000.0), np.ones(documents), np.arange(documents)
    seen = sum(
        paired_difference(a, a + rng.normal(change, 1, documents), m, clusters, **JUDGED).p < 0.05 for _ in range(draws)
    )
    assert seen / draws == pytest.approx(0.8, abs=0.045)


def a_table(change: float, rng: np.random.Generator) -> LossTable:
    tokens = np.full(100, 64, np.int32)
    loss = 64 * 2.2 * (1 + change + rng.normal(0, 0.005, 100))
    meta = {"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32"}
    return LossTable(np.arange(100), np.arange(100), tokens, tokens, loss, meta=meta)


def sweeps(best: float, draws: int) -> tuple[float, float]:
    """(share of sweeps in which the best value is told from all others, in which any pair with the best is): six
    values, three seeds that move all of them, each cell by .005 of its own."""
    rng = np.random.default_rng(3)
    won = some = 0
    for _ in range(draws):
        seeds = rng.normal(0, 0.03, 3)
        tables = {
            name: {s: a_table(-best * (name == "a") + seeds[s] + rng.normal(0, 0.005), rng) for s in range(3)}
            for name in "abcdef"
        }
        places = rank(tables).places
        told = [place.behind.told_apart for place in places[1:] if place.behind is not None]
        won += places[0].name == "a" and all(told)
        some += any(told)
    return won / draws, some / draws


def test_a_sweep_of_three_seeds_sees_its_winner_and_errs_one_time_in_twenty() -> None:
    """Each pair by its own three seeds saw 9 % of these winners; pooled they are 10 degrees of freedom."""
    won, _ = sweeps(0.025, 150)
    assert won >= 0.8
    _, some = sweeps(0.0, 300)
    assert some <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
