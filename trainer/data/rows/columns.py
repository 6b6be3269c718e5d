"""Texts and prompts of the rows of JSONL, JSON, CSV, Parquet, Arrow files and saved data sets.

A text is what is written: no reader here guesses that one is a number, a date or a missing value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from trainer.data.rows.arrow_rows import arrow_rows, parquet_rows, saved_rows
from trainer.data.rows.csv_rows import csv_rows
from trainer.data.rows.json_rows import json_rows
from trainer.data.rows.refusals import broken

_Reader = Callable[[Path, Mapping[str, str]], Iterator[tuple[str, tuple[Any, ...]]]]
_READERS: dict[str, _Reader] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
COLUMN_SUFFIXES = frozenset(_READERS)


def is_saved_data_set(path: Path) -> bool:
    """Whether `path` is a folder written by `save_to_disk` of `datasets`."""
    whole = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return whole or (path / "dataset_dict.json").is_file()


def rows_of_file(path: Path, text_field: str, prompt_field: str | None = None) -> Iterator[tuple[str | None, str]]:
    """(text, prompt) of each row of a file, in its order; None for a text that is null or not there.

    Raises:
        ConfigError: no such column; names those there are. Or it holds something else than text.
        DataError: the file is broken.
        OSError: it cannot be opened.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, "rb") as file:  # first: not every reader tells a file that may not be opened from a broken one
        if not file.read(1):
            return
    yield from _texts(_READERS[path.suffix.lower()], path, text_field, prompt_field)


def rows_of_saved(path: Path, text_field: str, prompt_field: str | None = None) -> Iterator[tuple[str | None, str]]:
    """(text, prompt) of each row of a data set saved with `save_to_disk`, its splits in the order of their names.

    Raises:
        ConfigError: as `rows_of_file`.
        DataError: it cannot be loaded.
    """
    return _texts(saved_rows, path, text_field, prompt_field)


def _texts(reader: _Reader, path: Path, text_field: str, prompt_field: str | None) -> Iterator[tuple[str | None, str]]:
    wanted = {"text_field": text_field} | ({} if prompt_field is None else {"prompt_field": prompt_field})
    for place, values in reader(path, wanted):
        for value, (setting, column) in zip(values, wanted.items(), strict=True):
            if value is None:
                continue
            if not isinstance(value, str):
                raise ConfigError(
                    f"data.{setting}: {column!r} of {path}, {place}, holds {type(value).__name__}, not text; "
                    "name a column of text, or write it as text"
                )
            if not (value.isascii() or _has_utf8(value)):
                raise broken(path, f"{place}: {column!r} holds half of a surrogate pair, which is no character")
        yield values[0], (values[1] or "") if len(values) > 1 else ""


def _has_utf8(text: str) -> bool:
    try:
        text.encode()  # "\ud800" of JSON is a string to Python and cannot be written down
    except UnicodeEncodeError:
        return False
    return True
