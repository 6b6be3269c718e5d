"""Rows of JSON files, by Python's own reader: a string stays the string that is written, whatever it looks like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.rows.refusals import broken, no_column, not_utf8

_BOM = b"\xef\xbb\xbf"
_MOST_KEYS_NAMED = 100


def json_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(place, value of each wanted column, None where it is null or not there) of each row, in the file's order.

    A row is a line. Where the first line is no object of its own, a row is an object of the list, or of the
    sequence, that the file holds; a list may hold strings instead, which are the column "text".

    Args:
        wanted: the column that each setting names.

    Raises:
        ConfigError: no row has the column.
        DataError: names the broken line.
        UnicodeDecodeError: its reason names the line.
    """
    columns = tuple(wanted.values())
    found: set[str] = set()
    keys: dict[str, None] = {}
    rows = 0
    for place, row in _objects(path):
        rows += 1
        if len(found) < len(columns):
            found.update(column for column in columns if column in row)
            if len(keys) < _MOST_KEYS_NAMED:
                keys.update(dict.fromkeys(row))
        yield place, tuple(map(row.get, columns))
    for setting, column in wanted.items():
        if rows and column not in found:
            raise no_column(path, setting, column, keys)


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    by_line = False
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = (raw.removeprefix(_BOM) if number == 1 else raw).decode()
            except UnicodeDecodeError as error:
                raise not_utf8(error, number) from None
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
                if not by_line:
                    break
                raise broken(path, _said(error), number) from None
            if not isinstance(row, dict):
                if not by_line:
                    break
                raise broken(path, f"{_kind(row)} where an object is expected", number)
            by_line = True
            yield f"line {number}", row
        else:
            return
    yield from _objects_of_whole(path)


def _objects_of_whole(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(error, raw.count(b"\n", 0, error.start) + 1) from None
    decoder, place, number = json.JSONDecoder(), _after_space(text, 0), 0
    while place < len(text):
        line = text.count("\n", 0, place) + 1 if number == 0 else None
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise broken(path, _said(error), error.lineno) from None
        except (ValueError, RecursionError) as error:
            raise broken(path, _said(error), line) from None
        place = _after_space(text, place)
        for row in value if isinstance(value, list) else [value]:
            number += 1
            if isinstance(row, str) and isinstance(value, list):
                row = {"text": row}
            if not isinstance(row, dict):
                raise broken(path, f"row {number} is {_kind(row)} where an object is expected")
            yield f"row {number}", row


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _said(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list"
    return "a string" if isinstance(value, str) else "a number"
