"""Directories and files that are whole or not there: written aside, hashed, fsynced, renamed; checked when read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.fault_injection import reached
from configs.files.manifests import parse_manifest
from configs.files.opening import open_to_read, read_bytes
from configs.files.seal import NOT_JSON, parsed, sealed

MANIFEST = "manifest.json"
MISSING = "missing"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open_to_read(path) as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Forces a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Puts a file in place by rename, so that no reader ever sees half of it."""
    data = content.encode() if isinstance(content, str) else content
    # Not by tempfile, whose files are for their owner alone: whom a run is for is the umask's to say.
    name = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # falls with its writer; see `clear_unfinished`
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    if durable:
        fsync_path(path.parent)


def open_as_folder(path: Path) -> None:
    """Gives a file that its writer (safetensors, say) made for its owner alone the mode that the umask has for it.

    Told by the folder, which we made: asking for the umask means to set it, for all threads.
    """
    os.chmod(path, path.parent.stat().st_mode & 0o666)


def clear_unfinished(folder: Path, pattern: str) -> None:
    """Removes what writers that were killed inside `write_atomic` have left of files like `pattern` in a folder."""
    for left in folder.glob(f".{pattern}.????????"):
        with suppress(OSError):  # it has just got its name, or its writer is at work
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(descriptor)


def read_json(path: Path) -> Any:
    """Content of a JSON file, without the seal that those of `write_json` have.

    Raises:
        DataError: missing, broken, or not what was sealed.
    """
    try:
        return parsed(read_bytes(path))
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        said = str(error)
        raise DataError(
            f"{path}: cannot be read as JSON ({said})" if said.startswith(NOT_JSON) else f"{path}: {said}"
        ) from None


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Puts a JSON file in place by rename, sealed, so that `read_json` sees a changed letter in it."""
    write_atomic(path, json.dumps(sealed(content), indent=1), durable=durable)


def partial_path(final: Path) -> Path:
    """Where a directory is written before it is renamed to `final`; the same for all ranks that write into it."""
    return final.parent / f".{final.name}.partial"


def begin(final: Path) -> Path:
    """Makes the empty directory that `commit` will rename to `final`. What an earlier try left is removed."""
    part = partial_path(final)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def commit(final: Path, manifest: dict[str, Any], hashes: dict[str, str] | None = None) -> None:
    """Finishes what `begin` started: hashes every file into the manifest, fsyncs, renames into place.

    Args:
        manifest: what the directory is (its `kind` and facts); `files` is added.
        hashes: SHA-256 by relative path of files that are hashed and fsynced already (by the ranks that wrote them).

    Raises:
        DataError: what was written is gone.
    """
    part = partial_path(final)
    known = dict(hashes or {})
    files: dict[str, dict[str, Any]] = {}
    folders = {part}
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        name = path.relative_to(part).as_posix()
        folders.add(path.parent)
        open_as_folder(path)
        if name not in known:
            fsync_path(path)
        files[name] = {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
    lost = sorted(set(known) - set(files))
    if lost:
        raise DataError(f"{part}: {lost[0]} was written and is gone")
    write_json(part / MANIFEST, {**manifest, "files": files}, durable=True)
    for folder in folders:
        fsync_path(folder)
    reached("hashed")
    os.rename(part, final)
    reached("renamed")
    fsync_path(final.parent)


@contextmanager
def whole_directory(final: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """A directory to fill from one process; committed with `manifest` (may be filled meanwhile) when the block ends."""
    part = begin(final)
    try:
        yield part
        commit(final, manifest)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def read_manifest(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a whole directory of ours.

    Raises:
        DataError: it has none, a damaged one, or one of another kind.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory")
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory}: has no {MANIFEST}, so it was not written to its end (or not by Vernier)")
    try:
        return parse_manifest(read_bytes(path), directory.name, kind)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        said = str(error)
        if said.startswith(NOT_JSON):
            raise DataError(f"{path}: cannot be read as JSON ({said})") from None
        raise DataError(f"{directory if said.startswith('expected') else path}: {said}") from None


def verify(directory: Path, kind: str | None = None, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest, after every file named in it was found with its size and its hash.

    Without `hashes` only JSON files, which are small and decide what the others are taken for, are hashed.

    Raises:
        DataError: names the first file that is missing, cut short or changed.
    """
    manifest = read_manifest(directory, kind)
    found = first_damaged(directory, manifest["files"], hashes=hashes)
    if found is not None:
        name, what = found
        raise DataError(f"{directory}: {name} is missing" if what == MISSING else f"{directory / name}: {what}")
    return manifest


def first_damaged(directory: Path, files: dict[str, dict[str, Any]], *, hashes: bool = True) -> tuple[str, str] | None:
    """(name, what is wrong with it) of the first of a manifest's files that is not as it says; None where all are."""
    for name, fact in files.items():
        what = damage_of(directory / name, fact, hashes=hashes)
        if what is not None:
            return name, what
    return None


def damage_of(path: Path, fact: dict[str, Any], *, hashes: bool = True) -> str | None:
    """What is wrong with a file of which a manifest says `fact` (its `bytes` and `sha256`); None where nothing is."""
    if not path.is_file():
        return MISSING
    size = path.stat().st_size
    if size != fact["bytes"]:
        return f"cut short or changed: {size:,} bytes, its manifest says {fact['bytes']:,}"
    if (hashes or path.suffix == ".json") and sha256_file(path) != fact["sha256"]:
        return "changed since it was written (its SHA-256 is not the manifest's)"
    return None
