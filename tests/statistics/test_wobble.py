"""The wobble of a run: nothing on a smooth curve, the noise on a noisy one, however the steps lie."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.statistics import wobble_percent
from eval.statistics.wobble import local_contrasts, places

Floats = NDArray[np.float64]
EVEN = np.arange(0, 2001, 50)
UNEVEN = np.concatenate([[0], np.cumsum(np.random.default_rng(3).integers(20, 120, 40))])
DOUBLING = 2 ** np.arange(15)


def curve(steps: Floats) -> Floats:
    """A power law above a floor, as losses fall."""
    return 2 + 8 * (np.asarray(steps) + 50.0) ** -0.35


@pytest.mark.parametrize("steps", [EVEN, UNEVEN, DOUBLING])
def test_a_smooth_curve_has_nearly_none(steps: Floats) -> None:
    found = wobble_percent(steps, curve(steps))
    assert found is not None
    assert found < 0.05


@pytest.mark.parametrize("steps", [EVEN, UNEVEN])
def test_independent_noise_is_found_again(steps: Floats) -> None:
    rng = np.random.default_rng(0)
    found = [wobble_percent(steps, curve(steps) * (1 + rng.normal(0, 0.003, len(steps)))) for _ in range(200)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.3, rel=0.1)


def test_pairs_one_step_apart_do_not_make_a_run_look_calm() -> None:
    rng = np.random.default_rng(1)
    steps = np.sort(np.concatenate([EVEN[1:], EVEN[1:] + 1]))
    found = []
    for _ in range(100):
        off = np.repeat(rng.normal(0, 0.003, len(EVEN) - 1), 2)
        found.append(wobble_percent(steps, curve(steps) * (1 + off)))
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.3, rel=0.1)


def test_a_spike_does_not_decide() -> None:
    losses = curve(EVEN) * (1 + np.random.default_rng(2).normal(0, 0.003, len(EVEN)))
    before = wobble_percent(EVEN, losses)
    losses[20] *= 3
    after = wobble_percent(EVEN, losses)
    assert before is not None
    assert after is not None
    assert after < 2 * before


def test_the_sampling_error_of_the_paired_differences_is_taken_off() -> None:
    rng = np.random.default_rng(4)
    documents = 100
    shared = rng.normal(2.2, 0.3, documents)  # what makes a document hard; drops out by pairing
    losses_KC = curve(EVEN)[:, None] / 2.2 * shared + rng.normal(0, 0.05, (len(EVEN), documents))
    mean_K = losses_KC.mean(1)
    influence = (losses_KC - mean_K[:, None]) / losses_KC.sum(1, keepdims=True)
    with_it, without = wobble_percent(EVEN, mean_K, influence), wobble_percent(EVEN, mean_K)
    assert with_it is not None
    assert without == pytest.approx(100 * 0.05 / np.sqrt(documents) / mean_K.mean(), rel=0.35)
    assert with_it < 0.6 * without


def test_the_order_of_the_checkpoints_does_not_matter() -> None:
    losses = curve(EVEN) * (1 + np.random.default_rng(5).normal(0, 0.003, len(EVEN)))
    order = np.random.default_rng(6).permutation(len(EVEN))
    assert wobble_percent(EVEN[order], losses[order]) == wobble_percent(EVEN, losses)


def test_with_few_checkpoints_nothing_is_told() -> None:
    steps = np.arange(0, 120, 10)
    assert wobble_percent(steps, curve(steps)) is None  # step 0 does not count
    assert wobble_percent(steps + 10, curve(steps + 10)) is not None
    assert wobble_percent([], []) is None


def test_untrained_weights_and_near_twins_are_left_out() -> None:
    assert places([0, 60, 120, 150, 151, 180, 240]).tolist() == [1, 2, 4, 5, 6]
    assert places([240, 0, 120]).tolist() == [2, 0]


def test_contrasts_take_off_parabolas_and_keep_the_size_of_noise() -> None:
    x = np.array([1.0, 2.5, 3.0, 7.0, 9.0, 10.0, 14.0])
    rows = local_contrasts(x)
    assert rows.shape == (5, 7)
    assert rows @ (3 - x + 0.7 * x**2) == pytest.approx(np.zeros(5), abs=1e-10)
    assert np.sum(rows**2, axis=1) == pytest.approx(np.ones(5))
