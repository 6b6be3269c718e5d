"""The settings that decide what is prepared: those of a config, and those that a data set was prepared with."""

from __future__ import annotations

from typing import Any

from configs.schema import Config
from eval.reference.tokenizer import tokenizer_fingerprint


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that decide what is prepared. A given tokenizer counts by content, so it may move."""
    data, given = config.data, config.data.tokenizer
    source = [data.source] if isinstance(data.source, str) else list(data.source)
    return {
        "objective.name": config.objective.name,
        "data.packing": config.packing,
        "seed": config.seed,
        "sequence_length": config.sequence_length,
        "data.source": source,
        "data.text_field": data.text_field,
        "data.prompt_field": data.prompt_field,
        "data.max_bytes": data.max_bytes,
        "data.tokenizer": None if given is None else tokenizer_fingerprint(given),
        "data.vocab_size": data.vocab_size if given is None and not data.characters else None,
        **({"data.characters": True} if data.characters else {}),
        **_of_objective(config),
        **{f"reference.{k}": v for k, v in config.reference.model_dump(mode="json").items()},
    }


def settings_in(facts: dict[str, Any]) -> dict[str, Any]:
    """Those that `facts` (of `dataset.json`) tell; what an earlier version prepared could be nothing else than text in
    a stream."""
    return {"objective.name": "causal", "data.packing": "stream", **facts.get("settings", {})}


def _of_objective(config: Config) -> dict[str, Any]:
    """The settings that decide what an objective prepares, beside those that all have."""
    data, objective = config.data, config.objective
    match objective.name:
        case "instruct":
            return {"data.messages_field": data.messages_field, "data.tools_field": data.tools_field}
        case "classify":
            own = {"objective.problem": objective.problem, "objective.labels": objective.labels}
            return {"data.label_field": data.label_field, **own}
        case _:
            return {}
