"""`python -m benchmarks.model_kinds [KIND…]`: is what we train what transformers trains?

Every kind of causal LM that transformers knows is made small, with random weights, and its own loss on a few tokens
held against ours (`trainer.model.checked_router_weight`), with and without the auxiliary loss of a router. Kinds that
refuse small sizes, or run with an encoder's mask, are named with the reason.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

MOST_PARAMETERS = 3e7
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "d_ff", "max_position_embeddings", "n_positions"], 96),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "num_local_experts", "num_experts"], 4),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **{"head_dim": 16, "vocab_size": 512, "n_routed_experts": 4, "state_size": 8, "rotary_dim": 8, "is_decoder": True},
    "pad_token_id": None,
}


def tried(kind: str, *, routed: bool) -> str | None:
    """What came out, in words; None where the kind has no router to switch on."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from trainer.model import TrainableLM

    known = set(CONFIG_MAPPING[kind]().to_dict())
    fields = {name: size for name, size in SIZES.items() if name in known}
    if routed:
        if "output_router_logits" not in known:
            return None
        fields["output_router_logits"] = True
    config = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        return "not made small by these settings"
    torch.manual_seed(0)
    model = TrainableLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if not routed:
        return "the same"
    weight = model.router_weight
    return f"the same, the router's loss {weight:g} times" if weight is not None else "the same, no loss of a router"


def main() -> None:
    """Prints a line a kind, and how many agree."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    agree = routers = others = 0
    for kind in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for routed in (False, True):
            try:
                said = tried(kind, routed=routed)
            except Exception as error:  # each config and model class raises its own kinds
                said = f"not tried: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
            if said is None:
                continue
            agree += said == "the same"
            routers += "times" in said
            others += not said.startswith("the same")
            print(f"{kind}{', routed' if routed else ''}: {said}", flush=True)
    print(
        f"{agree} kinds are trained on the loss of transformers, {routers} of them with a router's; {others} not tried"
    )


if __name__ == "__main__":
    main()
