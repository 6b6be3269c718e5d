"""Whether prepared data are what `prepare` wrote: looked at before ranks start, and as long as a run reads them.

Small data are hashed whole before a start. Of large data only so much is, smallest files first, and each node's first
rank hashes all while it trains: the run ends where something differs, and it does not end well before all was found
good. A file is hashed again only when its place on the disk says that it was written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import DataError, VernierError
from configs.files.atomic import MANIFEST, MISSING, damage_of, read_json, read_manifest

KIND = "dataset"
FACTS = "dataset.json"
AT_START_BYTES = 2 << 30
LOOK_EVERY_S = 30.0
THREADS = 4  # SHA-256 holds no lock of Python's
STRANGER = "is none of the files that `prepare` wrote, and would be read; move it elsewhere"
FOLDERS = ("shards", "tokenizer", "reference")  # what lies in these is read, whoever put it there

_good: dict[Path, tuple[int, ...]] = {}  # files that this process found good, as they lay on the disk then


def check_data(data_dir: Path, at_most: int = AT_START_BYTES) -> dict[str, Any]:
    """The data set's manifest, all of its files being there with their sizes and the smallest with their hashes.

    Args:
        at_most: bytes to hash; files beyond are left to a `DataWatch`.

    Raises:
        DataError: the first file that is missing, changed, of another size, or that `prepare` did not write.
    """
    manifest = read_manifest(data_dir, KIND)
    for name, what in damages(data_dir, manifest, at_most):
        mend = "" if what == STRANGER else "; put a good copy in its place, or prepare the data again with --fresh"
        raise DataError(f"{told(data_dir, name, what)}{mend} (vernier prepare --verify {data_dir} names all)")
    return manifest


def told(data_dir: Path, name: str, what: str) -> str:
    """One line on a damaged file."""
    return f"{data_dir}: {name} is missing" if what == MISSING else f"{data_dir / name}: {what}"


def damages(
    data_dir: Path, manifest: dict[str, Any], at_most: int | None = None, threads: int = THREADS
) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) of each file of a data set, or reference set, that is not as its manifest says.

    Args:
        at_most: bytes to hash, smallest files first; None: all.
    """
    files = manifest["files"]
    yield from ((name, STRANGER) for name in _strangers(data_dir, files))
    left, hashed, sized = at_most, [], []
    for name, fact in sorted(files.items(), key=lambda item: (item[1]["bytes"], item[0])):
        if left is not None and (left := left - fact["bytes"]) < 0:
            sized.append(name)
        else:
            hashed.append(name)
    yield from (found for name in sized if (found := _damage(data_dir, name, files[name], hashes=False)))
    look = partial(_hashed, data_dir, files)
    if threads == 1:  # beside training: at a process's end a pool would be waited for
        yield from filter(None, map(look, hashed))
    else:
        with ThreadPoolExecutor(threads) as pool:
            try:
                yield from filter(None, pool.map(look, hashed))
            finally:
                pool.shutdown(cancel_futures=True)  # whoever asked may have heard enough
    facts = data_dir / FACTS
    if manifest.get("kind") == KIND and facts.is_file():
        with suppress(DataError):  # damaged, and told above
            if read_json(facts).get("fingerprints") != manifest.get("fingerprints"):
                yield MANIFEST, f"changed since it was written: its fingerprints are not those of {FACTS}"


def _strangers(data_dir: Path, files: dict[str, Any]) -> list[str]:
    """Files in the folders that are read which the manifest does not name. Hidden ones are no one's data."""
    found = []
    for folder in FOLDERS:
        for path in sorted((data_dir / folder).rglob("*")):
            name = path.relative_to(data_dir).as_posix()
            if name not in files and path.is_file() and not any(p.startswith(".") for p in Path(name).parts):
                found.append(name)
    return found


def _hashed(data_dir: Path, files: dict[str, Any], name: str) -> tuple[str, str] | None:
    return _damage(data_dir, name, files[name], hashes=True)


def _damage(data_dir: Path, name: str, fact: dict[str, Any], *, hashes: bool) -> tuple[str, str] | None:
    path = data_dir / name
    try:
        at = os.stat(path)
        lies = (at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
        if _good.get(path) == lies and at.st_size == fact["bytes"]:
            return None
        what = damage_of(path, fact, hashes=hashes)
    except FileNotFoundError:
        what = MISSING
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    else:
        if hashes and what is None:
            _good[path] = lies
    return None if what is None else (name, what)


class DataWatch:
    """Hashes a data set beside the training that reads it, and again what is written to meanwhile."""

    def __init__(self, data_dir: Path, since: int, *, active: bool) -> None:
        """
        Args:
            since: the step that training starts from.
            active: whether this process looks: one a node does.
        """
        self._data_dir, self._since = data_dir, since
        self._manifest = read_manifest(data_dir, KIND) if active else {}
        self._found = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look, name="data", daemon=True) if active else None
        if self._thread is not None:
            self._thread.start()

    def on_step_begin(self, step: int) -> None:
        """Raises VernierError once something was found to be wrong; costs nothing."""
        self._check()

    def _check(self) -> None:
        if self._found:
            raise VernierError(
                f"{self._found}; found while training, so what was trained since step {self._since} may be wrong: "
                f"put a good copy in its place and go on from a checkpoint of step {self._since} or before, or start "
                f"anew with --fresh (vernier prepare --verify {self._data_dir} names all)"
            )

    def finish(self) -> None:
        """Waits until all was looked at, once more what was written meanwhile.

        Raises:
            VernierError: something was wrong.
        """
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._check()

    def _look(self) -> None:
        last = False
        while not last and not self._found:
            last = self._ending.is_set()  # asked to end while it looks, it looks once more: at little, by then
            for name, what in damages(self._data_dir, self._manifest, threads=1):
                self._found = told(self._data_dir, name, what)
                break
            if not last:
                self._ending.wait(LOOK_EVERY_S)
