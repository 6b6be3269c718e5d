"""Settings put over settings: a file's over those it extends, and `key=value` of the command line over both."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from configs.console import printable
from configs.errors import ConfigError
from configs.schema import Config, section_of
from configs.yaml.text import parse_yaml


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put in, section by section."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else value
    return out


def settings_merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merged`, but another kind of model takes the place of the one beneath with all its fields.

    A section that stands empty, as one with all its lines commented out does, says nothing: what is beneath it stays.
    """
    before, now = base.get("model"), over.get("model")
    if isinstance(before, dict) and isinstance(now, dict):
        kind = now.get("type", before.get("type"))
        if now.get("path") is not None or kind != before.get("type"):
            base = {key: value for key, value in base.items() if key != "model"}
    said = {key: value for key, value in over.items() if value is not None or key not in sections()}
    return merged(base, said)


def sections() -> set[str]:
    """The keys of a config that hold settings of their own: optimizer, model, …"""
    return {(field.alias or name) for name, field in Config.model_fields.items() if section_of(field.annotation)}


def apply_overrides(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`mapping` with `optimizer.lr=3e-4` and the like applied; the values are read as YAML.

    Raises:
        ConfigError: one is no key=value, or it would throw away settings that it does not name. A whole section
            (`model={type: gpt2, …}`) names what it replaces. `model.path` does as well, and says so.
    """
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: expected key=value, such as optimizer.lr=3e-4")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{key}: {text} has bytes that are no UTF-8, which settings are; rename what it names")
        value = parse_yaml(text, key)
        nested = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        after = settings_merged(mapping, nested)
        lost = _lost(mapping, after, key, emptied=value is None and key in sections())
        if lost and key == "model.path" and value is not None:  # a directory brings its own: that is what it is for
            names = ", ".join(lost)
            told = f"model.path: {value} takes the place of {names} in the config"
            logging.getLogger("vernier").warning(printable(told))
        elif lost:
            raise ConfigError(_loss(key, value, lost))
        mapping = after
    return mapping


def _lost(before: dict[str, Any], after: dict[str, Any], key: str, *, emptied: bool) -> list[str]:
    """The settings that go although `key` does not name them; those in a section that is `emptied` go unnamed too."""
    stay = set(_keys(after))
    if emptied:
        return [name for name in _keys(before) if name.startswith(f"{key}.")]
    return [name for name in _keys(before) if name not in stay and not f"{name}.".startswith(f"{key}.")]


def _keys(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values that are set."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}"


def _loss(key: str, value: Any, lost: list[str]) -> str:
    section, _, leaf = key.partition(".")
    names = ", ".join(name.removeprefix(f"{section}.") for name in lost)
    shown = "null" if value is None else repr(str(value))
    said = f"{key}: {shown} would throw away what the config sets in {section}: {names}"
    if key == "model.type" and value is not None:
        whole = f"model={{{leaf}: {value}, …}}"
        return f"{said}; for another model give it whole, {shlex.quote(whole)}, or in a file that `extends` this one"
    return f"{said}; set each of them to what it should be instead"
