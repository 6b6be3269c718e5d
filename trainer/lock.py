"""The lock of a run: one trainer at a time, and whoever is refused learns who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from typing import Any

from configs.errors import ConfigError
from configs.rundir import RunDir

FRESH_S = 60.0
PATIENCE = 10  # tenths of a second


class RunLock:
    """Held by rank 0 while it trains. The kernel lets go of it when the process dies, however it dies."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.descriptor: int | None = None

    def acquire(self, attempt: int) -> None:
        """Takes the lock, or raises ConfigError naming its holder."""
        descriptor = os.open(self.run.lock, os.O_RDWR | os.O_CREAT, 0o644)
        if not _locked(descriptor) or _alive_elsewhere(self.run):
            os.close(descriptor)
            raise ConfigError(held_message(self.run))
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "attempt": attempt,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self.descriptor = descriptor

    def release(self) -> None:
        """Lets go."""
        if self.descriptor is not None:
            os.ftruncate(self.descriptor, 0)
            os.close(self.descriptor)
            self.descriptor = None


def _locked(descriptor: int) -> bool:
    """Takes the lock; patient for a moment, since one who asks whether it is held takes it for an instant."""
    for _ in range(PATIENCE):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False


def holder(run: RunDir) -> dict[str, Any]:
    """What the lock says of its holder; empty where it says nothing."""
    try:
        return dict(json.loads(run.lock.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _alive_elsewhere(run: RunDir) -> bool:
    """A holder on another host whose heart still beats, where the file system does not carry locks between hosts."""
    found = holder(run)
    if not found or found.get("host") == socket.gethostname():
        return False
    return time.time() - run.last_heartbeat() < FRESH_S  # only the holder touches the lock


def held_message(run: RunDir) -> str:
    """Who holds the run, for the one who is refused."""
    found = holder(run)
    who = f"process {found.get('pid')} on {found.get('host')} since {found.get('started')}" if found else "a process"
    job = f", job {found['job']}" if found.get("job") else ""
    return f"run.dir: {run.path} is held by {who}{job}; stop it first, or use another run.dir"
