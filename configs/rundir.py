"""The layout of a run directory (`runs/NAME`), its state and its events."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import EXIT_FAILED, DataError, VernierError
from configs.last_words import follows_another
from configs.script_ends import script_end
from configs.whole import MANIFEST, read_json, write_atomic

State = Literal["pending", "running", "stopping", "requeued", "done", "failed"]
STATE_PATIENCE_S = 5.0  # a process may be stopped while it writes; nobody else is to hang for that
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
    def starter(self) -> Path:
        return self.path / "starter"

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
    def jobs(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def scripts(self) -> Path:
        return self.path / "jobs"

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
        """`state.json`; empty where the run has none, or one that a power cut left empty: the run will mend it.

        Where a job's script has ended before it had Python to say so (`jobs/train-JOB.failed`), that is its state.
        """
        try:
            found = dict(read_json(self.state))
        except (DataError, TypeError, ValueError):
            found = {}
        if found.get("state") in ("pending", "requeued"):
            told = script_end(self.path, "train", found.get("job"))
            if told is not None:
                return {**found, "state": "failed", "exit_code": EXIT_FAILED, "failure": {"rank": None, **told}}
        return found

    def start_afresh(self, state: State, **facts: Any) -> None:
        """Writes a state without what an earlier start has left in it: for whoever starts ranks, before they are there.

        Raises:
            VernierError: it could not be written.
        """
        self.write_state(state, exit_code=None, failure=None, again=None, **facts)

    def take_up(self, state: State | None, *, since: float, **facts: Any) -> bool:
        """As a rank: writes a state, and clears what was left in it from before `since` (seconds since the epoch).

        Returns:
            False, with nothing written, where another rank of this start has failed already.

        Raises:
            VernierError: it could not be written.
        """
        good = True

        def taken(before: dict[str, Any]) -> dict[str, Any] | None:
            nonlocal good
            good = not _is_recent(before.get("failure"), since)
            named = {"state": state} if state else {}
            cleared = {"exit_code": None, "failure": None, "again": None}
            return {**before, **named, **cleared, **facts} if good else None

        try:
            self._change_state(taken, durable=True)
        except OSError as error:
            raise VernierError(f"{self.state}: {state!r} cannot be written ({error.strerror})") from None
        return good

    def write_state(self, state: State | None, **facts: Any) -> None:
        """Renames a new `state.json` into place; what is not given (`state` None too) stays as it was.

        Without a `state` it is a heartbeat, and is left out where the disk is full.

        Raises:
            VernierError: a state that could not be written.
        """
        named = {"state": state} if state else {}
        try:
            self._change_state(lambda before: {**before, **named, **facts}, durable=state is not None)
        except OSError as error:
            if state is not None:
                raise VernierError(f"{self.state}: {state!r} cannot be written ({error.strerror})") from None

    def record_failure(
        self,
        code: int,
        rank: int | None,
        error: str,
        *,
        begun: bool = False,
        since: float = 0.0,
        log: str | None = None,
        unsaid: bool = False,
    ) -> bool:
        """Says that the run has failed, unless a failure stands there: the first with a cause of its own counts.

        Args:
            begun: this attempt's state is there, so that a wish to be started again is its own; that counts more.
            since: when this start began, in seconds since the epoch; a failure from before is none of it.
            log: file in `logs` that tells more; default the rank's.
            unsaid: only where this start has not said its last word (stopped, to be started again).

        Returns:
            False where it could not be written.
        """
        follows = follows_another(error)
        failure = {"rank": rank, "error": error, "time": time.time()}
        failure |= {"log": log} if log else {}
        failure |= {"follows": True} if follows else {}  # from another rank's end
        now = {"state": "failed", "exit_code": code, "failure": failure, "again": None}

        def failed(before: dict[str, Any]) -> dict[str, Any] | None:
            there = before.get("failure")
            if isinstance(there, dict) and _is_recent(there, since):
                return {**before, **now} if there.get("follows") and not follows else None
            if begun and before.get("again"):
                return None
            said = before.get("exit_code") is not None or before.get("again")
            if unsaid and said and float(before.get("heartbeat") or 0) >= since:
                return None
            early = {"failure": {**failure, "early": True}} if before.get("state") == "pending" else {}
            return {**before, **now, **early}

        try:
            self._change_state(failed, durable=True)
        except OSError:
            return False
        return True

    def _change_state(self, change: Callable[[dict[str, Any]], dict[str, Any] | None], *, durable: bool) -> None:
        """Reads, changes and writes the state with no other process (or thread) between."""
        with self._to_ourselves():
            after = change(self.read_state())
            if after is None:
                return
            text = json.dumps({**after, "host": socket.gethostname(), "heartbeat": time.time()}, indent=1)
            try:
                write_atomic(self.state, text, durable=durable)
            except OSError:
                if not durable or not self.state.is_file():
                    raise
                _overwrite(self.state, text.encode())  # a full disk has no room for a new file; the old one has its own

    @contextmanager
    def _to_ourselves(self) -> Iterator[None]:
        # A file that is always there, is never replaced and may be written: NFS locks nothing that is opened to read.
        descriptor = os.open(self.events, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _wait_for_flock(descriptor)
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether a process holds the run's lock."""
        return is_locked(self.lock)

    def beat(self) -> None:
        """Says that the run is alive, without touching what its state says."""
        with suppress(OSError):
            os.utime(self.lock)

    def last_heartbeat(self) -> float:
        """When the holder of the lock was last heard of, in seconds since the epoch; 0 where there was none."""
        try:
            with open(self.lock, "rb") as file:  # opened, since NFS then asks its server and not its cache
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0

    def add_event(
        self, kind: str, message: str, *, step: int | None = None, rank: int | None = None, **detail: Any
    ) -> None:
        """Appends a line to `events.jsonl`.

        Where the disk is full the line goes to stderr instead, which ends no training.
        """
        line = {
            "time": time.time(),
            "step": step,
            "rank": rank,
            "kind": kind,
            "message": message,
            "detail": detail,
        }
        try:
            append_line(self.events, line)
        except OSError as error:
            print(f"{self.events}: cannot be written ({error.strerror}): {kind}: {message}", file=sys.stderr)

    def read_events(self) -> list[dict[str, Any]]:
        """All whole lines of `events.jsonl`; one that a full disk has cut is passed over."""
        return read_jsonl(self.events, strict=False)


