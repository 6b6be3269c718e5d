"""What is wanted of a row, and the text, prompt and label that its values make."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import ConfigError
from configs.schema import DataSettings, ObjectiveSettings
from eval.reference.chat import SPEAKER, conversation_text
from trainer.data.rows.refusals import broken


class Row(NamedTuple):
    """What a row holds. A conversation is a text (`eval.reference.chat.conversation_text`), a label too: a name, a
    JSON list of names, or a number. `text` None: null or not there."""

    text: str | None
    prompt: str = ""
    label: str = ""


Values = Mapping[str, Any]


@dataclass(frozen=True)
class Fields:
    """`wanted`: the column that each setting names. `make`: a row of (path, place, value by setting). `only_rows`:
    files without columns have nothing of the kind."""

    wanted: dict[str, str]
    make: Callable[[Path, str, Values], Row]
    only_rows: bool = False


def fields_of(data: DataSettings, objective: ObjectiveSettings) -> Fields:
    """What is read of a row.

    Raises:
        ConfigError: two settings name one column.
    """
    if data.prompt_field == data.text_field:
        raise ConfigError(f"data.prompt_field: {data.prompt_field!r} is data.text_field as well; name another")
    wanted = {"text_field": data.text_field}
    if data.prompt_field is not None:
        wanted["prompt_field"] = data.prompt_field
    match objective.name:
        case "instruct":
            if data.prompt_field is None:
                wanted = {"messages_field": data.messages_field}
            if data.tools_field is not None:
                wanted["tools_field"] = data.tools_field
            return Fields(wanted, _Conversation(wanted), only_rows=True)
        case "classify":
            wanted["label_field"] = data.label_field
            return Fields(wanted, _Labelled(wanted, objective), only_rows=True)
        case _:
            return Fields(wanted, _Plain(wanted))


@dataclass(frozen=True)
class _Plain:
    """A text, and perhaps a prompt to it."""

    wanted: dict[str, str]

    def __call__(self, path: Path, place: str, values: Values) -> Row:
        for setting in ("text_field", "prompt_field"):
            if setting in self.wanted:
                check_text(path, place, setting, self.wanted[setting], values[setting])
        return Row(values["text_field"], values.get("prompt_field") or "")


@dataclass(frozen=True)
class _Conversation:
    """Messages, or a turn of the user and one of the assistant."""

    wanted: dict[str, str]

    def __call__(self, path: Path, place: str, values: Values) -> Row:
        if "messages_field" not in self.wanted:
            row = _Plain({name: self.wanted[name] for name in ("text_field", "prompt_field")})(path, place, values)
            if row.text is None or not row.text.strip():
                return Row(row.text)
            asked = {"role": "user", "content": row.prompt}
            messages: Any = [*([asked] if row.prompt else []), {"role": SPEAKER, "content": row.text}]
        else:
            where = f"data.messages_field: {path}, {place}"
            messages = check_messages(where, _parsed(values["messages_field"]))
        tools = _parsed(values.get("tools_field"))
        return Row(conversation_text(messages, tools))


def check_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """The messages of a conversation.

    Raises:
        ConfigError: they are none; `where` begins it.
    """
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f"{where}, has no messages; expected a list such as "
            '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]; mend that row, or take it out'
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(f"{where}: message {number} has no role; expected system, user, assistant or tool")
    if not any(message["role"] == SPEAKER for message in messages):
        raise ConfigError(f"{where}: no message is the assistant's, so there is nothing to learn; take that row out")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@dataclass(frozen=True)
class _Labelled:
    """A text and its label."""

    wanted: dict[str, str]
    objective: ObjectiveSettings

    def __call__(self, path: Path, place: str, values: Values) -> Row:
        check_text(path, place, "text_field", self.wanted["text_field"], values["text_field"])
        where, given = f"data.label_field: {path}, {place}", values["label_field"]
        if values["text_field"] is None:
            return Row(None)
        if given is None or given == "":
            raise ConfigError(f"{where}, has no label; give it one, or take that row out")
        if self.objective.problem == "regression":
            return Row(values["text_field"], label=_number(where, given))
        if self.objective.problem == "single":
            return Row(values["text_field"], label=self._known(where, given))
        several = _parsed(given)
        if not isinstance(several, list):
            raise ConfigError(f"{where}: {given!r} is no list of labels, which objective.problem: several asks for")
        return Row(values["text_field"], label=json.dumps(sorted({self._known(where, one) for one in several})))

    def _known(self, where: str, given: Any) -> str:
        label = str(given)
        if isinstance(given, (list, dict, float)):
            raise ConfigError(f"{where}: {given!r} is no label; expected a name or a whole number")
        if self.objective.labels is not None and label not in self.objective.labels:
            raise ConfigError(f"{where}: {label!r} is none of objective.labels ({', '.join(self.objective.labels)})")
        return label


def _number(where: str, given: Any) -> str:
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {given!r} is no number, which objective.problem: regression asks for")
    return repr(number)


def _parsed(value: Any) -> Any:
    """A list or mapping as it is, or as the JSON that a text is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def check_text(path: Path, place: str, setting: str, column: str, value: Any) -> None:
    """Refuses what is no text that can be written down. None is: there is none.

    Raises:
        ConfigError: it is something else.
        DataError: it is no Unicode.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(
            f"data.{setting}: {column!r} of {path}, {place}, holds {type(value).__name__}, not text; "
            "name a column of text, or write it as text"
        )
    if not (value.isascii() or _has_utf8(value)):
        raise broken(path, f"{place}: {column!r} holds half of a surrogate pair, which is no character")


def _has_utf8(text: str) -> bool:
    try:
        text.encode()  # "\ud800" of JSON is a string to Python and cannot be written down
    except UnicodeEncodeError:
        return False
    return True
