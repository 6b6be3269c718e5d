"""A twin's weights: one unit in the last place from the run's, the same however they are cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, DataError
from configs.run.directory import RunDir
from trainer.engine.twin import Twin, read_twin


def test_each_weight_moves_by_one_unit_in_the_last_place() -> None:
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    moved = Twin(at=10, number=1).moved("layer.weight", 0, weight)
    apart = (moved.view(torch.int32) - weight.view(torch.int32)).abs()
    assert torch.equal(apart, torch.ones_like(apart))
    assert 0.48 < float((moved > weight).float().mean()) < 0.52


def test_which_way_hangs_on_number_name_and_place_alone() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    twin = Twin(at=10, number=1)
    whole = twin.moved("w", 0, weight)
    cut = [twin.moved("w", start, weight[start : start + 333]) for start in range(0, 1000, 333)]
    assert torch.equal(torch.cat(cut), whole)
    for other in (Twin(10, 2).moved("w", 0, weight), twin.moved("v", 0, weight)):
        assert 0.4 < float((other != whole).float().mean()) < 0.6


def test_weights_are_moved_where_the_twin_splits_off_and_nowhere_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_twin(run, None) is None
    run.twin.write_text(json.dumps({"of": "runs/a", "at": 20, "number": 2}))
    assert read_twin(run, run.checkpoints / "step-00000020") == Twin(20, 2)
    assert read_twin(run, run.checkpoints / "step-00000030") is None
    with pytest.raises(ConfigError, match="a twin from step 20, whose checkpoint is gone"):
        read_twin(run, None)
    run.twin.write_text("{}")
    with pytest.raises(DataError, match="does not say the twin's step and number"):
        read_twin(run, None)
