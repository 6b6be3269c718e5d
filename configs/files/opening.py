"""How files of a run are opened: only regular ones are read, and none is written through a link.

A pipe in a file's place would be waited for without end; a link would have another file emptied in its stead.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

# For opening alone: what is asked of a regular file never waits, and what is no such file is not read.
_AT_ONCE = os.O_NONBLOCK


def open_to_read(path: Path) -> io.BufferedReader:
    """A regular file, to read its bytes; a link to one will do.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device, a directory.
    """
    return os.fdopen(_regular(path, os.O_RDONLY | _AT_ONCE, 0), "rb")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError as `open_to_read`."""
    with open_to_read(path) as file:
        return file.read()


def open_to_write(path: Path, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file of that very name, made where there is none. The caller closes it.

    Args:
        flags: of `os.open`, such as `os.O_WRONLY | os.O_APPEND`.

    Raises:
        OSError: it cannot be opened, is a link (whatever that leads to), or no regular file.
    """
    try:
        return _regular(path, flags | os.O_CREAT | os.O_NOFOLLOW | _AT_ONCE, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link, and a run writes through none", str(path)) from None
        raise


def _regular(path: Path, flags: int, mode: int) -> int:
    descriptor = os.open(path, flags, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor
