"""Rows of CSV and TSV files, by Python's own reader: a field is the text that is written, never a number or a gap."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from trainer.data.rows.refusals import broken, no_column, not_utf8


def csv_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """(place, field of each wanted column, None where the row ends before it) of each row, in the file's order.

    The first row names the columns. Empty lines are no rows.

    Args:
        wanted: the column that each setting names.

    Raises:
        ConfigError: there are rows, and no such column.
        DataError: names the line that the broken row starts at.
        UnicodeDecodeError: its reason names the line.
    """
    csv.field_size_limit(sys.maxsize)  # a field may be a whole document; the default is 128 KiB
    with open(path, "rb") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header: list[str] | None = None
        indices: list[int] = []
        while True:
            start = lines.number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise broken(path, str(error), start) from None
            if lines.ended:  # a row that is whole does not ask for another line
                raise broken(path, "a quote that opens here is never closed", start)
            if not row:
                continue
            if header is None:
                header = row
                continue
            if not indices:
                for setting, column in wanted.items():
                    if column not in header:
                        raise no_column(path, setting, column, header)
                indices = [header.index(column) for column in wanted.values()]
            if len(row) > len(header) and any(row[len(header) :]):
                raise broken(path, f"{len(row)} fields, the first row names {len(header)} columns", start)
            yield f"line {start}", tuple(row[i] if i < len(row) else None for i in indices)


class _Lines:
    """Decodes line by line, so that what is not UTF-8 is found where it is; knows whether the end was asked for."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.number, self.ended = 0, False
        self._lines = self._decoded(file)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _decoded(self, file: io.BufferedReader) -> Iterator[str]:
        for raw in file:
            try:
                line = raw.decode("utf-8-sig" if self.number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(error, self.number + 1) from None
            # A carriage return alone ends a line as well.
            several = "\r" in line.removesuffix("\n").removesuffix("\r")
            parts = io.StringIO(line, newline="") if several else (line,)
            for part in parts:
                self.number += 1
                yield part
        self.ended = True
