"""A snapshot of adapters (LoRA) as peft's own files: the adapters, how they were made, and to which base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config
from trainer.checkpoint.warm_start import find_step

_NAME = "default"  # of the one adapter, which peft puts into names


def has_adapter(lm: Any) -> bool:
    """Whether adapters are trained in place of the weights."""
    return bool(getattr(lm, "peft_config", None))


def base_of(config: Config) -> Path:
    """The model directory that adapters are trained beside.

    Raises:
        ConfigError: it is a step of a run, whose weights may be in a checkpoint.
    """
    path = config.model.path
    if path is None or find_step(path) is not None:
        raise ConfigError(f"lora: model.path: {path}: give a model's directory, such as RUN/snapshots/step-00001000")
    return path


def peft_name(name: str) -> str:
    """What a trained tensor is called in peft's own files."""
    return "base_model.model." + name.replace(f".{_NAME}.", ".").replace(".modules_to_save", "")


def write_adapter_config(part: Path, model: Any, base: Path) -> None:
    """Writes what peft reads beside an adapter."""
    asked = model.peft_config[_NAME]
    asked.base_model_name_or_path = str(base)
    asked.inference_mode = True
    asked.save_pretrained(part)
