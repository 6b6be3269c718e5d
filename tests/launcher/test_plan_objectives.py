"""What other objectives take: their activations are found by running their own kind of model."""

from pathlib import Path

import pytest
from conftest import TINY, vernier


@pytest.mark.parametrize(
    "objective",
    [
        [
            "objective.name=masked",
            "model={type: roberta, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4}",
        ],
        [
            "objective.name=classify",
            "model={type: bert, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4}",
        ],
        ["objective.name=instruct"],
    ],
    ids=["masked", "classify", "instruct"],
)
def test_other_objectives_have_their_activations_too(objective: list[str], tmp_path: Path) -> None:
    said = vernier("plan", TINY, f"data.dir={tmp_path / 'none'}", *objective).stdout
    assert "could not be found" not in said
    assert "activations" in said
