"""Paths that nothing can be done with, found before anything is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from configs.console import printable


def path_problems(key: str, path: Path, *, elsewhere: bool = False) -> Iterator[str]:
    """Why a path cannot be used, a line a reason.

    Args:
        key: the setting or option that names it.
        elsewhere: it is a path on other machines; what is here says nothing.
    """
    full = path.absolute()
    try:
        str(full).encode()
    except UnicodeEncodeError:
        yield f"{key}: {printable(str(full))} has bytes that are no UTF-8, which libraries cannot open; rename it"
        return
    link = None if elsewhere else _broken_link(full)
    if link is not None:
        by = "" if link == full else f"; {path} goes by way of it"
        yield f"{key}: {link} is a link to {os.readlink(link)}, which is not there; is its disk mounted?{by}"


def _broken_link(path: Path) -> Path | None:
    with suppress(OSError):
        return next((one for one in (*reversed(path.parents), path) if one.is_symlink() and not one.exists()), None)
    return None
