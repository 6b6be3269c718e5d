"""Weight decay takes matrices and embeddings; what must not shrink is left out by name and role, and `plan` says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, vernier

from configs.errors import ConfigError
from trainer.weight_decay import decay_of, parameter_groups

SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def built(kind: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


@pytest.mark.parametrize(
    ("kind", "fields", "left_out"),
    [
        ("mamba", {**SMALL, "state_size": 8}, {"A_log": "rates and gains"}),
        (
            "gpt_oss",
            {**SMALL, **HEADS, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4, "pad_token_id": None},
            {"gate_up_proj_bias": "biases", "down_proj_bias": "biases"},
        ),
        ("cohere", {**SMALL, **HEADS, "use_qk_norm": True, "pad_token_id": None}, {"q_norm.weight": "norms"}),
        ("rwkv", {**SMALL, "attention_hidden_size": 32}, {"time_mix_key": "vectors"}),
    ],
)
def test_what_has_two_dimensions_and_is_no_matrix_is_not_decayed(
    kind: str, fields: dict[str, Any], left_out: dict[str, str]
) -> None:
    every = list(decay_of(built(kind, **fields)))
    for end, reason in left_out.items():
        found = [one for one in every if one.name.endswith(end)]
        assert found
        assert all(len(one.parameter.shape) > 1 and one.kept_from == reason for one in found)
    assert any(one.kept_from is None and "embed" in one.name for one in every)


def test_a_pattern_leaves_out_more_and_one_that_names_nothing_is_refused() -> None:
    model = built("llama", **SMALL, **HEADS, intermediate_size=64, tie_word_embeddings=False)
    decayed, left = parameter_groups(model, 0.1, ["*embed_tokens*", "lm_head.weight"])
    assert (decayed["weight_decay"], left["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in left["params"]) == 2 * 512 * 32 + 3 * 32
    with pytest.raises(ConfigError, match=r"optimizer.no_decay: '\*embd\*' names no parameter"):
        parameter_groups(model, 0.1, ["*embd*"])


def test_what_its_author_marks_is_not_decayed() -> None:
    model = torch.nn.Linear(4, 4)
    model.weight._no_weight_decay = True  # type: ignore[assignment]
    assert [one.kept_from for one in decay_of(model)] == ["rates and gains", "biases"]


def test_plan_shows_the_groups_and_train_refuses_a_pattern_before_a_rank_starts(
    tiny_data: Path, tmp_path: Path
) -> None:
    at = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}"]
    told = vernier("plan", TINY, *at).stdout
    assert "decay     0.1   matrices and embeddings: " in told
    groups = json.loads(vernier("plan", TINY, *at, "optimizer.no_decay=['*embed*']", "--json").stdout)["decay"]
    assert {group["kind"] for group in groups} == {"matrices and embeddings", "norms", "optimizer.no_decay"}
    refused = vernier("train", TINY, *at, "optimizer.no_decay=['*embd*']", code=2)
    assert "error: optimizer.no_decay: '*embd*' names no parameter of the model" in refused.stderr
    assert not (tmp_path / "run").exists()
