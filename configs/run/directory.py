"""The layout of a run directory (`runs/NAME`), its state and its events."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from configs.errors import EXIT_FAILED, DataError, VernierError
from configs.files.atomic import MANIFEST, write_atomic
from configs.files.json_lines import PATIENCE_S
from configs.files.json_lines import append_line as append_line
from configs.files.json_lines import read_jsonl as read_jsonl
from configs.files.locks import take_flock
from configs.files.opening import open_to_read, open_to_write, read_bytes
from configs.files.seal import parsed, sealed
from configs.files.steps import step_name as step_name  # for those who name what lies in a run
from configs.files.steps import step_of as step_of
from configs.run.last_words import follows_another
from configs.run.script_ends import script_end
from configs.schema import Config

State = Literal["pending", "running", "stopping", "requeued", "done", "failed"]
CLOCKS_APART_S = 60.0  # two machines' may be
_LOGS = ("rank-*.log", "eval-rank-*.log", "*torchrun*.log", "*mpirun.log")
# What a run's state says of itself, where it says it: whoever reads it counts with these kinds.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("attempt", "step", "steps", "exit_code"), (int,)),
    **dict.fromkeys(("state", "again", "job", "host"), (str,)),
    "heartbeat": (int, float),
    "failure": (dict,),
    "job_ended": (bool,),
}


class _In:
    """A path below a run's directory."""

    def __init__(self, below: str) -> None:
        self.below = below

    def __get__(self, run: RunDir, _kind: type | None = None) -> Path:
        return run.path / self.below


