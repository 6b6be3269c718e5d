"""What is said of a file whose rows cannot be read, or that lacks the column asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from configs.errors import ConfigError, DataError


def broken(path: Path, said: str, line: int | None = None) -> DataError:
    """A file is not what its suffix says; `line`, from 1, is where."""
    if line is None:
        return DataError(f"data.source: {path} cannot be read: {said}")
    return DataError(f"data.source: {path}, line {line}, cannot be read: {said}; mend that line, or take it out")


def not_utf8(error: UnicodeDecodeError, line: int) -> UnicodeDecodeError:
    """The same error, its reason naming the line of the file."""
    return UnicodeDecodeError(error.encoding, error.object, error.start, error.end, f"line {line}: {error.reason}")


def no_column(path: Path, setting: str, column: str, there_are: Iterable[str]) -> ConfigError:
    """No row has the column that `data.SETTING` names."""
    columns = ", ".join(sorted(filter(None, map(str, there_are)))) or "none"
    return ConfigError(f"data.{setting}: {path} has no column {column!r}; its columns are: {columns}")
