"""Ranking a sweep's values: paired by sample and seed, two kinds of error, and a search that is paid for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from configs.errors import DataError
from eval.compare.sweep import p_of_both, rank
from eval.statistics import holm
from eval.statistics.paired import t_quantile, two_sided_p
from eval.tables import LossTable


def a_table(change: float, rng: np.random.Generator, *, documents: int = 100, noise: float = 0.003) -> LossTable:
    """One sample a document; `change` is relative, `noise` each document's own, and what is hard is shared by all."""
    shared = np.random.default_rng(5)
    tokens = shared.integers(32, 129, documents).astype(np.int32)
    base = tokens * shared.normal(2.2, 0.3, documents)
    return LossTable(
        sample=np.arange(documents),
        document=np.arange(documents),
        tokens=tokens,
        bytes=(4 * tokens).astype(np.int32),
        loss=base * (1 + change + rng.normal(0, noise, documents)),
        meta={"reference": "ab" * 32, "reference_text": "t", "objective": "causal", "dtype": "fp32"},
    )


def some(
    changes: dict[str, float], seeds: int, *, seed_noise: float = 0.0, shared_noise: float = 0.0, start: int = 0, **more
) -> dict[str, dict[int, LossTable]]:
    """Tables by value and seed: a seed moves all values by `shared_noise`, and each by its own `seed_noise`."""
    rng = np.random.default_rng(start)
    by_seed = rng.normal(0, shared_noise, seeds)
    return {
        name: {s: a_table(change + by_seed[s] + rng.normal(0, seed_noise), rng, **more) for s in range(seeds)}
        for name, change in changes.items()
    }


def test_values_come_by_their_mean_over_seeds_and_the_rest_lie_behind_the_best() -> None:
    found = rank(some({"low": 0.01, "best": 0.0, "far": 0.05}, 3, seed_noise=0.001))
    assert [place.name for place in found.places] == ["best", "low", "far"]
    assert found.places[0].behind is None
    for place, wanted in zip(found.places[1:], (1.0, 5.0), strict=True):
        assert place.behind is not None
        assert place.behind.percent == pytest.approx(wanted, abs=0.4)
        assert place.behind.ci95[0] < place.behind.percent < place.behind.ci95[1]
        assert place.behind.percent == pytest.approx(np.mean(list(place.behind.by_seed.values())))
        assert place.loss == pytest.approx(np.mean(list(place.losses.values())))
    assert found.places[2].behind is not None
    assert found.places[2].behind.told_apart


def test_what_a_seed_does_to_all_values_drops_out_of_their_difference() -> None:
    found = rank(some({"a": 0.0, "b": 0.01}, 3, shared_noise=0.05))
    best, second = found.places
    assert best.se_seeds is not None
    assert second.behind is not None
    assert second.behind.se_seeds is not None
    assert 100 * best.se_seeds / best.loss > 10 * second.behind.se_seeds
    assert second.behind.told_apart


def test_seed_noise_of_its_own_keeps_a_clear_difference_of_weights_from_being_one_of_settings() -> None:
    tables = some({"a": 0.0, "b": 0.004}, 3, seed_noise=0.01, start=1)
    alone = rank({name: {0: by_seed[0]} for name, by_seed in tables.items()}).places[1].behind
    assert alone is not None
    assert alone.told_apart is None  # of the settings nothing is known
    assert alone.weights_apart
    assert alone.se_seeds is None
    behind = rank(tables).places[1].behind
    assert behind is not None
    assert behind.se_seeds is not None
    assert behind.se_seeds > 3 * behind.se_documents
    assert not behind.told_apart


def test_p_is_where_the_interval_just_has_zero() -> None:
    for value, first, second in ((1.0, (0.3, 99), (0.2, 2)), (5.0, (0.1, 40), (0.4, 1)), (0.1, (0.3, 20), (0.1, 4))):
        p = p_of_both(value, first, second)
        half = np.hypot(first[0] * t_quantile(1 - p, first[1]), second[0] * t_quantile(1 - p, second[1]))
        assert half == pytest.approx(value, rel=1e-6)
    assert p_of_both(1.0, (0.3, 99), (0.0, 2)) == two_sided_p(1 / 0.3, 99)
    assert p_of_both(0.0, (0.3, 99), (0.1, 2)) == 1.0
    assert p_of_both(30.0, (0.3, 99), (1e-9, 2)) == pytest.approx(two_sided_p(100.0, 99), rel=1e-3)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("ratio", [0.1, 1.0, 10.0])
