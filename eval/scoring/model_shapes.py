"""The sizes of a causal LM as transformers builds it: on torch's meta device, where tensors have shapes and no memory.

Parameters are counted on the model itself, so every type that transformers builds is counted right. Only what no tensor
says (heads, how many experts a token goes through) is read from its config.
"""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.memory.scoring import ModelShapes
from eval.scoring.models import KINDS, auto_model, quiet_libraries, why

# What the types call the same thing. A name that most configs have comes first.
WIDTH = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
AFTER_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # gemma2, granite, cohere


def on_meta(hf: Any, kind: str = "causal", *, trust_remote_code: bool = False) -> Any:
    """The model, of one of `KINDS`, of a Hugging Face config. Every tensor has a shape and no memory.

    Raises:
        ConfigError: transformers cannot build it; why, and what to do.
    """
    own = copy.deepcopy(hf)  # it is written to
    try:
        with quiet_libraries(), torch.device("meta"):
            return auto_model(kind).from_config(own, trust_remote_code=trust_remote_code)
    except Exception as error:  # each model class raises its own kinds
        what_to_do = ", or take another model" if isinstance(error, ImportError) else "; check its fields"
        raise ConfigError(
            f"model: transformers cannot build type {hf.model_type} as a {KINDS[kind][1]}: {why(error)}{what_to_do}"
        ) from None


def model_shapes(model: Any) -> ModelShapes:
    """The sizes of a causal LM that transformers has built, on any device. Weights that are tied count once."""
    text = model.config.get_text_config()
    layers = repeated_layers(model)
    total = _count(model)
    rows, columns = model.get_input_embeddings().weight.shape
    hidden = _size(text, "hidden_size") or int(columns)
    heads = _size(text, "num_attention_heads")
    width = max(_size(text, "head_dim"), _size(text, "qk_head_dim")) or hidden // max(1, heads)
    return ModelShapes(
        parameters=total,
        active=total - _idle(model, text),
        outside=total - _count(layers),
        layer=max((_count(layer) for layer in layers), default=0),
        layers=_size(text, "num_hidden_layers") or len(layers),
        hidden=hidden,
        vocabulary=_size(text, "vocab_size") or int(rows),
        query=heads * width,
        key=(_size(text, "num_key_value_heads") or heads) * width,
        mlp=_mlp(text, layers, hidden),
        stored_heads=heads if text._attn_implementation == "eager" else 0,
        whole_logits=any(getattr(text, name, None) not in (None, 1, 1.0) for name in AFTER_THE_HEAD),
    )


def repeated_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """A model's repeated layers: the list of modules that has most of it (its experts are lists inside); or none."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=_count, default=torch.nn.ModuleList())


def stored_parameters(directory: Path) -> int:
    """Numbers in the safetensors files of a model directory, from their headers.

    Raises:
        ConfigError: it has no such files, or one is not readable.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path: {directory} has no safetensors files; expected a Hugging Face model directory")
    total = 0
    for path in files:
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
            raise ConfigError(f"model.path: {path} is no safetensors file; expected a header of tensors") from None
    return total


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _size(text: Any, *names: str) -> int:
    """The first of these sizes that a config has; the largest where layers differ; 0 where it has none."""
    for name in names:
        try:
            found = getattr(text, name, None)
        except RuntimeError:  # transformers refuses to name one where layers have their own
            found = [getattr(layer, name, None) for layer in text.per_layer_config]
        sizes = [size for size in (found if isinstance(found, list) else [found]) if isinstance(size, int) and size > 0]
        if sizes:
            return max(sizes)
    return 0


def _idle(model: torch.nn.Module, text: Any) -> int:
    """Parameters of the experts that a token does not go through; 0 where the config does not say how many it does."""
    experts, chosen = _size(text, *EXPERTS), _size(text, *CHOSEN)
    return _in_experts(model, experts) * (experts - chosen) // experts if experts > chosen > 0 else 0


def _in_experts(module: torch.nn.Module, experts: int) -> int:
    """Parameters of the experts that tokens are sent to: one tensor for all of a layer's, or a list of modules."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if "experts" in name.split(".") or (parameter.dim() == 3 and len(parameter) == experts)
    )


def _mlp(text: Any, layers: torch.nn.ModuleList, hidden: int) -> int:
    """Numbers of a token that an MLP keeps at its fullest.

    Gate, up and their product are three times its width; four times where gate and up are made as one, and of a
    tanh-GELU made in parts (fewer of others). Experts make gate and up as one: their width is a third of an expert's
    parameters ÷ hidden. It counts for each that a token goes through, with its input, and with what they add up to.
    """
    width, experts, chosen = _size(text, *WIDTH) or 4 * hidden, _size(text, *EXPERTS), _size(text, *CHOSEN)
    matrices = [parameter.shape for parameter in layers[0].parameters()] if len(layers) else []
    gated = sum(width in shape for shape in matrices if len(shape) == 2) >= 3
    plain = (3 if gated else 4) * width
    expert = max((_in_experts(layer, experts) for layer in layers), default=0) // max(1, experts)
    return max(plain, chosen * (4 * expert // (3 * hidden) + hidden) + hidden) if expert else plain
