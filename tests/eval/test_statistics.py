"""The statistics against direct formulas, slow loops and simulations with fixed seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from configs.errors import DataError
from eval.statistics import (
    by_cluster,
    clustered_mean,
    clustered_ratio,
    detectable,
    effective_number,
    holm,
    holm_shares,
    paired_difference,
    samples_needed,
)

Floats = NDArray[np.float64]


def documents_of_windows(rng: np.random.Generator, documents: int) -> NDArray[np.int64]:
    """Document ids of samples: a geometric number of windows a document, 4 in the mean."""
    return np.repeat(np.arange(documents), rng.geometric(0.25, documents))


def correlated(rng: np.random.Generator, clusters: NDArray[np.int64], icc: float) -> Floats:
    """Standard normal values of which the part `icc` of the variance is shared within a cluster."""
    shared = rng.normal(size=clusters.max() + 1)[clusters]
    return math.sqrt(icc) * shared + math.sqrt(1 - icc) * rng.normal(size=len(clusters))


def test_sums_by_cluster_whatever_the_order_and_the_ids() -> None:
    assert by_cluster([1.0, 2.0, 4.0, 8.0], [7, -1, 7, 100]).tolist() == [2.0, 5.0, 8.0]


def test_documents_of_one_sample_give_the_textbook_error_exactly() -> None:
    x = np.random.default_rng(0).normal(2.17, 0.39, 500)
    found = clustered_mean(x, np.random.default_rng(1).permutation(500))
    assert found.value == pytest.approx(x.mean(), rel=1e-14)
    assert found.se == pytest.approx(x.std(ddof=1) / math.sqrt(500), rel=1e-12)


def test_clustered_errors_equal_a_slow_loop() -> None:
    rng = np.random.default_rng(2)
    document = documents_of_windows(rng, 60)
    rng.shuffle(document)
    m = rng.integers(1, 128, len(document)).astype(float)
    a = m * rng.normal(2.2, 0.3, len(m))
    b = a + m * rng.normal(-0.002, 0.01, len(m))

    def slow(y: Floats, by: Floats) -> tuple[float, float]:
        ratio = y.sum() / by.sum()
        total = 0.0
        for d in set(document.tolist()):
            residual = 0.0
            for i in range(len(y)):
                if document[i] == d:
                    residual += y[i] - ratio * by[i]
            total += residual**2
        return ratio, math.sqrt(60 / 59 * total) / by.sum()

    ratio = clustered_ratio(a, m, document)
    assert (ratio.value, ratio.se) == pytest.approx(slow(a, m), rel=1e-10)
    found = paired_difference(a, b, m, document)
    assert (found.value, found.se) == pytest.approx(slow(b - a, m), rel=1e-9)
    assert (found.percent / 100, found.se_percent / 100) == pytest.approx(slow(b - a, a), rel=1e-9)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.t), 59), rel=1e-12)
    half = stats.t.ppf(0.975, 59) * found.se_percent
    assert found.ci95_percent == pytest.approx((found.percent - half, found.percent + half), rel=1e-9)
    unpaired = math.hypot(slow(a, m)[1], slow(b, m)[1])
    assert found.t_unpaired == pytest.approx(found.value / unpaired, rel=1e-9)
    assert found.pairing_gain == pytest.approx(unpaired / found.se, rel=1e-9)
    assert found.win_rate == np.mean(b < a)


def test_clustering_holds_the_false_positive_rate_where_ignoring_documents_does_not() -> None:
    rng = np.random.default_rng(3)
    document = documents_of_windows(rng, 200)
    samples = np.arange(len(document))
    tokens = np.ones(len(document))
    clustered = naive = 0
    for _ in range(2000):
        a = rng.normal(2.17, 0.39, len(document))
        b = a + 0.003 * correlated(rng, document, icc=0.3)
        clustered += paired_difference(a, b, tokens, document).p < 0.05
        naive += paired_difference(a, b, tokens, samples).p < 0.05
    assert 0.03 <= clustered / 2000 <= 0.07
    assert naive / 2000 >= 0.15  # the control: this simulation can tell the two apart


def test_bits_per_byte_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    covered = covered_unclustered = 0
    for _ in range(1000):
        document = documents_of_windows(rng, 200)
        size = rng.lognormal(6, 0.5, len(document)).round()
        rate = 1.0 + 0.2 * correlated(rng, document, icc=0.5)  # bits per byte, 1 in truth
        for ids, limit in ((document, 199), (np.arange(len(document)), len(document) - 1)):
            found = clustered_ratio(size * rate, size, ids)
            inside = abs(found.value - 1.0) < stats.t.ppf(0.975, limit) * found.se
            covered += inside and ids is document
            covered_unclustered += inside and ids is not document
    assert 0.93 <= covered / 1000 <= 0.97
    assert covered_unclustered / 1000 < 0.85


def test_figures_of_the_source_article() -> None:
    """20,480 samples, mean 2.17, sd .39, sd of the paired difference .00306: 0.001 % is one SE."""
    rng = np.random.default_rng(5)
    a = rng.normal(2.17, 0.39, 20480)
    b = a + rng.normal(0, 0.00306, 20480)
    found = paired_difference(a, b, np.ones(20480), np.arange(20480))
    assert found.se == pytest.approx(2.14e-5, rel=0.03)
    assert detectable(found.se_percent) == pytest.approx(0.00276, rel=0.03)
    assert found.pairing_gain == pytest.approx(180, rel=0.03)


def test_error_in_percent_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(6)
    document = documents_of_windows(rng, 150)
    m = rng.integers(16, 128, len(document)).astype(float)
    a = m * (2.2 + 0.5 * correlated(rng, document, 0.3))
    b = a * (1 - 0.05 + 0.1 * correlated(rng, document, 0.3))  # a change that goes with the loss itself
    a_C, d_C = by_cluster(a, document), by_cluster(b - a, document)
    drawn = rng.multinomial(150, np.full(150, 1 / 150), size=8000)
    bootstrap = 100 * (drawn @ d_C) / (drawn @ a_C)
    assert paired_difference(a, b, m, document).se_percent == pytest.approx(bootstrap.std(), rel=0.04)


def test_the_same_losses_twice_are_identical() -> None:
    a = np.random.default_rng(7).normal(2.17, 0.39, 100)
    found = paired_difference(a, a.copy(), np.ones(100), np.arange(100))
    assert found.identical
    assert (found.value, found.percent, found.t, found.p, found.win_rate) == (0, 0, 0, 1, 0.5)
    assert found.pairing_gain is None


def test_differences_that_cancel_in_every_document_are_no_evidence_and_not_identical() -> None:
    a = np.full(8, 2.0)
    b = a + np.tile([0.25, -0.25], 4)
    found = paired_difference(a, b, np.ones(8), np.repeat(np.arange(4), 2))
    assert not found.identical
    assert (found.t, found.p, found.pairing_gain) == (0, 1, None)


def test_a_difference_without_any_spread_does_not_divide_by_zero() -> None:
    found = paired_difference(np.full(8, 2.0), np.full(8, 1.0), np.ones(8), np.arange(8))
    assert found.p == 0
    assert found.t == -math.inf


def test_p_values_keep_their_size_far_out_in_the_tail() -> None:
    rng = np.random.default_rng(8)
    a = rng.normal(2.17, 0.39, 300)
    found = paired_difference(a, a - 0.001 + rng.normal(0, 0.0005, 300), np.ones(300), np.arange(300))
    assert 0 < found.p < 1e-60


def test_one_document_has_no_error_bar() -> None:
    with pytest.raises(DataError, match="at least 2 documents"):
        paired_difference([1.0, 2.0], [1.5, 2.0], [1, 1], [4, 4])


def test_total_loss_of_zero_has_no_percent() -> None:
    with pytest.raises(DataError, match="percent"):
        paired_difference([0.0, 0.0], [1.5, 2.0], [1, 1], [0, 1])


def test_samples_needed_is_the_inverse_of_what_is_detectable() -> None:
    n = samples_needed(sd=0.00306, delta=6e-5)
    assert n == math.ceil(((1.959964 + 0.841621) * 0.00306 / 6e-5) ** 2)
    assert detectable(0.00306 / math.sqrt(n)) == pytest.approx(6e-5, rel=1e-3)


def test_shares_are_what_holm_multiplies_by() -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 7, 50):
        p = rng.uniform(0, 1, count) ** 4
        shares = holm_shares(p)
        assert np.minimum(1, shares * p) == pytest.approx(holm(p))
        assert shares.max() <= max(count, (shares * p).max() / p.min())
    assert holm_shares([0.0, 0.5, 0.0]).tolist() == [3, 1, 2]


def test_effective_number_of_documents() -> None:
    assert effective_number(np.ones(50)) == pytest.approx(50)
    assert effective_number(np.array([100.0, *[1.0] * 99])) < 4
