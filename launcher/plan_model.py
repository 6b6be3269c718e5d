"""The model of a config, as far as a plan goes: its parameters, its activations, what a token computes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.memory import model_shapes
from configs.step_time import Work
from configs.whole import read_json

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class Model:
    """The model that is to be trained, as far as memory goes."""

    name: str
    parameters: int
    notes: tuple[str, ...]
    described: dict[str, Any] = field(default_factory=dict, repr=False)  # its Hugging Face config, as written
    hf: Any = field(default=None, repr=False)  # the same as transformers has it; None: it has no such type


def find_model(config: Config, data: dict[str, Any] | None) -> Model:
    """The model's name and its trained parameters, tied ones once.

    Args:
        data: what `dataset.json` says; None where the data is not prepared yet.

    Raises:
        ConfigError: there is no such model, or it refuses its fields.
    """
    settings = config.model
    notes: list[str] = []
    if settings.path is not None:
        home = settings.path
        if not (home / "config.json").is_file():
            from trainer.weights import find_step  # torch comes with it

            step = find_step(home)
            if step is None:
                raise ConfigError(
                    f"model.path: {home} has no config.json; expected a Hugging Face model directory or RUN@STEP"
                )
            home = step.home
        described = read_json(home / "config.json")
        count = _counted(described)
        if count is None:
            count = _stored_parameters(home)
            notes.append("counted as stored in its safetensors files")
        name = str(described.get("model_type") or settings.path.name)
        return Model(name, count, tuple(notes), described, _hf_of(home))
    facts = data
    if facts is None:
        facts = {"vocab_size": _expected_vocabulary(config), "eos_id": 0}
        if "vocab_size" not in settings.fields:
            notes.append(
                f"{config.data_dir} is not prepared, so its vocabulary is taken to have {facts['vocab_size']:,} "
                f"entries ({'data.tokenizer' if config.data.tokenizer else 'data.vocab_size'})"
            )
    from trainer.model import hf_config  # torch comes with it; a model's defaults are known to transformers alone

    hf = hf_config(settings, facts)
    described = hf.to_dict()
    count = _counted(described)
    return Model(str(settings.type), _built_parameters(hf) if count is None else count, tuple(notes), described, hf)


@dataclass(frozen=True)
class Decay:
    """What weight decay pulls at, and what it does not: tensors, parameters, and a few names of each."""

    tensors: int
    parameters: int
    names: tuple[str, ...]


def decay_of(model: Model, config: Config) -> tuple[Decay, Decay] | None:
    """(decayed, not decayed); None where transformers has no such type.

    Raises:
        ConfigError: a pattern of `optimizer.no_decay` that no parameter has.
    """
    if model.hf is None:
        return None
    from trainer.decay import alike, decay_groups  # torch comes with it
    from trainer.model import built_without_memory

    groups = decay_groups(built_without_memory(model.hf), config.optimizer.no_decay)
    decayed, kept = (Decay(len(group), sum(p.numel() for p in group.values()), tuple(alike(group))) for group in groups)
    return decayed, kept


def work_of(model: Model, sequence_length: int) -> Work:
    """What a token of this model computes; layers and heads that its config does not name count for nothing."""
    text = model.described.get("text_config")
    values: dict[str, Any] = text if isinstance(text, dict) else model.described

    def first(*names: str) -> int:
        return next((int(values[name]) for name in names if isinstance(values.get(name), int)), 0)

    layers, hidden = first("num_hidden_layers", "n_layer"), first("hidden_size", "n_embd")
    heads = first("num_attention_heads", "n_head")
    attention = heads * values["head_dim"] if isinstance(values.get("head_dim"), int) else hidden
    experts, chosen = first("num_local_experts", "num_experts", "n_routed_experts"), first("num_experts_per_tok")
    idle = 0
    if experts > chosen > 0:  # a gated MLP has three matrices
        idle = layers * (experts - chosen) * 3 * hidden * first("moe_intermediate_size", "intermediate_size")
    return Work(max(0, model.parameters - idle), layers, attention, sequence_length)


def model_size(model: Model, config: Config, *, on_gpu: bool) -> Any:
    """The model's `ModelSize`, which finds its activations; None where transformers has no such type."""
    if model.hf is None:
        return None
    from launcher.plan_activations import ModelSize  # torch comes with it

    try:
        whole = model_shapes(model.described).whole_logits
    except ConfigError:
        whole = False
    return ModelSize(
        model.hf,
        sequence_length=config.sequence_length,
        precision=config.precision or "fp32",
        checkpointing=config.gradient_checkpointing,
        whole_logits=whole,
        on_gpu=on_gpu,
    )


def _hf_of(home: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(home, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError):
        return None


def _expected_vocabulary(config: Config) -> int:
    """Entries of the tokenizer that the data will be prepared with."""
    if config.data.tokenizer is None:
        return config.data.vocab_size
    from eval.tokenization import open_tokenizer

    return open_tokenizer(config.data.tokenizer).vocab_size


def _counted(described: dict[str, Any]) -> int | None:
    """Parameters by the sizes in a Hugging Face config; None where that would be an estimate."""
    try:
        shapes = model_shapes(described)
    except ConfigError:
        return None
    return shapes.parameters if shapes.exact else None


def _built_parameters(hf: Any) -> int:
    """Parameters of the model that transformers builds, without memory for any."""
    from trainer.model import built_without_memory

    return sum(parameter.numel() for parameter in built_without_memory(hf).parameters())


def _stored_parameters(directory: Path) -> int:
    """Numbers in the safetensors files of a model directory, from their headers."""
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
