"""Which runs there are on this account, so that a name finds one from any directory: paths only, a small file each.

Nothing depends on it: it is rebuilt by naming runs by their paths, as in `vernier status DIR/*`, and may be deleted.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from configs.errors import DataError
from configs.rundir import RunDir
from configs.whole import write_atomic

NAMED = 10  # runs of a name, in an error


def index_dir() -> Path:
    """Where the index lies: `vernier/runs/` of $XDG_STATE_HOME, else of ~/.local/state.

    Raises:
        RuntimeError: there is no home directory.
    """
    given = os.environ.get("XDG_STATE_HOME", "")
    # A relative one is to be ignored (XDG Base Directory Specification, "Basics").
    state = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return state / "vernier" / "runs"


def remember(run: Path) -> None:
    """Notes a run's path. Where that cannot be done (a home that may not be written, say) nothing happens.

    A file a run, so that runs started at once on several machines do not write over one another.
    """
    path = os.fsencode(os.path.abspath(run))
    with suppress(OSError, RuntimeError):
        entry = index_dir() / hashlib.sha256(path).hexdigest()[:16]
        if not entry.is_file() or entry.read_bytes() != path:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(entry, path)


def known() -> list[Path]:
    """The runs that were noted and still are there, by name and path."""
    found = []
    with suppress(OSError, RuntimeError):
        for entry in index_dir().iterdir():
            if entry.name.startswith("."):
                continue  # being written
            with suppress(OSError, ValueError):
                path = Path(os.fsdecode(entry.read_bytes()))
                if path.is_absolute() and is_run(path):
                    found.append(path)
    return sorted(found, key=lambda path: (path.name, path))


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, be it one that has not got as far as its config."""
    run = RunDir(path)
    return any(file.is_file() for file in (run.config, run.state, run.jobs, run.starter))


def find(named: Path | str) -> RunDir:
    """The run at a path, or of a name: under `runs/` here, else among the known ones.

    Raises:
        DataError: there is none, or several that are known have this name.
    """
    path = Path(named)
    if is_run(path):
        return RunDir(path)
    one_word = str(named) == path.name and path.name not in ("", "..")
    if one_word and is_run(Path("runs") / path):
        return RunDir(Path("runs") / path)
    same = [one for one in known() if one.name == path.name] if one_word else []
    if len(same) > 1:
        more = f" and {len(same) - NAMED} more" if len(same) > NAMED else ""
        places = ", ".join(str(one) for one in same[:NAMED])
        raise DataError(f"{named}: {len(same)} runs have this name; name one by its path: {places}{more}")
    if same:
        return RunDir(same[0])
    if one_word and not path.exists():
        raise DataError(f"{named}: no such directory, and no run of that name is known; name it by its path")
    raise DataError(f"{named}: not a run directory (it has neither config.yaml nor state.json)")
