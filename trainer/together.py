"""Directories that all ranks write together: each rank its own safetensors files, the first rank what joins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.whole import begin, fsync_path, partial_path, read_json, sha256_file, write_atomic
from eval.ranks import Ranks


def begin_together(final: Path, ranks: Ranks) -> Path:
    """The empty directory that all ranks write into until the first one commits it as `final`."""
    if ranks.first:
        begin(final)
    ranks.barrier()
    return partial_path(final)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Writes CPU tensors to the disk as safetensors; gives the file's SHA-256."""
    save_file(tensors, path, metadata={"format": "pt"})
    fsync_path(path)
    return sha256_file(path)


def tell_first(part: Path, ranks: Ranks, facts: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Waits until every rank has told its facts: gives them, in the order of ranks, on the first one; None elsewhere.

    Called once a rank's own files are on the disk. The facts go through files in `part`, which are removed again.
    """
    write_atomic(part / f".rank-{ranks.rank}.json", json.dumps(facts))
    ranks.barrier()
    if not ranks.first:
        return None
    told = []
    for rank in range(ranks.world):
        sidecar = part / f".rank-{rank}.json"
        told.append(read_json(sidecar))
        sidecar.unlink()
    return told
