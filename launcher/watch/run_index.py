"""Which runs there are on this account, so that a name finds one from any directory: paths only, a small file each.

Nothing depends on it: it is rebuilt by naming runs by their paths, as in `vernier status DIR/*`, and may be deleted.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from configs.errors import DataError
from configs.files.atomic import read_json, write_atomic
from configs.run.directory import RunDir

SWEEP = "sweep.json"  # says of a folder that it is a sweep's
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
        DataError: there is none, or several that are known have this name, or it is a sweep.
    """
    found, sweep = _find(named)
    if sweep:
        names = ", ".join(run.path.name for run in found[:NAMED]) + (", …" if len(found) > NAMED else "")
        raise DataError(f"{named}: is a sweep; name one of its members by its path: {names or 'it has none yet'}")
    return found[0]


def find_all(named: Path | str) -> list[RunDir]:
    """As `find`; of a sweep's folder the members, in its order.

    Raises:
        DataError: as `find`, or the sweep has no member yet.
    """
    found, _ = _find(named)
    if not found:
        raise DataError(f"{named}: is a sweep that has no member yet")
    return found


def _find(named: Path | str) -> tuple[list[RunDir], bool]:
    """(the run, or a sweep's members; whether it is a sweep)."""
    path = Path(named)
    one_word = str(named) == path.name and path.name not in ("", "..")
    try:
        for place in (path, *((Path("runs") / path,) if one_word else ())):
            if is_run(place):
                return [RunDir(place)], False
            if is_sweep(place):
                return members_of(place), True
    except OSError as error:
        raise DataError(f"{named}: cannot be read ({error.strerror})") from None
    same = [one for one in known() if one.name == path.name] if one_word else []
    if len(same) > 1:
        more = f" and {len(same) - NAMED} more" if len(same) > NAMED else ""
        places = ", ".join(str(one) for one in same[:NAMED])
        raise DataError(f"{named}: {len(same)} runs have this name; name one by its path: {places}{more}")
    if same:
        return [RunDir(same[0])], False
    if one_word and not path.exists():
        raise DataError(f"{named}: no such directory, and no run of that name is known; name it by its path")
    raise DataError(f"{named}: not a run directory (it has neither config.yaml nor state.json)")


def is_sweep(path: Path) -> bool:
    """Whether a directory is a sweep's."""
    return (path / SWEEP).is_file()


def members_of(sweep: Path) -> list[RunDir]:
    """The members of a sweep that are there, in its order.

    Raises:
        DataError: its file cannot be read.
    """
    content = read_json(sweep / SWEEP)
    try:
        names = [str(member["name"]) for member in content["members"]]
    except (KeyError, TypeError):
        raise DataError(f"{sweep / SWEEP}: is not a sweep's file; move it away, and launch the sweep again") from None
    return [RunDir(sweep / name) for name in names if Path(name).name == name and (sweep / name).is_dir()]
