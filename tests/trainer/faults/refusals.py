"""Ranks for test_guards.py: what a refused update leaves behind, at every stage. Prints a JSON line a case.

Each case trains two engines from the same weights. One has a batch more than the other; its update is refused.
"""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig

from configs.load import load_config
from eval.distributed.ranks import join, leave, set_determinism
from trainer.engine import zero_state
from trainer.engine.build import grad_norm_before_step, import_deepspeed, make_engine
from trainer.model.build import make_model
from trainer.objectives import TrainableLM

BATCHES = 4
REFUSED = 2


def weights(engine) -> dict[str, torch.Tensor]:
    found = {}
    for fragment in zero_state.fragments(engine):
        for kind, value in zero_state.values(engine, fragment).items():
            found[f"{kind}/{fragment.name}"] = value.clone()
    for name, parameter in zero_state.trainable(engine):
        found[name] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step(engine, batch: int, accumulation: int, rank: int, *, refuse: bool = False, factor: float = 1.0) -> None:
    """One global batch of windows of its own for each rank and micro-batch."""
    for micro in range(accumulation):
        draw = torch.Generator().manual_seed(100 * batch + 10 * micro + rank)
        block = torch.randint(0, 64, (2, 17), generator=draw)
        loss = engine(block[:, :-1].contiguous(), block[:, 1:].contiguous()) * factor
        engine.backward(loss / 32)
        if engine.is_gradient_accumulation_boundary():
            norm = grad_norm_before_step(engine)
            refuse |= norm is not None and not bool(torch.isfinite(norm))
            if refuse:
                zero_state.refuse_update(engine)
        engine.step()


def case(
    ranks, recipe: str, stage: int, precision: str, offload: str, accumulation: int, more: dict, fault: str
) -> dict:
    settings = [f"zero.stage={stage}", f"zero.offload={offload}"]
    settings += [f"batch.global={2 * accumulation * ranks.world}", "batch.micro=2", "sequence_length=16", "steps=9"]
    config = load_config(Path(recipe), settings).model_copy(update={"deepspeed": more, "precision": precision})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf = LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    engine, _ = make_engine(config, TrainableLM(make_model(config, hf)), ranks.world)
    other, _ = make_engine(config, TrainableLM(make_model(config, hf)), ranks.world)
    out: dict = {"stage": stage, "precision": precision, "offload": offload, "accumulation": accumulation}
    out |= {"fault": fault, "more": more}
    for batch in range(REFUSED):
        step(engine, batch, accumulation, ranks.rank)
        step(other, batch, accumulation, ranks.rank)
    before, counted, scale = weights(engine), zero_state.counters(engine), zero_state.loss_scale_state(engine)
    out["alike_before"] = same(before, weights(other))
    factor = float("nan") if fault == "nan" else 1.0
    step(engine, REFUSED, accumulation, ranks.rank, refuse=fault == "refuse", factor=factor)
    now = zero_state.counters(engine)
    out["applied"] = engine.was_step_applied()
    out["unchanged"] = same(before, weights(engine))
    out["scale_kept"] = scale == zero_state.loss_scale_state(engine)
    out["skipped"] = now["skipped_steps"] - counted["skipped_steps"]
    out["counted"] = now["global_steps"] - counted["global_steps"]
    out["follows"] = []
    for batch in range(REFUSED + 1, BATCHES + 1):
        step(engine, batch, accumulation, ranks.rank)
        step(other, batch, accumulation, ranks.rank)
        out["follows"].append(engine.was_step_applied() and same(weights(engine), weights(other)))
    out["really_moved"] = not same(before, weights(engine))
    return out


def main(arguments: list[str]) -> None:
    ranks = join(1)
    set_determinism(True)
    import_deepspeed().accelerator.get_accelerator().is_fp16_supported = lambda: True  # it is, if slow, for torch
    cases = [(s, p, "none", 2, {}, "refuse") for s in (0, 1, 2, 3) for p in ("fp32", "amp", "bf16", "fp16")]
    cases += [(s, p, "none", 1, {}, "refuse") for s, p in ((0, "fp32"), (2, "bf16"), (3, "fp32"))]
    cases += [(s, "fp32", "cpu", 2, {}, "refuse") for s in (1, 2, 3)]
    cases += [(1, "bf16", "none", 2, {"data_types": {"grad_accum_dtype": "fp32"}}, "refuse")]
    cases += [(0, p, "none", 2, {}, "nan") for p in ("fp32", "amp")]
    for one in cases:
        out = case(ranks, arguments[0], *one)
        out["good_everywhere"] = ranks.all_true(out["unchanged"] and all(out["follows"]) and not out["applied"])
        if ranks.is_rank_zero:
            print(json.dumps(out), flush=True)
    leave()
