"""The layout of a run directory (`runs/NAME`), its state and its events."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import DataError
from configs.whole import MANIFEST, read_json, write_atomic

State = Literal["pending", "running", "stopping", "requeued", "done", "failed"]
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Folder or table name of a step, sorted as text like the steps themselves."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder or table name starts with, or None."""
    match = _STEP_FOLDER.match(name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def state(self) -> Path:
        return self.path / "state.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def stop_request(self) -> Path:
        return self.path / "STOP"

    @property
    def save_request(self) -> Path:
        return self.path / "SAVE"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def ema(self) -> Path:
        return self.path / "ema"

    @property
    def losses(self) -> Path:
        return self.path / "losses"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def train_board(self) -> Path:
        return self.path / "tensorboard" / "train"

    @property
    def eval_board(self) -> Path:
        return self.path / "tensorboard" / "eval"

    def whole_steps(self, folder: Path) -> list[int]:
        """Steps in `checkpoints` or `snapshots` whose directory has its manifest, ascending."""
        if not folder.is_dir():
            return []
        steps = {p.name: step_of(p.name) for p in folder.iterdir() if (p / MANIFEST).is_file()}
        return sorted(s for name, s in steps.items() if s is not None and name == step_name(s))

    def read_state(self) -> dict[str, Any]:
        """`state.json`; empty where the run has none, or one that a power cut left empty: the run will mend it."""
        try:
            return dict(read_json(self.state))
        except (DataError, TypeError, ValueError):
            return {}

    def write_state(self, state: State | None, **facts: Any) -> None:
        """Renames a new `state.json` into place; what is not given (`state` None too) stays as it was."""
        before = self.read_state()
        named = {"state": state} if state else {}
        now = {**before, **named, "host": socket.gethostname(), **facts, "heartbeat": time.time()}
        write_atomic(self.state, json.dumps(now, indent=1), durable=state is not None)

    def is_held(self) -> bool:
        """Whether a process holds the run's lock."""
        try:
            with open(self.lock) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def beat(self) -> None:
        """Says that the run is alive, without touching what its state says."""
        with suppress(OSError):
            os.utime(self.lock)

    def last_heartbeat(self) -> float:
        """When the holder of the lock was last heard of, in seconds since the epoch; 0 where there was none."""
        try:
            return self.lock.stat().st_mtime
        except OSError:
            return 0.0

    def add_event(
        self, kind: str, message: str, *, step: int | None = None, rank: int | None = None, **detail: Any
    ) -> None:
        """Appends a line to `events.jsonl`. One write a line, so several processes may append."""
        line = {
            "time": time.time(),
            "step": step,
            "rank": rank,
            "kind": kind,
            "message": message,
            "detail": detail,
        }
        descriptor = os.open(self.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)

    def read_events(self) -> list[dict[str, Any]]:
        """All whole lines of `events.jsonl`."""
        return read_jsonl(self.events)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last one cut by a crash is left out, any other broken one is an error."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    out = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is not whole
        try:
            out.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise DataError(f"{path}: line {number} is not JSON") from None
    return out


def open_run(path: Path) -> RunDir:
    """The run at `path`. Raises DataError where there is none."""
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: not a run directory (it has no config.yaml)")
    return RunDir(path)
