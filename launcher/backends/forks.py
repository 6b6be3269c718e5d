"""A rank-group's agent as a fork of this process, which has imported what ranks need: it and they start at once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from setproctitle import setproctitle

from configs.console import is_lent, open_streams
from configs.files.opening import open_to_write
from configs.process import end_at_once, kill_with_parent
from launcher.backends.agent import RankGroup, run, unheard

LOOK_S = 0.02


class Forked:
    """A forked child, with what of `subprocess.Popen` its users ask for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
            time.sleep(LOOK_S)
        return code

    def send_signal(self, sig: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL; its ranks die with it."""
        self.send_signal(signal.SIGKILL)


def fork(group: RankGroup, environment: dict[str, str], log: Path) -> Forked:
    """Forks the agent of a rank-group, in a session of its own, with its output appended to `log`.

    Raises:
        OSError: the log cannot be opened, or there is no room for another process.
    """
    output = open_to_write(log, os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    # A signal that came between the fork and `unheard` would be taken for one to this process.
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _live(group, environment, output, parent, masked)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.close(output)
    return Forked(pid)


def _close_as_exec_does() -> None:
    """Closes files of the parent's: its locks and pipes are not to be held by its ranks. Devices stay: libraries that
    have asked one (NVML) know its number."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if number > 2 and not os.readlink(f"/proc/self/fd/{number}").startswith("/dev/nvidia"):
                os.close(number)


def _live(
    group: RankGroup, environment: dict[str, str], output: int, parent: int, masked: set[int | signal.Signals]
) -> None:
    """The life of the child. Nothing of the parent's that is up the stack is come back to."""
    code = 1
    try:
        kill_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.setsid()
        unheard()
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        # Lent to the ranks, see configs.console.
        os.dup2(2 if is_lent(environment) else os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_as_exec_does()
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        open_streams(log=True)
        # Before the environment goes: it is found by it.
        setproctitle(f"vernier agent: {shlex.join(group.command('python'))}")
        os.environ.clear()
        os.environ.update(environment)
        code = run(group)
    except BaseException:
        traceback.print_exc()
    finally:
        end_at_once(code)
