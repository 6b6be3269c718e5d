"""Texts and prompts of JSONL, JSON, CSV, Parquet, Arrow files and saved data sets, by Hugging Face `datasets`.

Nothing is looked up on the network, and nothing is left in a cache.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, DataError, VernierError

_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
_KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
COLUMN_SUFFIXES = frozenset(_KINDS)
ROWS_AT_ONCE = 1000


def is_saved_data_set(path: Path) -> bool:
    """Whether `path` is a folder written by `save_to_disk` of `datasets`."""
    whole = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return whole or (path / "dataset_dict.json").is_file()


def rows_of_file(path: Path, text_field: str, prompt_field: str | None = None) -> Iterator[tuple[str, str]]:
    """(text, prompt) of each row of a file, in its order; "" for what a row lacks.

    Raises:
        ConfigError: no such column; names those there are.
        DataError: the file is broken.
        UnicodeDecodeError: it is not UTF-8.
    """
    datasets = _library()
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if path.stat().st_size == 0:
        return
    try:
        # Streamed: no cache, and rows whose other columns differ in type do no harm.
        rows = datasets.load_dataset(
            _KINDS[path.suffix.lower()],
            data_files=[glob.escape(str(path.absolute()))],
            split="train",
            streaming=True,
            **options,
        )
        yield from _texts(rows.iter(ROWS_AT_ONCE), str(path), text_field, prompt_field)
    except (VernierError, UnicodeDecodeError):
        raise
    except Exception as error:  # readers of four formats, each with errors of its own
        cause = _unicode_error(error)
        if cause is not None:
            raise cause from None
        raise _broken(path, error) from error


def rows_of_saved(path: Path, text_field: str, prompt_field: str | None = None) -> Iterator[tuple[str, str]]:
    """(text, prompt) of each row of a data set saved with `save_to_disk`, its splits in the order of their names.

    Raises:
        ConfigError: no such column; names those there are.
        DataError: it cannot be loaded.
    """
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise _broken(path, error) from error
    splits = [loaded[name] for name in sorted(loaded)] if isinstance(loaded, dict) else [loaded]
    for split in splits:
        wanted = _wanted(text_field, prompt_field)
        for setting, column in wanted.items():
            if column not in split.column_names:
                raise _no_column(str(path), setting, column, split.column_names)
        columns = list(dict.fromkeys(wanted.values()))
        yield from _texts(split.select_columns(columns).iter(ROWS_AT_ONCE), str(path), text_field, prompt_field)


def _wanted(text_field: str, prompt_field: str | None) -> dict[str, str]:
    """The column that each setting names."""
    return {"text_field": text_field} | ({} if prompt_field is None else {"prompt_field": prompt_field})


def _texts(
    batches: Iterable[dict[str, list[Any]]], name: str, text_field: str, prompt_field: str | None
) -> Iterator[tuple[str, str]]:
    wanted = _wanted(text_field, prompt_field)
    found: set[str] = set()
    for batch in batches:
        missing = [None] * len(next(iter(batch.values()), ()))
        values = {}
        for setting, column in wanted.items():
            if column in batch:
                found.add(setting)
            elif setting not in found:  # later parts of a JSONL file may lack a key that is rare
                raise _no_column(name, setting, column, batch)
            values[setting] = [_text(value, name, setting, column) for value in batch.get(column, missing)]
        yield from zip(values["text_field"], values.get("prompt_field", [""] * len(missing)), strict=True)


def _text(value: Any, name: str, setting: str, column: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"data.{setting}: {column!r} of {name} holds {type(value).__name__}, not text")
    return value or ""


def _no_column(name: str, setting: str, column: str, there_are: Iterable[str]) -> ConfigError:
    columns = ", ".join(sorted(map(str, there_are))) or "none"
    return ConfigError(f"data.{setting}: {name} has no column {column!r}; its columns are: {columns}")


def _broken(path: Path, error: BaseException) -> DataError:
    while error.__cause__ is not None:
        error = error.__cause__
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"data.source: {path} cannot be read: {said}")


def _unicode_error(error: BaseException | None) -> UnicodeDecodeError | None:
    while error is not None:
        if isinstance(error, UnicodeDecodeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _library() -> Any:
    # Before the first import: the library asks the hub for its packaged readers otherwise.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    return datasets
