"""What a scalar of YAML is depends on the field that it is for: texts take it to the letter, numbers its value."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from configs.errors import ConfigError
from configs.yaml.text import Plain, reads_as_number


def as_declared(told: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """What `parse_yaml` gave, with each scalar as the field of `model` that it is for takes it.

    null and nothing at all stay None even for a text: whether `A:` means an empty text, the word or nothing, nobody can
    tell, so a text that must be there refuses it.

    Raises:
        ConfigError: a line for each that would be another number than one thinks, or that readers of YAML take for
            different things where it is passed through.
    """
    problems: list[str] = []
    taken = _taken(told, model, "", problems)
    if problems:
        raise ConfigError(*problems)
    return dict(taken)


def _taken(value: Any, annotation: Any, key: str, problems: list[str]) -> Any:
    kinds = list(_kinds(annotation))
    if isinstance(value, dict):
        return {
            name: _taken(one, _of_key(kinds, name), f"{key}.{name}".lstrip("."), problems)
            for name, one in value.items()
        }
    if isinstance(value, list):
        item = _argument(kinds, (list, tuple), 0)
        return [_taken(one, item, f"{key}.{place}", problems) for place, one in enumerate(value)]
    if value is None or not isinstance(value, (Plain, str)):
        return value
    if any(_is_text(kind) for kind in kinds):
        return str(value)
    if isinstance(value, Plain) and isinstance(value.value, bool) and any(get_origin(one) is Literal for one in kinds):
        return value.text  # pydantic would find true among 0, 1, 2
    if isinstance(value, str):
        # pydantic would take '0644' for 644; a quoted '480' stays welcome.
        if _is_number(kinds) and not reads_as_number(value):
            problems.append(_no_number(key, value, kinds))
        return value
    if _is_number(kinds) and isinstance(value.value, (str, bool)):  # and true for 1
        problems.append(_no_number(key, value.text, kinds))
    elif Any in kinds and isinstance(value.value, str):
        problems.append(
            f"{key}: {value.text!r} is text to some readers of YAML and not to others; quote it if it is text, "
            "else write true, false or a plain number"
        )
    return value.value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a field's type: `Annotated[str, …] | None` gives str and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _kinds(one)
    else:
        yield annotation


def _is_text(kind: Any) -> bool:
    return kind in (str, Path) or (get_origin(kind) is Literal and all(isinstance(one, str) for one in get_args(kind)))


def _is_number(kinds: list[Any]) -> bool:
    return int in kinds or float in kinds


def _no_number(key: str, text: str, kinds: list[Any]) -> str:
    wanted = (
        "integer, written plainly, such as 1000" if int in kinds else "number, written plainly, such as 0.1 or 3e-4"
    )
    return f"{key}: {text!r} should be a valid {wanted}"


def _of_key(kinds: list[Any], name: str) -> Any:
    """The type of what a section or dictionary of one of these kinds has under that name."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = {field.alias or own: field for own, field in kind.model_fields.items()}
            unknown = Any if kind.model_config.get("extra") == "allow" else object  # object: it will be refused
            return fields[name].annotation if name in fields else unknown
    return _argument(kinds, (dict,), 1)


def _argument(kinds: list[Any], origins: tuple[Any, ...], place: int) -> Any:
    """The type in that place of the first of these kinds that has one of the origins: of list[str], str."""
    for kind in kinds:
        if get_origin(kind) in origins:
            return get_args(kind)[place]
    return Any if Any in kinds else object
