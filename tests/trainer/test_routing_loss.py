"""A mixture of experts is trained on what transformers trains it on, told apart from the language's loss."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, losses, vernier

from configs.errors import ConfigError
from trainer.model import TrainableLM

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ROUTED = {**FIELDS, "output_router_logits": True, "router_aux_loss_coef": 0.5}


def model_of(kind: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=512, pad_token_id=None, **fields))


def given(fields: dict[str, Any]) -> str:
    return "model=" + json.dumps({"type": "mixtral", **fields})


def test_the_loss_per_token_is_transformers_own() -> None:
    lm = model_of("mixtral", **ROUTED)
    ids = torch.randint(0, 512, (2, 65))
    trained = TrainableLM(lm)
    loss = trained(ids[:, :-1], ids[:, 1:])
    own = lm(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False)
    assert loss.item() / 128 == pytest.approx(own.loss.item(), rel=1e-6)
    assert trained.routing is not None
    assert float(trained.routing) / 128 == pytest.approx(own.aux_loss.item(), rel=1e-6)
    loss.backward()
    assert float(lm.model.layers[0].mlp.gate.weight.grad.abs().sum()) > 0


def test_metrics_have_both_losses_and_scores_the_languages_alone(tiny_data: Path, tmp_path: Path) -> None:
    runs = {}
    for name, fields in {"routed": ROUTED, "plain": FIELDS}.items():
        runs[name] = tmp_path / name
        short = ["steps=4", "checkpoint.every=4", "snapshot.every=4", f"run.dir={runs[name]}", f"data.dir={tiny_data}"]
        vernier("train", TINY, *short, given(fields))
    first = {name: json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for name, run in runs.items()}
    assert first["routed"]["loss"] == pytest.approx(first["plain"]["loss"], rel=1e-6)
    assert 1.9 < first["routed"]["router_aux_loss"] < 4.0
    assert "router_aux_loss" not in first["plain"]
    assert first["routed"]["grad_norm"] != pytest.approx(first["plain"]["grad_norm"], rel=1e-3)
    assert losses(runs["routed"])[-1] < 6.3


def test_a_weight_without_effect_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    at = [f"run.dir={tmp_path / 'run'}", f"data.dir={tiny_data}"]
    refused = vernier("train", TINY, *at, given({**FIELDS, "router_aux_loss_coef": 0.5}), code=2)
    assert "model.router_aux_loss_coef: has no effect without model.output_router_logits: true" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_would_be_left_out_is_refused() -> None:
    lm = model_of("llama", **{k: v for k, v in FIELDS.items() if "expert" not in k})
    own = lm.forward

    def with_more(input_ids: Any = None, labels: Any = None, **others: Any) -> Any:
        out = own(input_ids=input_ids, labels=labels, **others)
        if out.loss is not None:
            out.loss = out.loss + 0.1
        return out

    lm.forward = with_more
    with pytest.raises(ConfigError, match="is trained by transformers on more than its tokens' negative log"):
        TrainableLM(lm)
