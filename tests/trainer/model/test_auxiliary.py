"""What a model adds to its loss is trained and told apart; settings of a model that would do nothing are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, lines, losses, vernier
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import ConfigError
from configs.schema import ModelSettings
from trainer.model.build import check_effects, hf_config
from trainer.objectives import TrainableLM

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5, "pad_token_id": None}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3, "pad_token_id": None},
    "mixtral": {"num_local_experts": 4, **ROUTED},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, **ROUTED},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, **ROUTED},
    "phimoe": {"num_local_experts": 4, **ROUTED},
}


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    fields = {**SMALL, **MODELS.get(kind, {}), **more}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_trained_is_the_models_own_loss(kind: str) -> None:
    lm = made(kind)
    ids_BT = torch.randint(2, 128, (2, 33), generator=torch.Generator().manual_seed(1))
    fed_BT, target_BT = ids_BT[:, :-1], ids_BT[:, 1:].clone()
    model = TrainableLM(lm)
    torch.manual_seed(1)  # phimoe's router is noisy
    ours = model(fed_BT, target_BT) / target_BT.numel()
    ours.backward()
    grads = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    theirs = lm(input_ids=fed_BT, labels=fed_BT, shift_labels=target_BT.contiguous(), use_cache=False).loss
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert model.adds == ("output_router_logits" in MODELS[kind])
    for name, p in lm.named_parameters():
        if p.grad is not None:
            assert torch.allclose(grads[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_a_loss_on_logits_is_trained_too() -> None:
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "pad_token_id": None}
    lm = made("bamba", z_loss_coefficient=0.2, **sizes)
    ids_BT = torch.arange(2, 34).view(2, 16)
    target_BT = torch.cat([ids_BT[:, 1:], torch.full((2, 1), -100)], dim=1)
    model = TrainableLM(lm)
    theirs = lm(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    assert model(ids_BT, target_BT).item() / 30 == pytest.approx(theirs.item(), rel=1e-5)


def test_a_loss_that_is_not_understood_is_refused() -> None:
    lm = made("llama")
    lm.loss_function = lambda logits, labels, vocab_size, **_: 0.9 * logits.logsumexp(-1).mean()
    with pytest.raises(ConfigError, match="by its own code"):
        TrainableLM(lm)


def model_of(*more: str) -> str:
    fields = ["hidden_size: 32", "intermediate_size: 32", "num_hidden_layers: 1", "num_attention_heads: 2"]
    fields += ["num_key_value_heads: 2", "max_position_embeddings: 64"]
    return f"model={{{', '.join([*fields, *more])}}}"


def test_the_routers_loss_is_told_apart_at_any_stage(tiny_data: Path, tmp_path: Path) -> None:
    experts = ["type: mixtral", "num_local_experts: 4", "num_experts_per_tok: 2"]
    on = [*experts, "output_router_logits: true", "router_aux_loss_coef: 0.5"]
    found = []
    for name, model, more in (
        ("one", model_of(*on), ["nproc=1", "batch.micro=8", "zero.stage=0"]),
        ("two", model_of(*on), ["nproc=2", "batch.micro=4", "zero.stage=3", "gradient_checkpointing=true"]),
        ("off", model_of(*experts), ["nproc=1", "batch.micro=8", "zero.stage=0"]),
    ):
        run = tmp_path / name
        common = [TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "batch.global=8", "steps=4"]
        said = vernier("train", *common, model, *more).stderr
        assert ("without the loss that balances" in " ".join(said.split())) == (name == "off")
        found.append([line.get("auxiliary_loss") for line in lines(run / "metrics.jsonl")])
    one, two, off = found
    assert np.allclose(one, 1.0, atol=0.05)  # 0.5 × 2 chosen experts: balanced
    assert np.allclose(one, two, rtol=0.01)  # of other micro-batches, so not the same to the digit
    assert off == [None] * 4
    first = [losses(tmp_path / name)[0] for name in ("one", "two", "off")]
    assert np.allclose(first, first[0], rtol=1e-5)  # the language's alone


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("llama", {"problem_type": "regression"}, "model.problem_type: a llama never reads it"),
        ("llama", {"dtype": "bfloat16"}, "model.dtype: bfloat16 has no effect in training; use precision"),
        ("mixtral", {"output_router_logits": False}, "model.router_aux_loss_coef: 0.5 adds nothing"),
        ("llama", {"rms_norm_eps": 1e-4, "tie_word_embeddings": True, "attention_dropout": 0.1}, None),
        ("qwen3_moe", {}, None),  # its plain MLP's size is of no use, and no harm
    ],
)
def test_fields_without_effect_are_refused(kind: str, fields: dict[str, Any], said: str | None) -> None:
    settings, facts = ModelSettings(type=kind, **{**SMALL, **MODELS[kind], **fields}), {"vocab_size": 128, "eos_id": 0}
    if said is None:
        return check_effects(settings, facts, hf_config(settings, facts))
    with pytest.raises(ConfigError) as refused:
        check_effects(settings, facts, hf_config(settings, facts))
    assert str(refused.value).startswith(said)
