"""How our processes end: with their parent, since `kill -9` of torchrun must not leave ranks behind; and at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STARTERS = (
    b"launcher.backends.agent",
    b"torch.distributed.run",
    b"torchrun",
    b"mpirun",
    b"orted",
    b"prted",
)  # of ranks


def began(pid: int) -> float:
    """When a process began, in seconds since the epoch by this machine's clock; now where that cannot be told."""
    try:
        with open(f"/proc/{pid}/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # proc(5): starttime, the 22nd
            return time.time() - float(uptime.read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def kill_with_parent() -> None:
    """Has the kernel kill this process when its parent does (Linux; kept over exec)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent() -> None:
    """`kill_with_parent`, and a watch besides. To be called first of all: a parent may die while torch is imported."""
    parent = os.getppid()
    kill_with_parent()
    # What started us was gone before we looked; but in a container it may itself be process 1.
    started = "TORCHELASTIC_RUN_ID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ
    orphaned = parent == 1 and started and not _is_ours(parent)
    if orphaned or os.getppid() != parent:
        os._exit(1)
    # The signal is tied to the parent's *thread* and is Linux only; a slow watch covers the rest.
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def _is_ours(pid: int) -> bool:
    """Whether a process is one that starts ranks."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read()
    except OSError:
        return False
    return any(word in command for word in STARTERS)


def end_at_once(code: int) -> NoReturn:
    """Ends this process with everything written and nothing torn down.

    Threads of the libraries that are loaded by then (Arrow's, gloo's) do not always outlive the interpreter's
    teardown: a process that did all it should has been seen to end with SIGABRT.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe whose reader has gone; a full disk, which `vernier` has told
            stream.flush()
    os._exit(code)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)
