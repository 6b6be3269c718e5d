"""A model's sizes are those of what transformers builds, whatever its type."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import ConfigError, DataError
from eval.scoring.model_shapes import model_shapes, on_meta, repeated_layers, stored_parameters
from eval.scoring.models import load_for_scoring, read_config

TINY = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**TINY, "intermediate_size": 64, "num_key_value_heads": 2}
DEEPSEEK = {
    **{**GATED, "num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1},
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16},
    **{"n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
}


def shapes_of(kind: str, **fields: Any) -> Any:
    return model_shapes(on_meta(AutoConfig.for_model(kind, **fields)))


@pytest.mark.parametrize(
    ("kind", "fields", "published"),
    [  # the counts that their papers and model cards give; types' defaults are those models
        ("opt", {}, 125_239_296),
        ("phi", {}, 1_418_270_720),
        ("falcon", {}, 6_921_720_704),
        ("gpt2", {}, 124_439_808),
        ("gpt_neox", {}, 20_554_567_680),
        ("mixtral", {}, 46_702_792_704),
        ("deepseek_v3", {}, 671_026_404_352),
        ("mamba", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}, 129_135_360),
    ],
)
def test_published_models_have_the_parameters_they_are_named_for(
    kind: str, fields: dict[str, Any], published: int
) -> None:
    assert shapes_of(kind, **fields).parameters == published


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", GATED),
        ("llama", {**GATED, "tie_word_embeddings": True}),
        ("opt", {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 16}),
        ("bloom", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("mamba", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}),
        ("deepseek_v3", DEEPSEEK),
    ],
)
def test_layers_and_what_is_outside_them_are_all_of_a_model(kind: str, fields: dict[str, Any]) -> None:
    config = AutoConfig.for_model(kind, **fields)
    real, shapes = AutoModelForCausalLM.from_config(config), model_shapes(on_meta(config))
    assert shapes.parameters == sum({id(p): p.numel() for p in real.parameters()}.values())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in repeated_layers(real)]
    assert len(layers) == shapes.layers == fields.get("num_hidden_layers", 2)
    assert shapes.layer == max(layers)
    assert shapes.outside == shapes.parameters - sum(layers)


def test_a_token_goes_through_some_of_the_experts() -> None:
    plain = shapes_of("llama", **GATED)
    assert plain.active == plain.parameters
    expert = 3 * 32 * 64
    mixed = shapes_of("mixtral", **GATED, num_local_experts=4, num_experts_per_tok=1)
    assert mixed.parameters - mixed.active == 2 * 3 * expert
    seek = shapes_of("deepseek_v3", **DEEPSEEK)  # one dense layer; the shared expert is for every token
    assert seek.parameters - seek.active == 2 * 6 * 3 * 32 * 16
    assert 36e9 < shapes_of("deepseek_v3").active < 38e9  # "37B activated for each token", arXiv 2412.19437
    unsaid = shapes_of("deepseek_v3", **{**DEEPSEEK, "num_experts_per_tok": None})
    assert unsaid.active == unsaid.parameters


def test_experts_in_lists_count_as_those_in_one_tensor_and_are_not_the_layers() -> None:
    from eval.scoring.model_shapes import _in_experts

    def layer() -> torch.nn.ModuleDict:
        experts = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(16))
        return torch.nn.ModuleDict({"router": torch.nn.Linear(8, 16), "experts": experts})

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer(), layer()])})
    assert repeated_layers(model) is model["layers"]
    assert _in_experts(model, 16) == 2 * 16 * 64


def test_sizes_that_layers_have_of_their_own_are_the_largest() -> None:
    shapes = shapes_of("gemma4_text")  # transformers refuses to say one width of a head for all layers
    assert shapes.query > 0
    assert shapes.parameters > shapes.active - 1


def test_nothing_is_drawn_at_random() -> None:
    before = torch.get_rng_state()
    shapes_of("llama", **GATED)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_built_is_said_in_one_line_with_what_to_do(tmp_path: Path) -> None:
    for kind, message in (
        ("t5", "cannot build type t5 as a causal LM: "),
        ("nemotron", "cannot build type nemotron .*; check its fields"),
        (
            "gemma3n",
            "requires the timm library .*; install what it asks for, or take another model",
        ),  # timm, which is not among our dependencies
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            shapes_of(kind)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
    with pytest.raises(DataError, match="--trust-remote-code") as refused:
        read_config(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_model_whose_package_is_missing_is_not_loaded_in_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3n").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match=r"cannot load it as a causal LM: .*; install what it asks for") as caught:
        load_for_scoring(tmp_path, "fp32", torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_what_is_stored_is_counted_from_the_headers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **GATED, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert stored_parameters(tmp_path) == model_shapes(model).parameters
