"""Each function against a slow loop, a published figure or a hand-computed case."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from configs.errors import DataError
from eval.statistics import (
    allowed_looks,
    benjamini_hochberg,
    clustered_ratio,
    confidence_sequence,
    excludes,
    first_look,
    gaussian_fit,
    holm,
    mixture_rho,
    mixture_width,
    sign_flip,
    subset_error,
    subset_error_resampled,
)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_false_discovery_rate_as_scipy_has_it() -> None:
    p = np.random.default_rng(0).random(40) ** 3
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p), rel=1e-12)
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])


@pytest.mark.parametrize("p", [[0.1, math.nan], [-0.1], [1.1], 0.5])
def test_what_is_no_list_of_p_values_is_refused(p: object) -> None:
    for adjust in (holm, benjamini_hochberg):
        with pytest.raises(ValueError, match="from 0 to 1"):
            adjust(p)


def test_holm_on_correlated_tests_errs_no_more_often_and_finds_more_than_bonferroni() -> None:
    rng = np.random.default_rng(1)
    z = 0.8 * rng.normal(size=(4000, 1)) + 0.6 * rng.normal(size=(4000, 10))
    assert np.mean([holm(row).min() <= 0.05 for row in 2 * stats.norm.sf(np.abs(z))]) <= 0.05
    p = np.array([0.001, 0.006, 0.04])
    assert (holm(p) <= 0.05).sum() == 3
    assert (3 * p <= 0.05).sum() == 2


def test_sequence_is_narrowest_where_it_was_told_to_be() -> None:
    def width(t_opt: float) -> float:
        return float(mixture_width(2048, mixture_rho(t_opt)))

    assert width(2048) < min(width(1024), width(4096))
    assert width(2048) == pytest.approx(min(width(t) for t in range(1500, 2700)), rel=1e-3)


def test_sequence_equals_a_slow_loop_whatever_comes_after() -> None:
    rng = np.random.default_rng(2)
    m = rng.geometric(0.25, 300) * 128.0
    y = 0.3 * m + rng.normal(0, 1e-4, 300) * m  # hardly any spread: cancellation would show
    looks = [40, 41, 200]
    found = confidence_sequence(y, m, looks, t_opt=100)
    for k, t in enumerate(looks):
        ratio = y[:t].sum() / m[:t].sum()
        variance = sum((y[c] - ratio * m[c]) ** 2 for c in range(t)) / (t - 1)
        half = math.sqrt(variance) * float(mixture_width(t, mixture_rho(100))) / (m[:t].sum() / t)
        assert found.value_K[k] == pytest.approx(ratio, rel=1e-12)
        assert found.half_K[k] == pytest.approx(half, rel=1e-6)
        se = clustered_ratio(y[:t], m[:t], np.arange(t)).se
        assert found.half_K[k] == pytest.approx(se * math.sqrt(t) * mixture_width(t, mixture_rho(100)), rel=1e-6)
    other = confidence_sequence(np.concatenate([y[:41], y[41:] + 5]), m, looks, t_opt=100)
    assert other.half_K[:2].tolist() == found.half_K[:2].tolist()
    many = confidence_sequence(np.stack([y, -y]), m, looks, t_opt=100)
    assert many.half_K[0] == pytest.approx(found.half_K, rel=1e-9)
    assert many.value_K[1] == pytest.approx(-found.value_K, rel=1e-12)


def test_documents_of_unequal_size_in_random_order_are_covered_and_in_order_of_difficulty_are_not() -> None:
    rng = np.random.default_rng(3)
    looks = np.arange(4, 21) * 64
    m = rng.geometric(0.25, (4000, 1280)).astype(float)
    y = np.sqrt(m) * rng.normal(size=m.shape) + 0.5 * m * rng.normal(size=m.shape)
    assert excludes(confidence_sequence(y, m, looks, t_opt=512)).any(-1).mean() <= 0.05
    ordered = np.sort(y[:200], axis=-1)
    assert excludes(confidence_sequence(ordered, np.ones(1280), looks, t_opt=512)).any(-1).mean() > 0.9


def test_looks_before_a_hundred_documents_or_256_samples_fall_away() -> None:
    assert allowed_looks([40, 99, 100, 180], np.full(200, 10)).tolist() == [100, 180]
    assert allowed_looks([100, 120, 128, 256], np.full(300, 2)).tolist() == [128, 256]
    hits = np.array([[False, True, True], [False, False, False]])
    assert first_look(hits).tolist() == [1, -1]


@pytest.mark.parametrize("looks", [[], [1, 5], [5, 5], [5, 11]])
def test_looks_that_do_not_fit_the_stream_are_refused(looks: list[int]) -> None:
    with pytest.raises(DataError, match="10 of the stream"):
        confidence_sequence(np.arange(10.0), np.ones(10), looks, t_opt=5)


def test_a_stream_without_any_spread_has_no_width() -> None:
    found = confidence_sequence(np.full(64, 0.25), np.ones(64), [40, 64], t_opt=50)
    assert found.half_K.tolist() == [0, 0]
    assert excludes(found).all()
    assert not excludes(found, 0.25).any()


def test_sign_flip_equals_a_slow_loop_over_all_flips_and_points() -> None:
    rng = np.random.default_rng(4)
    m = rng.geometric(0.25, 9).astype(float)
    y = 0.4 * m + rng.normal(size=9) * np.sqrt(m)

    def p_at(point: float) -> float:
        residual = y - point * m
        sums = [abs(np.dot(w, residual)) for w in itertools.product((-1, 1), repeat=9)]
        return float(np.mean(np.array(sums) >= abs(residual.sum()) - 1e-12))

    found = sign_flip(y, m)
    assert (found.exact, found.flips) == (True, 512)
    assert found.value == pytest.approx(y.sum() / m.sum())
    assert found.p == pytest.approx(p_at(0.0))
    for end, out in zip(found.interval, (-1e-6, 1e-6), strict=True):
        assert p_at(end - out) > 0.05
        assert p_at(end + out) <= 0.05


def test_random_flips_agree_with_all_and_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    y, m = rng.normal(0.5, 1, 12), np.ones(12)
    whole = sign_flip(y, m)
    monkeypatch.setattr("eval.statistics.resampling.ENUMERATED", 2)
    drawn = sign_flip(y, m, flips=20000, seed=7)
    assert drawn == sign_flip(y, m, flips=20000, seed=7)
    assert (whole.exact, drawn.exact, drawn.flips) == (True, False, 20001)
    assert drawn.p == pytest.approx(whole.p, abs=0.01)
    assert drawn.interval == pytest.approx(whole.interval, abs=0.05)


def test_with_many_documents_flips_come_to_the_clustered_error() -> None:
    rng = np.random.default_rng(6)
    m = rng.geometric(0.25, 400).astype(float)
    y = 0.1 * m + rng.normal(size=400) * m
    found, theory = sign_flip(y, m), clustered_ratio(y, m, np.arange(400))
    assert found.interval == pytest.approx((theory.value - 1.96 * theory.se, theory.value + 1.96 * theory.se), abs=0.01)


def test_five_documents_can_show_nothing_at_five_percent() -> None:
    found = sign_flip(np.ones(5), np.ones(5))
    assert found.p == 2 / 32
    assert found.interval == (-math.inf, math.inf)
    assert sign_flip(np.ones(6), np.ones(6)).interval == (1.0, 1.0)


def test_ties_count_for_the_null() -> None:
    assert sign_flip([0.1, 0.2, -0.3, 0.1, -0.1, 0.0], np.ones(6)).p == 1.0
    assert sign_flip(np.zeros(8), np.ones(8)).p == 1.0


def test_one_document_or_one_without_weight_cannot_be_flipped() -> None:
    with pytest.raises(DataError, match="at least 2 documents"):
        sign_flip([1.0], [1.0])
    with pytest.raises(DataError, match="weight"):
        sign_flip([1.0, 2.0], [1.0, 0.0])
    with pytest.raises(DataError, match="not finite"):
        sign_flip([1.0, math.nan], [1.0, 1.0])


def test_gaussian_fit_of_a_normal_and_of_a_skewed_sample() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(2.17, 0.39, 200_000)
    fit = gaussian_fit(x)
    assert (fit.mean, fit.sd) == pytest.approx((2.17, 0.39), rel=0.01)
    assert (fit.skewness, fit.excess_kurtosis) == pytest.approx((0, 0), abs=0.03)
    assert (fit.share_below, fit.share_above) == pytest.approx((fit.normal_share, fit.normal_share), rel=0.2)
    assert fit.normal_share == pytest.approx(0.0013499, rel=1e-4)
    skew = gaussian_fit(np.exp(rng.normal(size=1000)))
    assert skew.skewness > 1
    assert (skew.share_below, skew.share_above > 0.005) == (0, True)


def test_moments_as_scipy_has_them_and_none_without_spread() -> None:
    x = np.random.default_rng(8).exponential(size=500)
    fit = gaussian_fit(x)
    assert (fit.skewness, fit.excess_kurtosis) == pytest.approx((stats.skew(x), stats.kurtosis(x)), rel=1e-10)
    flat = gaussian_fit(np.full(7, 0.1))
    assert (flat.sd, flat.skewness, flat.excess_kurtosis) == pytest.approx((0, 0, 0))
    with pytest.raises(DataError, match="at least 2"):
        gaussian_fit([1.0])


def test_error_bar_of_subsets_by_theory_and_by_drawing() -> None:
    rng = np.random.default_rng(9)
    m = rng.geometric(0.25, 600) * 100.0
    y = m * rng.normal(2.17, 0.39, 600)
    sizes = [30, 100, 300, 600]
    theory, drawn = subset_error(y, m, sizes), subset_error_resampled(y, m, sizes, draws=4000)
    assert drawn[:3] == pytest.approx(theory[:3], rel=0.06)
    assert theory[3] == 0
    assert drawn[3] == pytest.approx(0, abs=1e-12)
    assert drawn.tolist() == subset_error_resampled(y, m, sizes, draws=4000).tolist()
    without = subset_error(y, m, sizes, finite=False)
    assert without[3] == pytest.approx(clustered_ratio(y, m, np.arange(600)).se)
    assert abs(drawn[2] / without[2] - 1) > 0.2  # the control: at half the set the factor is plain to see
    with pytest.raises(DataError, match="documents"):
        subset_error(y, m, [601])
