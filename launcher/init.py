"""`vernier init`: a starter config in which every key stands with its default and what it means."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from configs.errors import ConfigError
from configs.files.opening import open_to_write
from configs.files.paths import path_problems
from configs.load import recipes
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


def run_init(directory: Path, recipe: str | None = None, data: str | None = None, model: str | None = None) -> Path:
    """Writes `vernier.yaml` into `directory`, or `RECIPE.yaml`; gives its path. Never overwrites.

    Args:
        recipe: one that is shipped; None: every key with its default.
        data: what `data.source` is, where it is left open.
        model: the model directory, where a recipe leaves that open.

    Raises:
        ConfigError: there is one already, the folder cannot be had, or there is no such recipe.
    """
    text = HEAD.format(file="vernier.yaml") + "\n".join(_lines(Config, "")) + "\n"
    if recipe is not None:
        if recipe not in recipes():
            raise ConfigError(f"init: --recipe: {recipe} is none of {', '.join(recipes())}")
        text = recipes()[recipe].read_text(encoding="utf-8")
    text = _filled(text, "--data", data, ("path/to/data", "path/to/texts", "reddit_wsb.csv"))
    text = _filled(text, "--model", model, ("path/to/model",))
    path = directory / f"{recipe or 'vernier'}.yaml"
    if path.exists() or path.is_symlink():
        raise ConfigError(f"init: {path} is there already; remove it, or name another directory")
    problems = list(path_problems("init", directory))
    if problems:
        raise ConfigError(*problems)
    directory.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_to_write(path, os.O_WRONLY | os.O_EXCL), "w", encoding="utf-8") as file:
        file.write(text)
    return path


def _filled(text: str, option: str, given: str | None, open_places: tuple[str, ...]) -> str:
    """A config with a path put in where its settings leave one open; comments stay.

    Raises:
        ConfigError: it leaves none open.
    """
    if given is None:
        return text
    quoted = json.dumps(str(Path(given).expanduser().absolute()) if Path(given).expanduser().exists() else given)
    lines, done = [], False
    for line in text.splitlines(keepends=True):
        if not line.lstrip().startswith("#"):
            for place in open_places:
                done |= place in line
                line = line.replace(place, quoted)
        lines.append(line)
    if not done:
        raise ConfigError(f"init: {option}: this recipe has no place for it; leave it out, or set it in the file")
    return "".join(lines)


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
