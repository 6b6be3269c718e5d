"""Blocks of correlated steps: what they are called for, and that they keep the error rate they claim."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from configs.errors import DataError
from eval.statistics import (
    autocorrelation_time,
    block_ends,
    block_length,
    block_means,
    block_sums,
    confidence_sequence,
    detrended,
    excludes,
    mean_over_blocks,
    sign_flip_blocks,
)

STEPS = 2048


def first_order(rho: float, series: int, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """[series, steps] of x_t = ρ·x_{t−1} + e_t, stationary from the start."""
    noise = np.random.default_rng(seed).standard_normal((series, steps))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - rho**2)
    for step in range(1, steps):
        x[:, step] = rho * x[:, step - 1] + noise[:, step]
    return x


def block_p(series: np.ndarray) -> np.ndarray:
    """p-values of the block t test, each series with the block length that it calls for itself."""
    lengths = np.round(4 * autocorrelation_time(series)).astype(int)
    assert lengths[0] == block_length(series[0])
    out = []
    for x, length in zip(series, lengths, strict=True):
        borders = block_ends(len(x), int(length))
        out.append(mean_over_blocks(block_sums(x, borders), np.diff(borders)).p)
    return np.array(out)


def test_the_correlation_time_is_that_of_the_process() -> None:
    assert np.median(autocorrelation_time(first_order(0.0, 200))) == pytest.approx(1.0, abs=0.05)
    assert np.median(autocorrelation_time(first_order(0.5, 200))) == pytest.approx(3.0, rel=0.1)
    assert np.median(autocorrelation_time(first_order(0.8, 200, 4 * STEPS))) == pytest.approx(9.0, rel=0.1)


def test_a_slow_trend_is_not_taken_for_correlation() -> None:
    noise = np.random.default_rng(1).standard_normal((200, STEPS))
    falling = 7 * np.exp(-np.arange(STEPS) / 60) + 3
    assert np.median(autocorrelation_time(10 * falling + noise)) < 1.6
    assert block_length(np.linspace(5, 4, STEPS)) == 4
    assert block_length(np.zeros(STEPS)) == 4


def test_taking_off_the_trend_is_linear() -> None:
    a, b = first_order(0.5, 2)
    assert detrended(b - a) == pytest.approx(detrended(b) - detrended(a), abs=1e-12)
    assert detrended(3 + 2 * np.arange(100.0)) == pytest.approx(np.zeros(100), abs=1e-10)


def test_every_step_is_in_one_block_of_nearly_the_same_length() -> None:
    borders = block_ends(103, 10)
    assert (borders[0], borders[-1], len(borders)) == (0, 103, 11)
    assert set(np.diff(borders)) == {10, 11}
    x, weight = np.arange(103.0), np.arange(1.0, 104.0)
    by_hand = [np.average(x[i:j], weights=weight[i:j]) for i, j in itertools.pairwise(borders)]
    assert block_means(x, borders, weight) == pytest.approx(by_hand, rel=1e-12)


def test_blocks_of_one_are_the_ordinary_t_test() -> None:
    x = np.random.default_rng(2).normal(0.2, 1, 50)
    found, known = mean_over_blocks(x, np.ones(50)), stats.ttest_1samp(x, 0)
    assert (found.t, found.p) == pytest.approx((known.statistic, known.pvalue), rel=1e-12)
    assert found.half95 == pytest.approx(known.confidence_interval().high - x.mean(), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_the_block_test_errs_as_often_as_it_says_where_single_steps_do_not(rho: float) -> None:
    series = first_order(rho, 4000, seed=3)
    assert 0.035 <= np.mean(block_p(series) < 0.05) <= 0.065
    naive = np.mean(stats.ttest_1samp(series, 0, axis=1).pvalue < 0.05)
    assert naive >= 0.15 if rho else naive <= 0.065


def test_a_running_band_over_blocks_errs_at_most_one_time_in_twenty() -> None:
    series = first_order(0.5, 2000, seed=4)
    borders = block_ends(STEPS, 12)
    sums, lengths = block_sums(series, borders), np.diff(borders).astype(float)
    looks = np.arange(12, len(borders))
    band = confidence_sequence(sums, np.broadcast_to(lengths, sums.shape), looks, t_opt=len(lengths))
    assert np.mean(excludes(band).any(-1)) <= 0.05


def test_a_drift_is_found() -> None:
    noise = first_order(0.5, 50, seed=5)
    assert np.all(block_p(noise + np.linspace(0, -1, STEPS)) < 0.05)


def test_flipping_the_signs_of_blocks_agrees_with_t_and_keeps_its_rate() -> None:
    series = first_order(0.5, 300, 512, seed=6)
    flipped = np.array([sign_flip_blocks(x, 12, flips=499).p for x in series])
    assert 0.02 <= np.mean(flipped < 0.05) <= 0.09
    assert sign_flip_blocks(series[0] - 0.5, 12).p < 0.001
    alone = sign_flip_blocks(series[0], 12, weights=np.full(512, 16.0))
    assert alone.value == pytest.approx(series[0].mean(), rel=1e-12)


def test_a_single_block_is_refused_in_a_line() -> None:
    with pytest.raises(DataError, match="needs at least 2 blocks"):
        sign_flip_blocks(np.ones(5), 10)
    with pytest.raises(DataError, match="needs at least 2 blocks"):
        mean_over_blocks([1.0], [1.0])
