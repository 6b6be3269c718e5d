"""Weight decay: what it pulls at is decided by role, and can be chosen."""

from typing import Any

import pytest
from conftest import TINY, vernier
from transformers import AutoConfig

from configs.errors import ConfigError
from eval.scoring.model_shapes import on_meta
from trainer.engine.decay import decay_groups

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def groups(kind: str, *no_decay: str, **fields: Any) -> tuple[list[str], list[str]]:
    decayed, kept = decay_groups(on_meta(AutoConfig.for_model(kind, **{**SIZES, **fields})), no_decay)
    return list(decayed), list(kept)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2", "olmo2", "gpt_neox", "opt", "bloom"])
def test_in_ordinary_models_matrices_are_decayed_and_vectors_are_not(kind: str) -> None:
    model = on_meta(AutoConfig.for_model(kind, num_hidden_layers=1))
    decayed, kept = decay_groups(model)
    assert all(p.dim() > 1 for p in decayed.values())
    assert all(p.dim() <= 1 for p in kept.values())
    assert [*decayed, *kept] == sorted([*decayed, *kept], key=lambda name: name in kept)
    assert len(decayed) + len(kept) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "fields", "ends"),
    [
        ("mamba", {"state_size": 8}, ("mixer.A_log", "mixer.D", "norm.weight")),
        ("falcon_mamba", {"state_size": 8}, ("mixer.A_log",)),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 16}, ("gate_up_proj_bias", "down_proj_bias")),
        ("cohere", {"use_qk_norm": True, "num_key_value_heads": 2}, ("q_norm.weight", "k_norm.weight")),
        ("rwkv", {}, ("time_mix_key", "time_decay")),
    ],
)
def test_vectors_of_two_dimensions_are_not_decayed(kind: str, fields: dict[str, Any], ends: tuple[str, ...]) -> None:
    decayed, kept = groups(kind, **fields)
    assert not [name for name in decayed if name.endswith(ends)]
    for end in ends:
        assert [name for name in kept if name.endswith(end)], end
    assert [name for name in decayed if "embed" in name]


def test_further_parameters_are_left_out_by_pattern() -> None:
    decayed, kept = groups("llama", "*embed_tokens*", "lm_head.*")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(kept)
    assert not any("embed" in name for name in decayed)
    with pytest.raises(ConfigError, match=r"no parameter is named 'embed_token'; .*model\.embed_tokens\.weight"):
        groups("llama", "embed_token")


def test_the_plan_shows_both_groups_and_refuses_a_pattern_before_a_word() -> None:
    said = vernier("plan", TINY, "optimizer.no_decay=['*embed*']", "--flops", "1e12").stdout
    shown = [line for line in said.splitlines() if "decays: " in line or "does not: " in line]
    assert len(shown) == 2
    assert max(map(len, shown)) <= 80
    assert "15 tensors" in shown[0]
    assert "embed_tokens.weight" in shown[1]
    refused = vernier("plan", TINY, "optimizer.no_decay=['embed']", code=2)
    assert not refused.stdout
    assert "optimizer.no_decay: no parameter is named 'embed'" in refused.stderr
