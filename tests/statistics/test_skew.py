"""Skewed documents: error rates of the verdict's own path, with those of Student's t alone as controls."""

from __future__ import annotations

import re

import numpy as np
import pytest

from eval.compare.cautions import DOMINATES, cautions_of
from eval.compare.pair import JUDGED
from eval.statistics import confidence_sequence, excludes
from eval.statistics.paired import PairedDifference, paired_difference, transformed, untransformed
from eval.tables import NATS, LossTable

DRAWS = 2000


def differences(kind: str, documents: int, rng: np.random.Generator) -> np.ndarray:
    """Differences of documents with a true mean of zero; the audit's cases."""
    if kind == "normal":
        return rng.normal(0, 1, documents)
    if kind == "t3":
        return rng.standard_t(3, documents)
    if kind.startswith("lognormal"):
        sigma = float(kind.partition(" ")[2])
        return rng.lognormal(0, sigma, documents) - np.exp(sigma**2 / 2)
    rare = rng.random(documents) < 0.03
    return rng.normal(0, 0.3, documents) + np.where(rare, 9.9, 0.0) - 0.03 * 9.9


def rates(kind: str, documents: int) -> tuple[float, float]:
    """(share of verdicts at 5 %, the same by Student's t alone)."""
    rng = np.random.default_rng(11)
    a, m, clusters = np.full(documents, 1000.0), np.full(documents, 500), np.arange(documents)
    said = plain = 0
    for _ in range(DRAWS):
        b = a + differences(kind, documents, rng)
        said += paired_difference(a, b, m, clusters, **JUDGED).p < 0.05
        plain += paired_difference(a, b, m, clusters).p < 0.05
    return said / DRAWS, plain / DRAWS


@pytest.mark.parametrize(
    ("kind", "documents", "most", "control"),
    [
        ("normal", 45, 0.06, 0.0),
        ("normal", 137, 0.06, 0.0),
        ("t3", 137, 0.06, 0.0),
        ("lognormal 1", 137, 0.06, 0.065),
        ("lognormal 1.5", 137, 0.08, 0.11),  # .070 in 8,000 draws
        ("rare", 137, 0.06, 0.07),
    ],
)
def test_a_verdict_errs_one_time_in_twenty_where_documents_are_skewed(
    kind: str, documents: int, most: float, control: float
) -> None:
    said, plain = rates(kind, documents)
    assert said <= most
    assert plain >= control


def skewed(documents: int = 137, seed: int = 3) -> PairedDifference:
    rng = np.random.default_rng(seed)
    a = np.full(documents, 1000.0)
    b = a + differences("lognormal 1.5", documents, rng)
    return paired_difference(a, b, np.full(documents, 500), np.arange(documents), **JUDGED)


def test_p_and_interval_are_of_one_test_at_every_level() -> None:
    for seed in range(40):
        found = skewed(seed=seed)
        assert found.method == "t for skew"
        for level in (0.8, 0.95, 0.99, 1 - 0.05 / 50):
            low, high = found.interval_percent(level)
            assert (low > 0 or high < 0) == (found.p < 1 - level)


def test_the_transformation_can_be_turned_round() -> None:
    for skew in (-0.6, -0.1, 0.0, 0.3):
        for t in (-4.0, -0.5, 0.0, 2.0, 7.0):
            assert untransformed(transformed(t, skew), skew) == pytest.approx(t)


def test_one_document_that_decides_is_named() -> None:
    documents = np.arange(50) + 7
    tokens = np.full(50, 100)
    loss = np.full(50, 300.0)
    other = loss * 0.99
    other[20] = 900.0
    a, b = (LossTable(documents, documents, tokens, tokens, x, meta={"label": "x"}) for x in (loss, other))
    found = paired_difference(a.loss, b.loss, a.tokens, a.document, **JUDGED)
    assert found.largest_share > DOMINATES
    said = "; ".join(cautions_of(a, b, found, NATS))
    assert re.search(r"document 27 has 9\d % of the variance", said)


@pytest.mark.parametrize(
    ("kind", "most", "control"),
    [
        ("normal", 0.05, 0.0),
        ("t3", 0.05, 0.0),
        ("lognormal 1", 0.05, 0.03),
        ("lognormal 1.5", 0.05, 0.1),
        ("rare", 0.07, 0.08),
    ],
)
def test_looking_while_documents_come_in_holds_its_rate_where_they_are_skewed(
    kind: str, most: float, control: float
) -> None:
    """From 100 documents on; from 40 on, 3 % that are far off are called different in 29 % of streams."""
    rng, looks = np.random.default_rng(12), np.arange(100, 1025, 64)
    stream_SC = np.stack([differences(kind, 1024, rng) for _ in range(4000)])
    found = confidence_sequence(stream_SC, np.ones(1024), looks, t_opt=800)
    assert excludes(found).any(-1).mean() <= most
    assert (np.abs(found.value_K) > found.half_K).any(-1).mean() >= control


def test_the_interval_of_a_stream_is_the_hull_of_the_two() -> None:
    """By brute force: the residuals' skewness at each look, and Hall's interval turned round."""
    rng, looks = np.random.default_rng(13), [100, 137, 300]
    m = rng.geometric(0.25, 300) * 128.0
    y = 0.01 * m + differences("lognormal 1", 300, rng) * m
    found = confidence_sequence(y, m, looks, t_opt=100)
    for k, t in enumerate(looks):
        residual = y[:t] - found.value_K[k] * m[:t]
        skew = np.mean(residual**3) / np.mean(residual**2) ** 1.5 / np.sqrt(t)
        se = np.sqrt(t / (t - 1) * np.sum(residual**2)) / m[:t].sum()
        times = found.half_K[k] / se
        # The two differ in the divisor of the variance alone.
        assert found.low_K[k] == pytest.approx(found.value_K[k] - max(times, untransformed(times, skew)) * se, rel=0.02)
        assert found.high_K[k] == pytest.approx(
            found.value_K[k] + max(times, -untransformed(-times, skew)) * se, rel=0.02
        )


def test_near_copies_of_a_document_are_one_cluster() -> None:
    """20 documents ten times each: clustered by document 57 % of equal models are called different."""
    rng = np.random.default_rng(14)
    family = np.repeat(np.arange(20), 10)
    sizes = np.full(200, 500)
    wrong = np.zeros(2)
    for _ in range(1000):
        a = rng.normal(1000, 100, 20)[family]
        b = a + rng.normal(0, 1, 20)[family] + rng.normal(0, 0.1, 200)
        for at, clusters in enumerate((np.arange(200), family)):
            wrong[at] += paired_difference(a, b, sizes, clusters, **JUDGED).p < 0.05
    assert wrong[0] / 1000 > 0.5
    assert wrong[1] / 1000 <= 0.06
