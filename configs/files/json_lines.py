"""Files of JSON lines: appended to by several processes, each line whole or seen not to be, sealed where it counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.locks import take_flock
from configs.files.opening import open_to_write, read_bytes
from configs.files.seal import NOT_JSON, parsed, sealed

PATIENCE_S = 5.0  # a process may be stopped while it writes; nobody else is to hang for that


def sealed_line(line: dict[str, Any]) -> str:
    """A line of JSON that says by its seal whether it is as it was written; with its newline."""
    return json.dumps(sealed(line)) + "\n"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line of JSON, on a line of its own also where the last one was cut. Several processes may do it.

    The file is locked meanwhile, where it can be: a write over the end of a page shows its first part before the rest,
    which would pass for a line that was cut; and on NFS a lock is what makes an append go to the end.

    Raises:
        OSError: it could not be written.
    """
    descriptor = open_to_write(path, os.O_RDWR | os.O_APPEND)
    try:
        take_flock(descriptor, patience_s=PATIENCE_S, look_s=0.01, without_locks=True)
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash or a full disk
        os.write(descriptor, (b"\n" if cut else b"") + (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def each_line(path: Path) -> list[dict[str, Any] | str]:
    """The lines of a file in their order: an object, or where it is not as it was written, what is wrong with it.

    A last one that a crash has cut, without its newline, is left out. Seals are checked and taken off.

    Raises:
        DataError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    found: list[dict[str, Any] | str] = []
    for number, text in enumerate(lines[:-1], start=1):
        try:
            line = parsed(text)
            if not isinstance(line, dict):
                raise ValueError(NOT_JSON)
        except ValueError as error:
            said = str(error)
            found.append(f"{path}: line {number} is {NOT_JSON if said.startswith(NOT_JSON) else 'damaged: ' + said}")
        else:
            found.append(line)
    return found


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """As `each_line`: (the lines that are as they were written, what is wrong with each other one)."""
    lines = each_line(path)
    return [line for line in lines if isinstance(line, dict)], [line for line in lines if isinstance(line, str)]


def read_jsonl(path: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that are as they were written; a last one cut by a crash is left out.

    Args:
        strict: False: others that are broken are left out as well.

    Raises:
        DataError: with `strict`, any other broken line; the file cannot be read.
    """
    found, wrong = read_lines(path)
    if strict and wrong:
        raise DataError(wrong[0])
    return found
