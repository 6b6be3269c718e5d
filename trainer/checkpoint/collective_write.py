"""Directories that all ranks write together: each rank its own safetensors files, the first rank what joins them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.errors import VernierError
from configs.fault_injection import reached
from configs.files.atomic import begin, fsync_path, partial_path, read_json, sha256_file, write_atomic
from eval.distributed.ranks import Ranks

Facts = dict[str, Any]
SPARE_BYTES = 16 << 20  # left free on the disk, for logs and what else a run must be able to write


class SaveFailed(VernierError):
    """A directory could not be written; nothing of it is left in its place. Raised on every rank alike."""


def write_together(
    final: Path, ranks: Ranks, size: int, own: Callable[[Path], Facts], join: Callable[[Path, list[Facts]], None]
) -> None:
    """Writes a directory from all ranks and puts it in place; a collective of the control group only.

    Args:
        final: where it will be.
        size: bytes that this rank will write.
        own: writes this rank's files into a directory, down to the disk; gives what the first rank has to know.
        join: on the first rank, when all files are there: adds what joins them and renames the directory into place.

    Raises:
        SaveFailed: names the rank and what went wrong. What was there before is as it was.
    """
    part = partial_path(final)
    try:
        total = ranks.sum_int(size)
        _agreed(ranks, lambda: _begin(final, total) if ranks.is_rank_zero else None)
        _agreed(ranks, lambda: _tell(part, ranks, own(part)))
        _agreed(ranks, lambda: join(part, _told(part, ranks)) if ranks.is_rank_zero else None)
    except SaveFailed:
        if ranks.is_rank_zero:
            shutil.rmtree(part, ignore_errors=True)  # gives the room back to what else must be written
        raise


def _agreed(ranks: Ranks, do: Callable[[], None]) -> None:
    """Does it; a failure on any rank is one on all, so that none is left waiting for another."""
    said, cause = "", None
    try:
        do()
    except Exception as error:
        if not isinstance(error, (OSError, VernierError)):
            traceback.print_exc()
        said, cause = _in_words(error), error
    if not ranks.all_true(not said):
        rank, words = ranks.first_message(said)
        raise SaveFailed(f"rank {rank}: {words}") from cause


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror or 'no space left on device'}: {error.filename or 'the disk is full'}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _begin(final: Path, size: int) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    begin(final)
    free = shutil.disk_usage(final.parent).free
    if free < size + SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{final.name} needs {size / 2**20:,.0f} MiB and {SPARE_BYTES >> 20} MiB to spare, "
            f"{free / 2**20:,.0f} MiB are free",
            str(final.parent),
        )


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    """Writes CPU tensors [...] to the disk as safetensors; gives the file's SHA-256. Equal tensors give equal bytes.

    Args:
        metadata: one key at most, since safetensors writes several in any order; without it what transformers asks for.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except OSError:
        raise
    except Exception as error:  # safetensors turns errors of the disk into errors of its own
        full = "os error 28" in str(error).lower() or "no space" in str(error).lower()
        raise OSError(errno.ENOSPC if full else errno.EIO, f"cannot be written ({error})", str(path)) from error
    reached("unsynced")
    fsync_path(path)
    return sha256_file(path)


def _tell(part: Path, ranks: Ranks, facts: Facts) -> None:
    """Leaves a rank's facts for the first one. Called once the rank's own files are on the disk."""
    write_atomic(part / f".rank-{ranks.rank}.json", json.dumps(facts))
    reached("written")


def _told(part: Path, ranks: Ranks) -> list[Facts]:
    """What every rank has left, in the order of ranks; removed again."""
    reached("told")
    told = []
    for rank in range(ranks.world):
        sidecar = part / f".rank-{rank}.json"
        told.append(read_json(sidecar))
        os.unlink(sidecar)
    return told
