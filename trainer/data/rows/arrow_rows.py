"""Rows of Parquet files, Arrow files and saved data sets: only the columns asked for, typed as the file has them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import VernierError
from trainer.data.rows.refusals import broken, no_column

ROWS_AT_ONCE = 1000
_FILE_FORMAT = b"ARROW1"  # how Arrow's file format begins; its streams do not


def parquet_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(place, value of each wanted column, None for null) of each row of a Parquet file; none of a file without rows.

    Args:
        wanted: the column that each setting names.

    Raises:
        ConfigError: there are rows, and no such column.
        DataError: the file is broken.
    """
    import pyarrow.parquet as pq

    with _named(path), pq.ParquetFile(path) as file:
        if file.metadata.num_rows:
            _check(path, wanted, file.schema_arrow.names)
            columns = list(dict.fromkeys(wanted.values()))
            yield from _rows(file.iter_batches(ROWS_AT_ONCE, columns=columns), wanted)


def arrow_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """As `parquet_rows`, of a file in Arrow's stream or file format."""
    import pyarrow as pa

    with _named(path), pa.memory_map(str(path)) as file:
        if file.read(len(_FILE_FORMAT)) == _FILE_FORMAT:
            reader = pa.ipc.open_file(file)
            batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
        yield from _rows(_checked(path, wanted, batches), wanted)


def saved_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """As `parquet_rows`, of a folder written by `save_to_disk`, its splits in the order of their names."""
    # Before the first import: the library asks the hub for its packaged readers otherwise.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    with _named(path):
        several = path / "dataset_dict.json"
        names = sorted(json.loads(several.read_text("utf-8"))["splits"]) if several.is_file() else [None]
        for name in names:
            folder = path if name is None else path / name
            if not json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]:
                continue  # no rows: `datasets` writes such a folder and fails to load it
            split = datasets.load_from_disk(str(folder))
            if not len(split):
                continue
            _check(path, wanted, split.column_names)
            columns = list(dict.fromkeys(wanted.values()))
            # As Arrow, whatever format it was saved with: that one may be numpy's or a tensor's.
            tables = split.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
            for place, values in _rows(tables, wanted):
                yield place if name is None else f"{place} of {name}", values


def _rows(batches: Iterable[Any], wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    before = 0
    for batch in batches:
        values = (batch.column(column).to_pylist() for column in wanted.values())
        for number, row in enumerate(zip(*values, strict=True), before + 1):
            yield f"row {number}", row
        before += batch.num_rows


def _checked(path: Path, wanted: Mapping[str, str], batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        if batch.num_rows:
            _check(path, wanted, batch.schema.names)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE)


def _check(path: Path, wanted: Mapping[str, str], there_are: Iterable[str]) -> None:
    for setting, column in wanted.items():
        if column not in list(there_are):
            raise no_column(path, setting, column, there_are)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (VernierError, UnicodeDecodeError):
        raise
    except Exception as error:  # readers of three formats, each with errors of its own
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise broken(path, said) from error
