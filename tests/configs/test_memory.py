"""Memory reckoned from a config is that of the model which transformers makes of it."""

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from configs.memory import model_shapes, placement, scoring_memory

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
GPT2 = {"vocab_size": 1000, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "llama, tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "llama, as many key heads": ("llama", {**SIZES, "num_key_value_heads": None}),
    "llama, biases": ("llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {**SIZES, "head_dim": 64}),
    "mistral": ("mistral", SIZES),
    "granite": ("granite", {**SIZES, "logits_scaling": 8.0}),
    "phi3": ("phi3", SIZES),
    "smollm3": ("smollm3", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen2, tied": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES),
    "qwen3, biases": ("qwen3", {**SIZES, "attention_bias": True, "head_dim": 32}),
    "olmo2": ("olmo2", SIZES),
    "gemma": ("gemma", {**SIZES, "head_dim": 64}),
    "gemma2": ("gemma2", {**SIZES, "head_dim": 64}),
    "gemma3": ("gemma3_text", {**SIZES, "head_dim": 64}),
    "mixtral": ("mixtral", {**SIZES, **EXPERTS}),
    "qwen3, experts": ("qwen3_moe", {**SIZES, **EXPERTS}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, narrow and untied": ("gpt2", {**GPT2, "n_inner": 200, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**SIZES, "num_key_value_heads": None}),
    "gpt_neox, tied": ("gpt_neox", {**SIZES, "tie_word_embeddings": True, "attention_bias": False}),
}
# As their makers publish them, but for what memory does not hang on. Parameters in the name.
QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
GIB = 1 << 30


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    kind, sizes = CAUSAL[name]
    return AutoConfig.for_model(kind, **sizes)


@pytest.mark.parametrize("name", CAUSAL)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for written in (config.to_dict(), config.to_diff_dict()):  # in memory, and as config.json has it
        shapes = model_shapes(written)
        assert shapes.parameters == sum(p.numel() for p in model.parameters())
        assert shapes.exact
        assert shapes.layer == sum(p.numel() for n, p in model.named_parameters() if ".1." in n)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_masked_lm(tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    config = AutoConfig.for_model("bert", **sizes, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    assert model_shapes(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_published_models_have_the_parameters_they_are_named_for() -> None:
    assert model_shapes(QWEN3_0_6B).parameters == 596_049_920
    assert model_shapes(LLAMA_70B).parameters == 70_553_706_496


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations make and that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "olmo2", "gemma2", "mixtral", "gpt2", "gpt_neox"])
def test_a_forward_pass_keeps_no_more_than_was_reckoned(name: str, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    from eval.models import DTYPES

    config = config_of(name)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval().requires_grad_(False)
    with Live() as live, torch.no_grad():
        model.get_decoder()(input_ids=torch.randint(0, 1000, (4, 256)), use_cache=False)
    reckoned = scoring_memory(config.to_dict(), dtype, sequence_length=256, batch=4).activations
    assert 0.6 * reckoned < live.peak < 1.1 * reckoned


def test_logits_are_a_chunk_where_the_head_is_all_and_a_sample_where_it_is_not() -> None:
    asked = {"sequence_length": 2048, "batch": 4}
    found = scoring_memory(QWEN3_0_6B, "bf16", **asked)
    chunk = (64 << 20) // 4 // 151936 * 151936 * 4
    assert found.logits == 2 * chunk
    assert scoring_memory({**QWEN3_0_6B, "final_logit_softcapping": 30.0}, "bf16", **asked).logits == (
        2 * chunk + 2 * 2048 * 151936 * 2
    )
    assert scoring_memory(QWEN3_0_6B, "bf16", **asked, logits_bytes=1).logits == 2 * 16 * 151936 * 4
    assert found.weights == 2 * 596_049_920
    assert found.gathered == 0
    assert str(found).startswith("1.5 GiB (weights 1.1 GiB, activations 256.0 MiB")


def test_shards_of_the_weights_leave_what_is_gathered() -> None:
    whole = scoring_memory(LLAMA_70B, "bf16", sequence_length=2048, batch=8)
    shard = scoring_memory(LLAMA_70B, "bf16", sequence_length=2048, batch=8, shards=8)
    assert shard.weights == -(-whole.weights // 8)
    assert shard.gathered == 2 * (2 * 128256 * 8192 + 8192 + 3 * model_shapes(LLAMA_70B).layer)
    assert (shard.activations, shard.logits) == (whole.activations, whole.logits)
    assert shard.total == shard.weights + shard.gathered + shard.activations + shard.logits


def placed(config: dict[str, Any], device_gib: float, ranks: int) -> str:
    return placement(config, "bf16", sequence_length=2048, batch=8, device_bytes=int(device_gib * GIB), ranks=ranks)


def test_weights_are_whole_where_they_fit_and_shards_where_only_together() -> None:
    assert placed(QWEN3_0_6B, 8, 1) == "replicated"
    assert placed(QWEN3_0_6B, 8, 8) == "replicated"
    assert placed(LLAMA_70B, 192, 8) == "replicated"
    assert placed(LLAMA_70B, 80, 4) == "sharded"
    assert placed(LLAMA_70B, 80, 8) == "sharded"


def test_what_does_not_fit_says_how_many_ranks_would_do() -> None:
    with pytest.raises(ConfigError, match=r"80\.0 GiB, of which 10% stays free; 3 ranks would do") as caught:
        placed(LLAMA_70B, 80, 2)
    assert "\n" not in str(caught.value)
    assert placed(LLAMA_70B, 80, 3) == "sharded"
    with pytest.raises(ConfigError, match=r"on 1 rank, .* 3 ranks would do"):
        placed(LLAMA_70B, 80, 1)
    with pytest.raises(ConfigError, match=r"no number of ranks would do, .* reference\.batch \(now 8\)"):
        placed(LLAMA_70B, 8, 64)


def test_what_cannot_be_reckoned_is_said_in_one_line() -> None:
    for config, message in (
        ({"model_type": "llama", "hidden_size": 8}, "num_attention_heads, intermediate_size .*missing"),
        ({}, "nameless"),
        ({**LLAMA_70B, "vocab_size": "many"}, "vocab_size: 'many'; expected a whole number"),
        ({**LLAMA_70B, "model_type": "deepseek_v3", "n_routed_experts": 8}, "n_routed_experts: 8 .*mixtral"),
        ({**LLAMA_70B, **EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [0]}, "experts in every layer"),
        ({**LLAMA_70B, "model_type": "mixtral"}, "num_local_experts or num_experts missing"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            model_shapes(config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="dtype: 'int3'; expected one of fp32, bf16, fp16"):
        scoring_memory(LLAMA_70B, "int3", sequence_length=8, batch=1)


def test_a_type_nobody_told_us_about_is_taken_for_a_llama() -> None:
    found = model_shapes({**LLAMA_70B, "model_type": "brand_new"})
    assert found.parameters == model_shapes(LLAMA_70B).parameters
    assert not found.exact
    inside = model_shapes({"model_type": "seeing", "text_config": LLAMA_70B, "vision_config": {}})
    assert (inside.kind, inside.exact, inside.parameters) == ("llama", False, found.parameters)


def test_reckoning_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, configs.memory; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
