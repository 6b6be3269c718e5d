"""What of a model is trained: all of it, all but what is frozen, or adapters of low rank beside it (LoRA, by peft).

Adapters are put into the model as it is, so that it stays a Hugging Face model; their names are peft's.
"""

from __future__ import annotations

import difflib
import warnings
from fnmatch import fnmatchcase
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config, LoraSettings
from trainer.engine.decay import alike, check_patterns


def as_trained(config: Config, model: Any) -> Any:
    """The model with its adapters, and with what is not trained frozen; changed in place. On the meta device too.

    Raises:
        ConfigError: peft is not installed, targets or patterns match nothing, or nothing is left to train.
    """
    if config.lora.r is not None:
        _inject(config, model)
    if config.freeze:
        _freeze(config.freeze, model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train; take a pattern out")
    return model


def _inject(config: Config, model: Any) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("lora: needs peft, which is not installed; pip install 'vernier-lm[lora]'") from None
    asked = lora_config(config.lora, model, classifies=config.objective.name == "classify")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**asked), model)
    except ValueError as error:
        names = alike(name for name, module in model.named_modules() if hasattr(module, "weight"))
        targets = config.lora.targets
        wanted = targets if isinstance(targets, str) else ", ".join(targets)
        ends = sorted({name.rpartition(".")[2] for name in names})
        near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.3) or ends[:6]
        said = str(error).strip().splitlines()[0]
        if "not found" not in said and "No modules" not in said:
            raise ConfigError(f"lora: peft refuses this: {said}") from None
        raise ConfigError(
            f"lora.targets: no module is named {wanted!r}; expected such as {', '.join(near)}, or all-linear"
        ) from None


def lora_config(lora: LoraSettings, model: Any, *, classifies: bool) -> dict[str, Any]:
    """What peft is told. A classifier's own head is new, and so it is trained as a whole."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    told: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.alpha if lora.alpha is not None else 2 * (lora.r or 1),
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
    }
    if targets == "all-linear":  # peft asks for its own class of model then; so they are named here
        told["target_modules"] = _linear_names(model)
    if classifies:
        told["modules_to_save"] = heads_of(model)
    return told


def heads_of(model: Any) -> list[str]:
    """Modules beside the body of a model: a classifier's own."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _linear_names(model: Any) -> list[str]:
    """Last names of all linear layers but the output head's, sorted."""
    head = model.get_output_embeddings()
    beside = {id(one) for name in heads_of(model) for one in getattr(model, name).modules()}
    kinds = ("Linear", "Conv1D")
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in kinds and module is not head and id(module) not in beside
        }
    )


def _freeze(patterns: list[str], model: Any) -> None:
    check_patterns([name for name, _ in model.named_parameters()], patterns, "freeze")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
