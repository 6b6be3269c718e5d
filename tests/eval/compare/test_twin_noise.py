"""What twins differ by in their scores, and what a verdict makes of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_compare import a_table, write_run

from configs.errors import ConfigError
from eval.compare.along_run import KnownNoise, compare_run, with_noise
from eval.compare.gate import upper_bound
from eval.compare.pair import compare_tables
from eval.compare.targets import find_tables
from eval.compare.twins import noise_of_run
from eval.tables import LossTable, mean_loss, read_table


def shifted(table: LossTable, percent: float) -> LossTable:
    return replace(table, loss=table.loss * (1 + percent / 100))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three twins from the start, which lie .08 % apart at step 150 and .1 % from step 300 on."""
    path = tmp_path / "run"
    own = {step: a_table(-step / 1e4, seed=step) for step in (100, 150, 300, 400)}
    write_run(path, own)
    for number, size in enumerate((1.0, -1.0, 0.5), start=1):
        spread = {150: 0.08, 300: 0.1, 400: 0.11}
        tables = {step: shifted(own[step], size * percent) for step, percent in spread.items()}
        write_run(path / "twins" / f"step-00000000.{number}", tables)
        (path / "twins" / f"step-00000000.{number}" / "twin.json").write_text(json.dumps({"at": 0, "number": number}))
    return path


def test_the_spread_is_that_of_the_late_half_with_a_degree_of_freedom_a_twin(run: Path) -> None:
    found = noise_of_run(run)
    assert [(row.at, row.since, row.runs) for row in found.rows] == [(0, 150, 4), (0, 300, 4), (0, 400, 4)]
    means = [[mean_loss(read_table(p)) for p in sorted(run.rglob(f"step-00000{step}@*"))] for step in (300, 400)]
    by_hand = [100 * np.std(of, ddof=1) / np.mean(of) for of in means]
    assert found.percent == pytest.approx(math.sqrt(np.mean(np.square(by_hand))), rel=1e-12)
    assert (found.df, found.since) == (3, 400)
    assert found.problems == ()


def test_a_verdict_between_two_checkpoints_goes_by_the_twins(run: Path) -> None:
    a, b = find_tables([f"{run}@300", f"{run}@400"])
    made = with_noise(compare_tables(read_table(a.path), read_table(b.path)), a, b, KnownNoise())
    assert made.twins is not None
    sd = made.twins.percent
    assert made.noise_bound_percent == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(2) * sd, rel=1e-9)
    half = made.ci95_percent[1] - made.difference.percent
    reach = stats.t.ppf(0.975, 3) * math.sqrt(2) * sd
    assert upper_bound(made, "run") == pytest.approx(made.difference.percent + math.hypot(half, reach), rel=1e-9)
    assert made.to_json()["twins"] == {"percent": sd, "degrees_of_freedom": 3, "steps": 400, "settled": True}
    assert replace(made, twins=replace(made.twins, percent=100.0)).below_noise
    growing = replace(made, twins=replace(made.twins, settled=False), wobble_percent=None)
    assert growing.below_noise == made.below_noise
    assert (made.limited_by, growing.limited_by) == (("training noise",) * 2 if made.below_noise else (None, "unknown"))
    with pytest.raises(ConfigError, match="after 400 steps, is a lower bound"):
        upper_bound(growing, "run")
    wobbling = replace(growing, wobble_percent=10 * sd)  # the larger of the two counts
    assert wobbling.noise_percent == 10 * sd
    assert wobbling.noise_bound_percent == pytest.approx(2 * math.sqrt(2) * 10 * sd)
    with pytest.raises(ConfigError, match="vernier twin RUN measures it"):
        upper_bound(replace(made, twins=None, wobble_percent=None), "run")


def test_twins_that_are_not_scored_tell_nothing_and_short_ones_say_so(run: Path) -> None:
    for path in run.glob("twins/*/losses/*/step-00000[34]00@*"):
        path.unlink()
    found = compare_run(run)
    assert found.twins is not None
    assert found.twins.since == 150
    assert "twins of 150 steps: noise grows for longer than that, so it is a lower bound" in found.notes
    for path in run.glob("twins/*/losses/*/*"):
        path.unlink()
    found = compare_run(run)
    assert found.twins is None
    assert "no two of these runs are scored at one step yet" in found.notes


def test_null_pairs_are_beyond_twins_one_time_in_twenty(tmp_path: Path) -> None:
    """Checkpoints that differ by the twins' own noise alone: 2,000 sets of three twins and a pair."""
    rng = np.random.default_rng(5)
    own_S, twins_S3 = rng.normal(0, 0.1, 2000), rng.normal(0, 0.1, (2000, 3))
    other_S = rng.normal(0, 0.1, 2000)
    sd_S = np.std(np.column_stack([own_S, twins_S3]), axis=1, ddof=1)
    bound_S = stats.t.ppf(0.975, 3) * math.sqrt(2) * sd_S
    assert np.mean(np.abs(other_S - rng.normal(0, 0.1, 2000)) > bound_S) == pytest.approx(0.05, abs=0.015)


def test_of_several_splits_the_earliest_counts_and_a_late_one_alone_is_a_lower_bound(run: Path) -> None:
    early = noise_of_run(run)
    for number in (1, 2):
        late = run / "twins" / f"step-00000200.{number}"
        write_run(late, {400: shifted(a_table(-0.04, seed=400), 1e-4 * number)})
        (late / "twin.json").write_text(json.dumps({"at": 200, "number": number}))
    both = noise_of_run(run)
    assert (both.percent, both.df, both.settled) == (early.percent, early.df, True)
    assert [row.at for row in both.rows] == [0, 0, 0, 200]
    for path in run.glob("twins/step-00000000.*/twin.json"):
        path.unlink()
    alone = noise_of_run(run)
    assert alone.percent < 0.01
    assert not alone.settled
    assert "twins from step 200: what chance did before is not in them, so it is a lower bound" in alone.problems


def test_a_wobble_below_unsettled_twins_does_not_make_their_bound_known(run: Path) -> None:
    a, b = find_tables([f"{run}@300", f"{run}@400"])
    made = with_noise(compare_tables(read_table(a.path), read_table(b.path)), a, b, KnownNoise())
    assert made.twins is not None
    growing = replace(made, twins=replace(made.twins, settled=False), wobble_percent=made.twins.percent / 2)
    assert not growing.noise_is_known
    with pytest.raises(ConfigError, match="is a lower bound"):
        upper_bound(growing, "run")
