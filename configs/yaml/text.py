"""YAML in and out such that no scalar changes its meaning: the one loader and the one dumper of what users write.

PyYAML reads YAML 1.1, in which 12:00:00 is the number 43200, 0644 is 420, `on` is true and 2024-01-01 a date. Read here
are YAML 1.2's true, false, null and plain decimal numbers; all else is text. What is not text in both keeps the letters
it was written in, for the fields that are texts (`configs.yaml.scalars`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from configs.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_FIRST = list("-+0123456789.")
# 10_000_000 is ten million in Python and in YAML 1.1, and can mean nothing else; 0644 can, so it is no number.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
# Any spelling that a reader of YAML 1.2 takes for a number; those of 1.1 are in PyYAML's own table.
_NUMBER_ELSEWHERE = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class Plain:
    """A scalar that stood without quotes: what it is read as, and how it was written.

    `value` is the text itself where other readers of YAML take it for something else: `no`, `0644`, `1:20`.
    """

    value: bool | int | float | str
    text: str

    def __str__(self) -> str:
        return self.text


class _KeyError(yaml.MarkedYAMLError):
    """A key that cannot be: given twice, or no name."""


class SettingsDumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that also puts those texts into quotes which other readers, ours too, take for numbers: 1e3."""


SettingsDumper.add_implicit_resolver(_TAG + "float", re.compile(f"(?:{_NUMBER_ELSEWHERE.pattern})$"), _FIRST)
SettingsDumper.add_implicit_resolver(_TAG + "bool", re.compile(r"[yYnN]$"), list("yYnN"))  # 1.1 says so, not PyYAML


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared so by PyYAML; not those of YAML 1.1)
    yaml_constructors: ClassVar[dict[str | None, Any]] = {  # and no dates, sets or bytes
        None: yaml.SafeLoader.yaml_constructors[None],
        _TAG + "null": yaml.SafeLoader.yaml_constructors[_TAG + "null"],
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Checks the keys here, where those that `<<` brings are not among them yet."""
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _KeyError(problem="a key should be a name", problem_mark=key.start_mark)
            if key.value in seen:
                said = f"the key {key.value!r} is given twice (before in line {seen[key.value]}); keep one of the two"
                raise _KeyError(problem=said, problem_mark=key.start_mark)
            seen[key.value] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}  # all keys are names

    def construct_list(self, node: yaml.SequenceNode) -> list[Any]:
        return [self.construct_object(one, deep=True) for one in node.value]

    def construct_text(self, node: yaml.ScalarNode) -> str | Plain:
        text = str(self.construct_scalar(node))
        return Plain(text, text) if node.style is None and _is_read_otherwise(text) else text

    def construct_number(self, node: yaml.ScalarNode) -> Plain:
        text = str(self.construct_scalar(node))
        if _INT.fullmatch(text):
            return Plain(int(text.replace("_", "")), text)
        if _FLOAT.fullmatch(text):
            return Plain(float(re.sub(r"\.(?=inf|nan)", "", text.lower())), text)
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} is no plain number", node.start_mark)

    def construct_truth(self, node: yaml.ScalarNode) -> Plain:
        text = str(self.construct_scalar(node))
        if text.lower() not in ("true", "false"):
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not true or false", node.start_mark)
        return Plain(text.lower() == "true", text)


for _kind, _pattern, _letters in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", f"(?:{_INT.pattern})$", _FIRST),
    ("float", f"(?:{_FLOAT.pattern})$", _FIRST),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(_pattern), _letters)
for _kind, _method in (
    ("map", _Loader.construct_mapping),
    ("seq", _Loader.construct_list),
    ("str", _Loader.construct_text),
    ("merge", _Loader.construct_text),  # as a value it merges nothing
    ("int", _Loader.construct_number),
    ("float", _Loader.construct_number),
    ("bool", _Loader.construct_truth),
):
    _Loader.add_constructor(_TAG + _kind, _method)


def _is_read_otherwise(text: str) -> bool:
    """Whether a reader of YAML 1.1 or 1.2 takes the unquoted text for a number, truth, date or the like."""
    table = SettingsDumper.yaml_implicit_resolvers
    return any(pattern.match(text) for _, pattern in (*table.get(text[:1], ()), *table.get(None, ())))


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says: mappings with texts for keys, lists, texts, None, and `Plain` for what stood unquoted.

    Args:
        where: a file or key, for the error.

    Raises:
        ConfigError: it is not YAML, or a mapping has a key twice; with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except _KeyError as error:
        raise ConfigError(f"{where}:{_line(error)}: {error.problem}") from None
    except (ValueError, OverflowError) as error:  # a number of 5,000 digits, "\\UFFFFFFFF"
        raise ConfigError(f"{where}: has a value that cannot be read: {error}; quote it if it is text") from None
    except yaml.YAMLError as error:
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}:{_line(error)} is not YAML: {said}") from None


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """`parse_yaml` of a whole file, which is `key: value` lines, or empty.

    Raises:
        ConfigError: it is something else.
    """
    told = parse_yaml(text, where)
    if told is not None and not isinstance(told, dict):
        found = "a list" if isinstance(told, list) else "a single value"
        raise ConfigError(f"{where}: expected settings as `key: value` lines, found {found}")
    return told or {}


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` and any reader of YAML 1.1 or 1.2 take for the same."""
    return yaml.dump(value, Dumper=SettingsDumper, sort_keys=False, allow_unicode=True)


def as_written(value: Any, *, quoted: bool = True) -> str:
    """A value in a message, as a user would write it: null, true, 'a text', and not Python's None and True."""
    if value is None:
        return "null"
    if isinstance(value, str) and not quoted:
        return value
    return str(value).lower() if isinstance(value, bool) else repr(value)


def reads_as_number(text: str) -> bool:
    """Whether the text, unquoted, is a number here."""
    return bool(_INT.fullmatch(text) or _FLOAT.fullmatch(text))