@dataclass(frozen=True)
class RunDir:
    """Paths of a run, its state and its events."""

    path: Path

    config = _In("config.yaml")
    manifest = _In("manifest.json")
    twin = _In("twin.json")
    twins = _In("twins")
    state = _In("state.json")
    lock = _In("lock")
    starter = _In("starter")
    stop_request = _In("STOP")
    save_request = _In("SAVE")
    end_request = _In("END")  # written by the evaluator, where its scores say that training may end
    events = _In("events.jsonl")
    jobs = _In("jobs.jsonl")
    scripts = _In("jobs")
    metrics = _In("metrics.jsonl")
    checkpoints = _In("checkpoints")
    quarantine = _In("quarantine")
    snapshots = _In("snapshots")
    ema = _In("ema")
    losses = _In("losses")
    logs = _In("logs")
    train_board = _In("tensorboard/train")
    eval_board = _In("tensorboard/eval")

    def whole_steps(self, folder: Path) -> list[int]:
        """Steps in `checkpoints` or `snapshots` whose directory has its manifest, ascending."""
        if not folder.is_dir():
            return []
        steps = {p.name: step_of(p.name) for p in folder.iterdir() if (p / MANIFEST).is_file()}
        return sorted(s for name, s in steps.items() if s is not None and name == step_name(s))

    def read_state(self) -> dict[str, Any]:
        """`state.json`; empty where the run has none, or a damaged one: nothing is believed of that, see `check_state`.

        What a run goes on from are its checkpoints, and these do not hang on it. Where a job's script has ended before
        it had Python to say so (`jobs/train-JOB.failed`), that is its state.
        """
        try:
            found = self._state()
        except DataError:
            return {}
        if found.get("state") in ("pending", "requeued"):
            told = script_end(self.path, "train", found.get("job"))
            if told is not None:
                return {**found, "state": "failed", "exit_code": EXIT_FAILED, "failure": {"rank": None, **told}}
        return found

    def is_finished(self, config: Config) -> bool:
        """Whether the run has made its last step: the config's, or the one at which a setting ended it."""
        state = self.read_state()
        if state.get("state") != "done":
            return False
        ended = state.get("ended_by") or {}
        if ended and config.model_dump(mode="json").get(str(ended.get("key"))) == ended.get("value"):
            return True
        return int(state.get("step") or 0) >= config.steps

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

    def check_state(self) -> None:
        """Refuses a `state.json` that is damaged; not one that a power cut has left empty, which the run will mend.

        Raises:
            DataError: says what is wrong with it, and what to do.
        """
        self._state()

    def check_files(self) -> None:
        """Refuses what a start would write through or wait for: a link or a pipe in the place of a file of the run.

        Folders may be links: to a larger disk, say.

        Raises:
            DataError: names it; or `state.json` is damaged.
        """
        own = (self.config, self.manifest, self.state, self.lock, self.starter, self.stop_request, self.save_request)
        others = (self.events, self.jobs, self.metrics, self.path / "adapted.json")
        for path in (*own, *others, *(log for pattern in _LOGS for log in self.logs.glob(pattern))):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                what = "a symbolic link" if path.is_symlink() else "no regular file"
                raise DataError(f"{path}: is {what}, and a run reads and writes files of its own; move it away")
        self.check_state()

    def _state(self) -> dict[str, Any]:
        try:
            text = read_bytes(self.state)
            found = parsed(text) if text.strip(b"\0 \n") else {}
            if not isinstance(found, dict):
                raise ValueError("no object")
            for key, kinds in _KINDS.items():
                value = found.get(key)
                if value is not None and (not isinstance(value, kinds) or (kinds == (int,) and value is True)):
                    raise ValueError(f"{key} is {value!r}")
            if found.get("state") not in (None, *get_args(State)):
                raise ValueError(f"state is {found['state']!r}")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise DataError(
                f"{self.state}: damaged ({why}); move it away, and the run goes on from its newest checkpoint"
            ) from None
        return found

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
        damage = ""
        with self._to_ourselves():
            try:
                before = self._state()
            except DataError as error:
                before, damage = {}, str(error).partition(";")[0]
            after = change(before)
            if after is None:
                return
            after = {**after, "host": socket.gethostname(), "heartbeat": time.time()}
            text = json.dumps(sealed(after), indent=1)
            try:
                write_atomic(self.state, text, durable=durable)
            except OSError:
                if not durable or not self.state.is_file():
                    raise
                _overwrite(self.state, text.encode())  # a full disk has no room for a new file; the old one has its own
        if damage:  # told once the file is free again, which events are written to
            self.add_event("damaged", f"{damage}; it is written anew")

    @contextmanager
    def _to_ourselves(self) -> Iterator[None]:
        # A file that is always there, is never replaced and may be written: NFS locks nothing that is opened to read.
        descriptor = open_to_write(self.events, os.O_RDWR)
        try:
            take_flock(descriptor, patience_s=PATIENCE_S, look_s=0.01, without_locks=True)
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Whether a process holds the run's lock."""
        return is_locked(self.lock)

    def beat(self) -> None:
        """Says that the run is alive, without touching what its state says."""
        with suppress(OSError):
            os.utime(self.lock, follow_symlinks=False)

    def last_heartbeat(self) -> float:
        """When the holder of the lock was last heard of, in seconds since the epoch; 0 where there was none."""
        try:
            with open_to_read(self.lock) as file:  # opened, since NFS then asks its server and not its cache
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0

    def clock(self) -> float:
        """The time by the file server's clock, as heartbeats are: hosts' own may be minutes apart. Writes a file."""
        try:
            with tempfile.TemporaryFile(dir=self.path) as probe:
                return os.fstat(probe.fileno()).st_mtime
        except OSError:
            return time.time()

    def heard(self, state: dict[str, Any]) -> float:
        """When the run was last heard of, by its lock or its state; 0 where it never was.

        What is of a time to come was left before a clock was set back, and tells nothing.
        """
        marks = (self.last_heartbeat(), float(state.get("heartbeat") or 0))
        return max((mark for mark in marks if mark <= time.time() + CLOCKS_APART_S), default=0.0)

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
            with suppress(OSError, ValueError):  # on the same disk, perhaps
                print(f"{self.events}: cannot be written ({error.strerror}): {kind}: {message}", file=sys.stderr)

    def read_events(self) -> list[dict[str, Any]]:
        """All whole lines of `events.jsonl`; one that a full disk has cut is passed over."""
        return read_jsonl(self.events, strict=False)


def _is_recent(failure: Any, since: float) -> bool:
    return isinstance(failure, dict) and float(failure.get("time") or 0) >= since


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file; False where there is no such file, or no locks."""
    try:
        with open_to_read(path) as file:
            return not take_flock(file.fileno(), shared=True, without_locks=True)
    except OSError:
        return False


def _overwrite(path: Path, content: bytes) -> None:
    """Puts content into a file in place: not whole-or-not-there, so only where that cannot be had."""
    with os.fdopen(open_to_write(path, os.O_RDWR), "r+b", buffering=0) as file:
        file.write(content)
        file.truncate()
        os.fsync(file.fileno())


def tables_folder(reference: str, tokens: str) -> str:
    """What the folder of loss tables on a reference set is called, by the set's name and its tokens' fingerprint."""
    return f"{reference}-{tokens[:8]}"


def open_run(path: Path) -> RunDir:
    """The run at `path`. Raises DataError where there is none."""
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: not a run directory (it has no config.yaml)")
    return RunDir(path)
