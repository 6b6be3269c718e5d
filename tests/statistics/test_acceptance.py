"""Error rates over 10,000 simulations with fixed seeds, each beside a control that must fail.

Legend: S simulations, N samples, C clusters (documents), K looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr

from eval.statistics import (
    allowed_looks,
    clustered_mean,
    clustered_ratio,
    confidence_sequence,
    detectable,
    excludes,
    first_look,
    holm,
    paired_difference,
    sign_flip,
    subset_error,
)
from eval.statistics.paired import t_quantile

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]

SIMULATIONS = 10_000
ALPHA = 0.05
Z = float(ndtri(1 - ALPHA / 2))
MEAN, SD, PAIRED_SD, SAMPLES = 2.17, 0.39, 0.00306, 20480  # the source article's


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def student_t4(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Normal over sqrt(chi²_4/4); chi²_4 is twice the sum of two exponentials."""
    chi = rng.standard_exponential(shape, dtype=np.float32) + rng.standard_exponential(shape, dtype=np.float32)
    return normal(rng, shape) / np.sqrt(chi / 2)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_exponential(shape, dtype=np.float32) - 1


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return np.exp(normal(rng, shape)) - math.exp(0.5)


def portions(size: int) -> Iterator[int]:
    """The simulations in portions that fit in memory."""
    assert SIMULATIONS % size == 0
    yield from [size] * (SIMULATIONS // size)


def documents_of_windows(rng: np.random.Generator, documents: int) -> NDArray[np.int64]:
    """Document ids of samples: a geometric number of windows a document, 4 in the mean."""
    return np.repeat(np.arange(documents), rng.geometric(0.25, documents))


def correlated(rng: np.random.Generator, clusters: NDArray[np.int64], icc: float) -> Floats:
    """Standard normal values of which the part `icc` of the variance is shared within a cluster."""
    shared = rng.normal(size=clusters[-1] + 1)[clusters]
    return math.sqrt(icc) * shared + math.sqrt(1 - icc) * rng.normal(size=len(clusters))


# 1


@pytest.mark.parametrize(("draw", "seed"), [(normal, 101), (student_t4, 102), (skewed, 103)])
def test_1_equal_models_are_called_different_in_five_of_a_hundred(draw: Draw, seed: int, measured: Callable) -> None:
    rng = np.random.default_rng(seed)
    samples = np.arange(256)
    ones = np.ones(256)
    by_t = by_z = 0
    for _ in range(SIMULATIONS):
        a = rng.normal(MEAN, SD, 256)
        found = paired_difference(a, a + PAIRED_SD * draw(rng, (256,)), ones, samples)
        by_t += found.p < ALPHA
        by_z += abs(found.t) > Z
    measured(t=by_t / SIMULATIONS, z=by_z / SIMULATIONS)
    assert 0.04 <= by_t / SIMULATIONS <= 0.06
    assert 0.04 <= by_z / SIMULATIONS <= 0.06


# 2


def test_2_errors_of_the_source_article(measured: Callable) -> None:
    rng = np.random.default_rng(201)
    samples, ones = np.arange(SAMPLES), np.ones(SAMPLES)
    a = rng.normal(MEAN, SD, SAMPLES)
    found = paired_difference(a, a + rng.normal(0, PAIRED_SD, SAMPLES), ones, samples)
    unpaired_percent = 100 * math.hypot(found.a.se, found.b.se) / found.a.value
    of_2000 = float(100 * subset_error(a, ones, 2000, finite=False) / MEAN)
    measured(
        se=found.se,
        detectable_percent=detectable(found.se_percent),
        unpaired_percent=unpaired_percent,
        gain=found.pairing_gain,
        subset_one_mean=of_2000,
        subset_difference=math.sqrt(2) * of_2000,
    )
    assert found.se == pytest.approx(2.14e-5, rel=0.03)
    assert detectable(found.se_percent) == pytest.approx(0.00276, rel=0.03)
    assert unpaired_percent == pytest.approx(0.178, rel=0.03)
    assert of_2000 == pytest.approx(0.40, abs=0.01)
    assert math.sqrt(2) * of_2000 == pytest.approx(0.57, abs=0.01)


def test_2_power_at_the_source_articles_figures(measured: Callable) -> None:
    rng = np.random.default_rng(202)
    limit = t_quantile(1 - ALPHA, SAMPLES - 1)
    seen = {0.00277: 0, 0.001: 0}
    seen_unpaired = 0
    unpaired_se = math.sqrt(2) * SD / math.sqrt(SAMPLES)
    for size in portions(100):
        noise_SN = PAIRED_SD * normal(rng, (size, SAMPLES)).astype(np.float64)
        mean_S, se_S = noise_SN.mean(1), noise_SN.std(1, ddof=1) / math.sqrt(SAMPLES)
        for percent in seen:
            seen[percent] += int(np.sum(np.abs(mean_S + percent / 100 * MEAN) > limit * se_S))
        seen_unpaired += int(np.sum(np.abs(mean_S + 0.00277 / 100 * MEAN) > Z * unpaired_se))
    # What was counted at once is what the instrument computes one by one.
    for i in range(3):
        ones = np.ones(SAMPLES)
        found = paired_difference(MEAN * ones, MEAN + noise_SN[i], ones, np.arange(SAMPLES))
        assert found.t == pytest.approx(mean_S[i] / se_S[i], rel=1e-6)
    rates = {percent: count / SIMULATIONS for percent, count in seen.items()}
    measured(**{f"at_{percent}": rate for percent, rate in rates.items()}, unpaired=seen_unpaired / SIMULATIONS)
    assert 0.77 <= rates[0.00277] <= 0.83
    assert 0.13 <= rates[0.001] <= 0.20
    assert seen_unpaired == 0  # the control: unpaired, such a change is never seen


# 3


def test_3_clustering_holds_the_rate_where_ignoring_documents_does_not(measured: Callable) -> None:
    rng = np.random.default_rng(301)
    clustered = naive = 0
    for _ in range(SIMULATIONS):
        document = documents_of_windows(rng, 200)
        a = rng.normal(MEAN, SD, len(document))
        b = a + PAIRED_SD * correlated(rng, document, icc=0.3)
        ones = np.ones(len(document))
        clustered += paired_difference(a, b, ones, document).p < ALPHA
        naive += paired_difference(a, b, ones, np.arange(len(document))).p < ALPHA
    measured(clustered=clustered / SIMULATIONS, control_naive=naive / SIMULATIONS)
    assert 0.04 <= clustered / SIMULATIONS <= 0.06
    assert naive / SIMULATIONS >= 0.15


def test_3_documents_of_one_sample_give_the_textbook_error() -> None:
    x = np.random.default_rng(302).normal(MEAN, SD, 4096)
    assert clustered_mean(x, np.arange(4096)).se == pytest.approx(x.std(ddof=1) / math.sqrt(4096), rel=1e-12)


def test_3_flipping_signs_holds_the_rate_with_few_documents(measured: Callable) -> None:
    """At 10 documents, where Student's t with clusters of unequal size is liberal."""
    rng = np.random.default_rng(303)
    by_flips = by_t = covered = 0
    for seed in range(SIMULATIONS):
        size = rng.geometric(0.25, 10)
        y = math.sqrt(0.3) * size * rng.normal(size=10) + np.sqrt(0.7 * size) * rng.normal(size=10)
        found = sign_flip(y, size, seed=seed)
        by_flips += found.p <= ALPHA
        covered += found.interval[0] <= 0 <= found.interval[1]
        estimate = clustered_ratio(y, size, np.arange(10))
        by_t += abs(estimate.value) > t_quantile(1 - ALPHA, 9) * estimate.se
    measured(sign_flip=by_flips / SIMULATIONS, covered=covered / SIMULATIONS, control_t=by_t / SIMULATIONS)
    assert 0.04 <= by_flips / SIMULATIONS <= 0.055
    assert covered == SIMULATIONS - by_flips
    assert by_t / SIMULATIONS > 0.06


# 4


def test_4_interval_of_bits_per_byte_covers_the_truth(measured: Callable) -> None:
    rng = np.random.default_rng(401)
    covered = covered_unclustered = 0
    for _ in range(SIMULATIONS):
        document = documents_of_windows(rng, 200)
        size = rng.lognormal(6, 0.5, len(document)).round()
        bits = size * (1.0 + 0.2 * correlated(rng, document, icc=0.5))  # 1 bit per byte in truth
        found = clustered_ratio(bits, size, document)
        covered += abs(found.value - 1.0) < t_quantile(0.95, 199) * found.se
        naive = clustered_ratio(bits, size, np.arange(len(document)))
        covered_unclustered += abs(naive.value - 1.0) < t_quantile(0.95, len(document) - 1) * naive.se
    measured(covered=covered / SIMULATIONS, control_unclustered=covered_unclustered / SIMULATIONS)
    assert 0.94 <= covered / SIMULATIONS <= 0.96
    assert covered_unclustered / SIMULATIONS < 0.85


# 5


@pytest.mark.parametrize(("draw", "seed"), [(normal, 501), (student_t4, 502), (skewed, 503), (lognormal, 504)])
def test_5_fifty_looks_do_not_make_a_difference(draw: Draw, seed: int, measured: Callable) -> None:
    rng = np.random.default_rng(seed)
    looks = np.arange(1, 51) * 256
    ones = np.ones(looks[-1])
    sequence = peeking = 0
    for size in portions(50):
        found = confidence_sequence(draw(rng, (size, looks[-1])), ones, looks, t_opt=2048, alpha=ALPHA)
        sequence += int(excludes(found).any(-1).sum())
        # The half width is a multiple of the standard error that depends on the look alone.
        z_SK = np.abs(found.value_K) / found.half_K * (_width(looks) * np.sqrt(looks))
        peeking += int((z_SK > Z).any(-1).sum())
    measured(sequence=sequence / SIMULATIONS, control=peeking / SIMULATIONS)
    assert sequence / SIMULATIONS <= 0.05
    assert peeking / SIMULATIONS >= 0.28


def test_5_looking_from_sixteen_documents_on_would_mislead(measured: Callable) -> None:
    """The control for blocks of 256: the same design in blocks of 16, t_opt at the eighth look as above."""
    rng = np.random.default_rng(505)
    looks = np.arange(1, 51) * 16
    found = confidence_sequence(lognormal(rng, (SIMULATIONS, looks[-1])), np.ones(looks[-1]), looks, t_opt=128)
    control = float((np.abs(found.value_K) > found.half_K).any(-1).mean())  # as if documents were symmetric
    measured(control=control)
    assert control > 0.07


def _width(looks: NDArray[np.int64]) -> Floats:
    """FACTS' formula written out once more, at t_opt = 2048."""
    log = -2 * math.log(ALPHA)
    v = looks * (log + math.log(log + 1)) / 2048
    return np.sqrt(2 * (v + 1) / (looks * v) * np.log(np.sqrt(v + 1) / ALPHA))


# 6


@pytest.mark.parametrize(
    ("percent", "blocks", "seed", "most"), [(0.0, 80, 601, None), (0.1, 4, 602, 300), (0.01, 40, 603, 2300)]
)
def test_6_stopping_early(percent: float, blocks: int, seed: int, most: float | None, measured: Callable) -> None:
    """Looks every 64 documents, of which those before 256 samples fall away, then every 256."""
    rng = np.random.default_rng(seed)
    ends = np.concatenate([[64, 128, 192], np.arange(1, blocks + 1) * 256])
    looks = allowed_looks(ends, np.ones(blocks * 256))
    assert looks[0] == 256
    ones = np.ones(looks[-1])
    right = wrong = stopped = 0
    used = 0.0
    for size in portions(50):
        noise_SC = normal(rng, (size, looks[-1])).astype(np.float64)
        found = confidence_sequence(percent / 100 * MEAN + PAIRED_SD * noise_SC, ones, looks, t_opt=2048, alpha=ALPHA)
        at_S = first_look(excludes(found))
        value_S = found.value_K[np.arange(size), at_S]
        stopped += int(np.sum(at_S >= 0))
        right += int(np.sum((at_S >= 0) & (value_S > 0)))
        wrong += int(np.sum((at_S >= 0) & (value_S < 0)))
        used += float(looks[at_S].sum())  # −1: the whole stream
    measured(stopped=stopped / SIMULATIONS, right=right / SIMULATIONS, mean_n=used / SIMULATIONS)
    if most is None:
        assert stopped / SIMULATIONS <= 0.05
    else:
        assert right / SIMULATIONS >= 0.99
        assert wrong / SIMULATIONS <= 0.01
        assert used / SIMULATIONS <= most


# 7


def test_7_fifty_checkpoints_of_equal_models(measured: Callable) -> None:
    rng = np.random.default_rng(701)
    p_SK = 2 * stdtr(399, -np.abs(rng.standard_t(399, (SIMULATIONS, 50))))  # t over 400 documents
    spent = float((p_SK < ALPHA / 50).any(1).mean())  # while it trains: shared by all that are planned
    by_holm = float(np.mean([holm(p_K).min() <= ALPHA for p_K in p_SK]))
    uncorrected = float((p_SK < ALPHA).any(1).mean())
    measured(spent=spent, holm=by_holm, control=uncorrected)
    assert spent <= 0.055
    assert by_holm <= 0.055
    assert uncorrected > 0.85


@pytest.fixture
def measured(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable:
    """Keeps the rates in the report (--junitxml) and prints them (pytest -s or -rP)."""

    def keep(**rates: float) -> None:
        for name, rate in rates.items():
            record_property(name, rate)
        print(request.node.name, *(f"{name}={rate:.5g}" for name, rate in rates.items()))

    return keep