def _is_recent(failure: Any, since: float) -> bool:
    return isinstance(failure, dict) and float(failure.get("time") or 0) >= since


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file; False where there is no such file, or no locks."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _try_flock(descriptor: int) -> bool:
    """Whether there is no more to wait for: it is locked, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _wait_for_flock(descriptor: int) -> None:
    """Locks an open file, or gives up after a while: whoever holds it may be stopped, and must not stop us."""
    deadline = time.monotonic() + STATE_PATIENCE_S
    while not _try_flock(descriptor) and time.monotonic() < deadline:
        time.sleep(0.01)


def _overwrite(path: Path, content: bytes) -> None:
    """Puts content into a file in place: not whole-or-not-there, so only where that cannot be had."""
    with open(path, "r+b", buffering=0) as file:
        file.write(content)
        file.truncate()
        os.fsync(file.fileno())


def tables_folder(reference: str, tokens: str) -> str:
    """What the folder of loss tables on a reference set is called, by the set's name and its tokens' fingerprint."""
    return f"{reference}-{tokens[:8]}"


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends a line of JSON, on a line of its own also where the last one was cut. Several processes may do it.

    The file is locked meanwhile, where it can be: a write over the end of a page shows its first part before the rest,
    which would pass for a line that was cut; and on NFS a lock is what makes an append go to the end.

    Raises:
        OSError: it could not be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _wait_for_flock(descriptor)
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # by a crash or a full disk
        os.write(descriptor, (b"\n" if cut else b"") + (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def read_jsonl(path: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last one cut by a crash is left out, any other broken one is an error.

    Args:
        strict: False: others that are broken are left out as well.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    out = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is not whole
        try:
            out.append(json.loads(line))
        except ValueError:
            if strict and number < len(lines) - 1:
                raise DataError(f"{path}: line {number} is not JSON") from None
    return out


def open_run(path: Path) -> RunDir:
    """The run at `path`. Raises DataError where there is none."""
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: not a run directory (it has no config.yaml)")
    return RunDir(path)