def test_an_interval_of_documents_and_seeds_covers_at_its_level(seeds: int, ratio: float) -> None:
    rng = np.random.default_rng(seeds)
    trials, clusters = 1000, 100
    value_T = rng.normal(0, 1, trials)
    seed_TS = rng.normal(0, np.sqrt(ratio * seeds), (trials, seeds))
    documents_T = np.sqrt(rng.chisquare(clusters - 1, trials) / (clusters - 1))
    errors_T = seed_TS.std(1, ddof=1) / np.sqrt(seeds)
    p_T = [
        p_of_both(v + s.mean(), (d, clusters - 1), (e, seeds - 1))
        for v, s, d, e in zip(value_T, seed_TS, documents_T, errors_T, strict=True)
    ]
    assert np.mean(np.array(p_T) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)


def test_equal_values_seldom_have_a_winner_though_the_best_of_them_is_picked() -> None:
    trials = 150
    apart = plain = 0
    for trial in range(trials):
        found = rank(some(dict.fromkeys("abcdef", 0.0), 1, start=trial, documents=60))
        behinds = [place.behind for place in found.places if place.behind is not None]
        apart += any(behind.told_apart for behind in behinds)
        plain += bool((holm([behind.p for behind in behinds]) < 0.05).any())
    assert found.pairs == 15
    assert apart / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
    assert plain > apart  # Holm's over the comparisons with the best alone forgets the search


def test_a_member_that_is_missing_does_not_bend_the_ranking() -> None:
    tables = some({"a": 0.0, "b": 0.005}, 3, shared_noise=0.05)
    worst = max(tables["b"], key=lambda seed: float(tables["b"][seed].loss.sum()))
    del tables["b"][worst]  # its plain mean is now the lower one
    found = rank(tables)
    assert np.mean(list(found.places[1].losses.values())) < np.mean(list(found.places[0].losses.values()))
    assert [place.name for place in found.places] == ["a", "b"]
    assert found.places[1].behind is not None
    assert len(found.places[1].behind.by_seed) == 2


def test_values_without_a_seed_in_common_are_not_compared_and_that_is_said() -> None:
    tables = some({"a": 0.0, "b": 0.005}, 2)
    del tables["a"][1], tables["b"][0]
    found = rank(tables)
    assert found.places[1].behind is None
    assert any("no seed is scored for both" in caution for caution in found.cautions)


def test_a_key_that_changes_nothing_gives_identical_values() -> None:
    tables = some({"a": 0.0}, 2)
    behind = rank({"a": tables["a"], "b": tables["a"]}).places[1].behind
    assert behind is not None
    assert behind.comparison.difference.identical
    assert (behind.p_holm, behind.told_apart, behind.ci95) == (1.0, False, (0.0, 0.0))


def test_few_documents_take_the_larger_p_and_the_wider_interval() -> None:
    found = rank(some({"a": 0.0, "b": 0.01}, 2, seed_noise=0.0005, documents=12)).places[1].behind
    assert found is not None
    low, high = found.comparison.difference.ci95_percent
    assert found.comparison.difference.method == "sign flips"
    assert found.ci95[0] < low < high < found.ci95[1]
    assert found.p >= found.comparison.difference.p


def test_a_member_scored_on_another_reference_set_is_named() -> None:
    tables = some({"a": 0.0, "b": 0.01}, 2)
    tables["b"][1] = replace(tables["b"][1], meta={**tables["b"][1].meta, "reference": "cd" * 32})
    with pytest.raises(DataError, match="b, seed 1 was scored on another reference") as caught:
        rank(tables)
    assert "\n" not in str(caught.value)


def test_unequal_hardware_among_members_is_a_caution_said_once() -> None:
    tables = some({"a": 0.0, "b": 0.01, "c": 0.02}, 2)
    for name, kind in (("a", "H100"), ("b", "A100"), ("c", "A100")):
        tables[name] = {s: replace(t, meta={**t.meta, "hardware": kind}) for s, t in tables[name].items()}
    assert [c for c in rank(tables).cautions if "hardware" in c] == [
        "members were scored on unequal hardware (A100, H100): last digits differ by that alone"
    ]
