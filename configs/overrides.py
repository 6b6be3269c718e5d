"""Settings put over settings: a file's over those it extends, and `key=value` of the command line over both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config, section_of
from configs.yaml_text import parse_yaml


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put in, section by section."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def settings_merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merged`, but another kind of model takes the place of the one beneath with all its fields."""
    before, now = base.get("model"), over.get("model")
    if isinstance(before, dict) and isinstance(now, dict):
        kind = now.get("type", before.get("type"))
        if now.get("path") is not None or kind != before.get("type"):
            base = {key: value for key, value in base.items() if key != "model"}
    return merged(base, over)


def sections() -> set[str]:
    """The keys of a config that hold settings of their own: optimizer, model, …"""
    return {(field.alias or name) for name, field in Config.model_fields.items() if section_of(field.annotation)}


def apply_overrides(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`mapping` with `optimizer.lr=3e-4` and the like applied; the values are read as YAML.

    Raises:
        ConfigError: one is no key=value.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: expected key=value, such as optimizer.lr=3e-4")
        value = parse_yaml(text, key)
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        mapping = settings_merged(mapping, nested)
    return mapping
