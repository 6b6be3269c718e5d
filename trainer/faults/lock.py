"""One writer a run: the trainer's lock, taken over only from the dead; and who may start ranks on a run."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, VernierError
from configs.files.locks import take_flock
from configs.files.opening import open_to_write, read_bytes
from configs.run.directory import RunDir
from configs.scheduler import current_job

FRESH_S = 60.0
PATIENCE_S = 1.0  # whoever asks if a run is held takes the lock for an instant
STARTED = "%Y-%m-%d %H:%M:%S"
WATCH_S = 1.0  # the holder touches its lock every 2 seconds


class RunLock:
    """Held by rank 0 while it trains. The kernel lets go of it when the process dies, however it dies.

    The file stays for ever: were it unlinked, two processes could each hold a lock of that name.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.descriptor: int | None = None
        self.attempt = 0

    def acquire(self, attempt: int) -> None:
        """Takes the lock. From a holder on another host only once that has been silent for `FRESH_S`: waits for that.

        Raises:
            ConfigError: another trainer holds the run; names it.
        """
        descriptor = _open(self.run.lock)
        try:
            if not _locked(descriptor):
                raise ConfigError(held_message(self.run))
            silent = _outwait(self.run, lambda told: print(told, flush=True))
            before = _described(self.run.lock)
            _sign(descriptor, attempt)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor, self.attempt = descriptor, attempt
        if silent is not None:
            told = f"took over from {before}, which has not been heard of for {silent:.0f} s"
            self.run.add_event("took over", told, rank=0, silent_s=round(silent, 1))

    def still_ours(self) -> bool:
        """Whether the file at the lock's path is the one held here, and says so. False where none is held."""
        if self.descriptor is None:
            return False
        try:
            there, here = os.lstat(self.run.lock), os.fstat(self.descriptor)
        except FileNotFoundError:
            return False
        except OSError:  # a network file system that stutters says nothing about who holds the run
            return True
        found = holder(self.run)
        if not found and os.path.samestat(there, here) and there.st_size:
            return True  # not read, for the same reason
        named = (found.get("host"), found.get("pid"), found.get("attempt"))
        return os.path.samestat(there, here) and named == (socket.gethostname(), os.getpid(), self.attempt)

    def check_current(self) -> None:
        """To be called before anything is committed.

        Raises:
            VernierError: another process has the run by now, or its lock is gone.
        """
        if self.still_ours():
            return
        found = holder(self.run)
        now = f"attempt {found.get('attempt')} of {_described(self.run.lock)} holds the run" if found else ""
        raise VernierError(
            f"attempt {self.attempt} is no longer current: "
            f"{now or f'{self.run.lock} was removed or replaced'}; nothing was written"
        )

    def release(self) -> None:
        """Lets go."""
        if self.descriptor is not None:
            if self.still_ours():
                os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = None


@contextmanager
def kept_free(run: RunDir, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Keeps trainers out for the few moments in which something is written for the run that none holds.

    Raises:
        ConfigError: a trainer holds the run, here or on a host whose heart still beats.
    """
    descriptor = _open(run.lock)
    try:
        if not _locked(descriptor, patience_s) or _alive_elsewhere(run):
            raise ConfigError(held_message(run))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def sole_starter(run: RunDir) -> Iterator[None]:
    """Held by `vernier train` while it has ranks: a second one is refused before it has written anything.

    Apart from the trainer's own lock, which rank 0 holds: between the two lie the seconds in which ranks start.

    Raises:
        ConfigError: another `vernier train` is at work on this run; names it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    descriptor = _open(run.starter)
    try:
        if not _locked(descriptor):
            raise ConfigError(_refusal(run, run.starter))
        _sign(descriptor, None)
        yield
    finally:
        os.close(descriptor)


def check_free(run: RunDir, tell: Callable[[str], None]) -> None:
    """Sees to it that no trainer holds the run; waits for a holder on another host to move or be given up.

    Raises:
        ConfigError: one does; names it.
    """
    if run.is_held():
        raise ConfigError(held_message(run))
    _outwait(run, tell)


def holder(run: RunDir) -> dict[str, Any]:
    """What the lock says of its holder; empty where it says nothing."""
    return _read(run.lock)


def held_message(run: RunDir) -> str:
    """Who holds the run, for the one who is refused."""
    return _refusal(run, run.lock)


def held_since_before(run: RunDir, since: float) -> bool:
    """Whether a trainer holds the run that began before `since` (seconds since the epoch): its state is its own."""
    started = holder(run).get("started")
    if not started or not (run.is_held() or _alive_elsewhere(run)):
        return False
    return time.mktime(time.strptime(str(started), STARTED)) + 1.0 < since


def _refusal(run: RunDir, path: Path) -> str:
    return f"run.dir: {run.path} is held by {_described(path)}; stop it first, or use another run.dir"


def _described(path: Path) -> str:
    found = _read(path)
    if not found:
        return "a process"
    job = f", job {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid')} on {found.get('host')} since {found.get('started')}{job}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_bytes(path)))
    except (OSError, ValueError, TypeError):
        return {}


def _open(path: Path) -> int:
    try:
        return open_to_write(path, os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"run.dir: {path} cannot be written ({error.strerror})") from None


def _locked(descriptor: int, patience_s: float = PATIENCE_S) -> bool:
    return take_flock(descriptor, patience_s=patience_s, without_locks=False)


def _sign(descriptor: int, attempt: int | None) -> None:
    named = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime(STARTED),
        "job": current_job(),
        "attempt": attempt,
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(named).encode(), 0)
    except OSError as error:
        raise VernierError(f"run.dir: its lock cannot be written ({error.strerror})") from None


def _elsewhere(run: RunDir) -> bool:
    found = holder(run)
    return bool(found) and found.get("host") != socket.gethostname()


def _alive_elsewhere(run: RunDir) -> bool:
    """A holder on another host whose heart still beats, where the file system does not carry locks between hosts."""
    return _elsewhere(run) and _silence(run) < FRESH_S


def _silence(run: RunDir) -> float:
    """For how many seconds the holder has not been heard of; by the file server's clock, as the heartbeat is."""
    # A clock that was set back must not make it wait for that long.
    return max(0.0, run.clock() - run.last_heartbeat())


def _outwait(run: RunDir, tell: Callable[[str], None]) -> float | None:
    """Waits until a holder on another host has been silent for `FRESH_S`; gives for how long it has, or None.

    Such a holder may be dead (a node that was lost leaves its lock signed), or alive behind a file system that does not
    carry locks. One beat of its heart tells.

    Raises:
        ConfigError: it is alive.
    """
    if not _elsewhere(run):
        return None
    last, silent, began = run.last_heartbeat(), _silence(run), time.monotonic()
    before = silent
    if silent < FRESH_S:
        rest = f"waiting up to {FRESH_S - silent:.0f} s to see whether it is alive"
        tell(f"{run.path} was last held by {_described(run.lock)}; {rest}")
    while silent < FRESH_S:
        time.sleep(min(WATCH_S, FRESH_S - silent + 0.01))
        if run.last_heartbeat() != last:
            raise ConfigError(held_message(run))
        silent = before + time.monotonic() - began  # by our own clock, which nobody sets
    if _silence(run) < FRESH_S:  # its last beat is of a time to come: whoever asks next need not wait as well
        with suppress(OSError):  # a second more than it was: file systems' clocks tick in steps
            os.utime(run.lock, (run.clock() - silent - 1.0,) * 2)
    return silent
