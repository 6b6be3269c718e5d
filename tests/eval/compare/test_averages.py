"""`RUN@last3`: the mean of the losses of a run's last checkpoints, sample by sample, as a thing to compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import vernier
from test_compare import a_table, write_run

from configs.errors import DataError
from eval.compare.targets import Scale, find_tables, resolve_scale
from eval.tables import read_table


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {step: a_table(-step / 1e4, seed=step) for step in (100, 200, 300, 400)})


def test_it_is_the_mean_of_each_sample_over_the_last_scored_steps(run: Path) -> None:
    last, one = find_tables([f"{run}@last3", f"{run}@400"])
    by_hand = np.mean([read_table(p).loss for p in sorted(run.rglob("step-*"))[-3:]], axis=0)
    assert np.array_equal(last.read().loss, by_hand)
    assert last.caution == "last3: the mean of the losses at steps 200, 300, 400, not the loss of averaged weights"
    assert one.caution is None
    found = json.loads(vernier("compare", f"{run}@last3", f"{run}@400", "--json").stdout)
    assert found["a"]["name"] == "last3"
    assert found["origin"]["of"] == "one run"
    assert last.caution in found["cautions"]


def test_what_has_too_few_steps_and_what_is_no_such_thing_is_refused(run: Path) -> None:
    assert (
        "fewer than 9 steps of it are scored; scored steps: 100"
        in vernier("compare", f"{run}@last9", f"{run}@400", code=2).stderr
    )
    assert "'last0' is not a step, or last3, say" in vernier("compare", f"{run}@last0", f"{run}@400", code=2).stderr
    with pytest.raises(DataError, match="a mean of checkpoints is for vernier compare"):
        resolve_scale(f"{run}@last2", Scale("x", "causal", "fp32"))
