"""Memory reckoned from a model's sizes is what its forward pass takes, and says where its weights can be held."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.errors import ConfigError
from configs.memory.scoring import ModelShapes, placement, scoring_memory
from eval.scoring.model_shapes import model_shapes, on_meta

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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 1000, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "phi3": SIZES,
    "qwen3": SIZES,
    "olmo2": SIZES,
    "gemma2": {**SIZES, "head_dim": 64},
    "mixtral": {**SIZES, **EXPERTS},
    "qwen3_moe": {**SIZES, **EXPERTS, "moe_intermediate_size": 96},
    "gpt2": GPT2,
    "gpt_neox": {**SIZES, "num_key_value_heads": None},
    "opt": {**SIZES, "num_key_value_heads": None, "ffn_dim": 512, "word_embed_proj_dim": 128},
    "phi": {**SIZES, "num_key_value_heads": None},
    "mpt": {"vocab_size": 1000, "d_model": 128, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
}


def built(kind: str, **sizes: Any) -> ModelShapes:
    from transformers import AutoConfig

    return model_shapes(on_meta(AutoConfig.for_model(kind, **sizes)))


# As their makers publish them, but for what memory does not hang on. Parameters in the name.
QWEN3_0_6B = built(
    "qwen3",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
LLAMA_70B = built(
    "llama",
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
GIB = 1 << 30


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
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_forward_pass_keeps_no_more_than_was_reckoned(kind: str, dtype: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from eval.scoring.models import DTYPES

    config = AutoConfig.for_model(kind, **CAUSAL[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval().requires_grad_(False)
    with Live() as live, torch.no_grad():
        model.get_decoder()(input_ids=torch.randint(0, 1000, (4, 256)), use_cache=False)
    reckoned = scoring_memory(built(kind, **CAUSAL[kind]), dtype, sequence_length=256, batch=4).activations
    assert 0.6 * reckoned < live.peak < 1.1 * reckoned


def test_logits_are_a_chunk_where_the_head_is_all_and_a_sample_where_it_is_not() -> None:
    asked = {"sequence_length": 2048, "batch": 4}
    found = scoring_memory(QWEN3_0_6B, "bf16", **asked)
    chunk = (64 << 20) // 4 // 151936 * 151936 * 4
    assert found.logits == 2 * chunk
    assert scoring_memory(replace(QWEN3_0_6B, whole_logits=True), "bf16", **asked).logits == (
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
    assert shard.gathered == 2 * (2 * 128256 * 8192 + 8192 + 3 * LLAMA_70B.layer)
    assert (shard.activations, shard.logits) == (whole.activations, whole.logits)
    assert shard.total == shard.weights + shard.gathered + shard.activations + shard.logits


def placed(shapes: ModelShapes, device_gib: float, ranks: int) -> str:
    return placement(shapes, "bf16", sequence_length=2048, batch=8, device_bytes=int(device_gib * GIB), ranks=ranks)


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


def test_an_unknown_dtype_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError, match="dtype: 'int3'; expected one of fp32, bf16, fp16"):
        scoring_memory(LLAMA_70B, "int3", sequence_length=8, batch=1)


def test_reckoning_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, configs.memory.scoring; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
