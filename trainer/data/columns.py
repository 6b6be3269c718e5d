"""The text column of JSONL, JSON, CSV, Parquet, Arrow files and saved data sets, by Hugging Face `datasets`.

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


def rows_of_file(path: Path, text_field: str) -> Iterator[str]:
    """The texts of a file, in its order; a row without one gives "".

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
        yield from _texts(rows.iter(ROWS_AT_ONCE), str(path), text_field)
    except (VernierError, UnicodeDecodeError):
        raise
    except Exception as error:  # readers of four formats, each with errors of its own
        cause = _unicode_error(error)
        if cause is not None:
            raise cause from None
        raise _broken(path, error) from error


def rows_of_saved(path: Path, text_field: str) -> Iterator[str]:
    """The texts of a data set saved with `save_to_disk`, all its splits in the order of their names.

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
        if text_field not in split.column_names:
            raise _no_column(str(path), text_field, split.column_names)
        yield from _texts(split.select_columns([text_field]).iter(ROWS_AT_ONCE), str(path), text_field)


def _texts(batches: Iterable[dict[str, list[Any]]], name: str, text_field: str) -> Iterator[str]:
    found = False
    for batch in batches:
        if text_field in batch:
            found = True
        elif not found:  # later parts of a JSONL file may lack a key that is rare
            raise _no_column(name, text_field, batch)
        for value in batch.get(text_field, ()):
            if value is not None and not isinstance(value, str):
                kind = type(value).__name__
                raise ConfigError(f"data.text_field: {text_field!r} of {name} holds {kind}, not text")
            yield value or ""


def _no_column(name: str, text_field: str, there_are: Iterable[str]) -> ConfigError:
    columns = ", ".join(sorted(map(str, there_are))) or "none"
    return ConfigError(f"data.text_field: {name} has no column {text_field!r}; its columns are: {columns}")


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
