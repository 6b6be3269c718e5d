"""Skewed documents: error rates of the verdict's own path, with those of Student's t alone as controls."""

from __future__ import annotations

import re

import numpy as np
import pytest

from eval.compare.cautions import DOMINATES, cautions_of
from eval.compare.pair import JUDGED, NATS
from eval.statistics.paired import PairedDifference, paired_difference, transformed, untransformed
from eval.tables import LossTable

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
