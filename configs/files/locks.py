"""Locks on open files (flock): they fall with the process that holds them, and nobody waits for one for ever."""

from __future__ import annotations

import fcntl
import time


def take_flock(
    descriptor: int, *, patience_s: float = 0.0, look_s: float = 0.1, shared: bool = False, without_locks: bool
) -> bool:
    """Locks an open file; gives whether that was had within `patience_s` seconds.

    Args:
        without_locks: what to give on a file system that has none.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError:
            return without_locks
        time.sleep(look_s)
