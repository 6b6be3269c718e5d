"""Texts and prompts of the rows of JSONL, JSON, CSV, Parquet, Arrow files and saved data sets.

A text is what is written: no reader here guesses that one is a number, a date or a missing value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.rows.arrow_rows import arrow_rows, parquet_rows, saved_rows
from trainer.data.rows.csv_rows import csv_rows
from trainer.data.rows.fields import Fields, Row
from trainer.data.rows.json_rows import json_rows

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


def rows_of_file(path: Path, fields: Fields) -> Iterator[Row]:
    """What each row of a file holds, in its order.

    Raises:
        ConfigError: no such column; names those there are. Or it holds something else than is wanted.
        DataError: the file is broken.
        OSError: it cannot be opened.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, "rb") as file:  # first: not every reader tells a file that may not be opened from a broken one
        if not file.read(1):
            return
    yield from _made(_READERS[path.suffix.lower()], path, fields)


def rows_of_saved(path: Path, fields: Fields) -> Iterator[Row]:
    """What each row of a data set saved with `save_to_disk` holds, its splits in the order of their names.

    Raises:
        ConfigError: as `rows_of_file`.
        DataError: it cannot be loaded.
    """
    return _made(saved_rows, path, fields)


def _made(reader: _Reader, path: Path, fields: Fields) -> Iterator[Row]:
    for place, values in reader(path, fields.wanted):
        yield fields.make(path, place, dict(zip(fields.wanted, values, strict=True)))
