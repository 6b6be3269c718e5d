"""`vernier init`: a starter config in which every key stands with its default and what it means."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from configs.errors import ConfigError
from configs.files.opening import open_to_write
from configs.files.paths import path_problems
from configs.schema import Config, section_of

HEAD = """\
# A training of your own. Keys that are commented out show their defaults.
#   vernier prepare {file}      data: tokenizer, shards, reference set
#   vernier train {file}        train here, with checkpoints scored beside it
# Any key can be given on the command line as well: vernier train {file} optimizer.lr=1e-3
"""

# What a first run needs to be set, in the place of defaults.
CHOSEN: dict[str, Any] = {
    "name": "my-run",
    "steps": 2000,
    "sequence_length": 256,
    "data.source": ["path/to/texts"],
    "model.type": "llama",
    "batch.global": 32,
    "schedule.warmup_steps": 100,
    "checkpoint.every": 200,
    "snapshot.every": 200,
}
MODEL_FIELDS = """\
  hidden_size: 256        # any field of that model's Hugging Face config
  intermediate_size: 768
  num_hidden_layers: 6
  num_attention_heads: 4
  num_key_value_heads: 4
  max_position_embeddings: 256
"""


def run_init(directory: Path) -> Path:
    """Writes `vernier.yaml` into `directory`; gives its path. Never overwrites.

    Raises:
        ConfigError: there is one already, or the folder cannot be had.
    """
    path = directory / "vernier.yaml"
    if path.exists() or path.is_symlink():
        raise ConfigError(f"init: {path} is there already; remove it, or name another directory")
    problems = list(path_problems("init", directory))
    if problems:
        raise ConfigError(*problems)
    directory.mkdir(parents=True, exist_ok=True)
    text = HEAD.format(file=path.name) + "\n".join(_lines(Config, "")) + "\n"
    with os.fdopen(open_to_write(path, os.O_WRONLY | os.O_EXCL), "w", encoding="utf-8") as file:
        file.write(text)
    return path


def _lines(model: type[BaseModel], prefix: str) -> Iterator[str]:
    indent = "  " if prefix else ""
    for name, field in model.model_fields.items():
        key = field.alias or name
        section = section_of(field.annotation)
        if section is not None:
            yield f"\n{key}:"
            yield from _lines(section, f"{key}.")
            if key == "model":
                yield MODEL_FIELDS.rstrip()
            continue
        chosen = CHOSEN.get(prefix + key)
        value = field.get_default(call_default_factory=True) if chosen is None else chosen
        shown = _shown(value)
        comment = f"  # {field.description}" if field.description else ""
        yield f"{indent}{'' if chosen is not None else '# '}{key}: {shown}{comment}"


def _shown(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()
