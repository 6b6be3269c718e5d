"""Snapshots: a Hugging Face model directory from any ZeRO stage, each rank writing some of its safetensors files.

No rank ever holds the whole model because of it: at stage 3 parameters are gathered a piece at a time, and a rank keeps
only what goes into its own files.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.rundir import RunDir, step_name
from configs.schema import Config
from configs.whole import (
    MANIFEST,
    begin,
    commit,
    fsync_path,
    partial_path,
    read_json,
    sha256_file,
    write_atomic,
)
from eval.models import DTYPES, fingerprint_of_digests, tensor_digest
from eval.ranks import Ranks
from eval.tokenization import copy_tokenizer_files
from trainer import zero_state

SHARD_BYTES = 5 << 30
GATHER_NUMEL = 64 << 20  # parameters gathered at once at ZeRO-3


@dataclass(frozen=True)
class Piece:
    """A tensor of the model on its way into a file."""

    name: str
    tensor: Any
    shard: int


def dtype_of(config: Config) -> str:
    """The kind of number that snapshots hold: fp32 masters for fp32 and amp, the 16-bit weights otherwise."""
    held = {"fp32": "fp32", "amp": "fp32", "bf16": "bf16", "fp16": "fp16"}[config.precision or "fp32"]
    return config.snapshot.dtype or held


def take_snapshot(engine: Any, config: Config, hf: Any, ranks: Ranks, step: int, tokens: int) -> str:
    """Writes snapshot `step` of the run; gives the fingerprint of its weights, on every rank.

    A whole snapshot of the same weights that is there already stays as it is; one of other weights (an earlier attempt
    at another world size, say) is moved to `replaced/` with its loss tables.
    """
    final = RunDir(config.run_dir).snapshots / step_name(step)
    if ranks.first:
        begin(final)
    ranks.barrier()
    part = partial_path(final)
    dtype = dtype_of(config)
    pieces = list(_pieces(engine, ranks.world, DTYPES[dtype].itemsize))
    shards = 1 + max(p.shard for p in pieces)
    kept = _kept_here(
        engine, pieces, ranks, dtype, from_masters=dtype == "fp32" and config.precision in ("bf16", "fp16")
    )
    written = {}
    for shard, tensors in kept.items():
        path = part / shard_name(shard, shards)
        save_file(tensors, path, metadata={"format": "pt"})
        fsync_path(path)
        written[path.name] = sha256_file(path)
    digests = {name: tensor_digest(t) for tensors in kept.values() for name, t in tensors.items()}
    write_atomic(part / f".rank-{ranks.rank}.json", json.dumps({"files": written, "tensors": digests}))
    ranks.barrier()
    if ranks.first:
        _finish(final, part, engine, config, hf, ranks, step, tokens, pieces, shards, dtype)
    ranks.barrier()
    return str(read_json(final / MANIFEST)["weights"])


def shard_name(shard: int, shards: int) -> str:
    """transformers' name of a weights file."""
    return "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def _pieces(engine: Any, world: int, itemsize: int) -> Iterator[Piece]:
    """The model's tensors in order, cut into about equal shards: one a rank, more where they would be too large."""
    lm = engine.module.lm
    named = [(zero_state.own_name(n), p) for n, p in engine.module.named_parameters()]
    held = {name for name, _ in named}
    tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
    saved = lm.state_dict(keep_vars=True)
    named += [(n, b) for n, b in lm.named_buffers() if n in saved and n not in held and n not in tied]
    total = sum(math.prod(zero_state.full_shape(t)) for _, t in named)
    shards = max(world, math.ceil(total * itemsize / SHARD_BYTES)) if total > 1 << 16 else 1
    done = 0
    for name, tensor in named:
        yield Piece(name, tensor, min(shards - 1, done * shards // total))
        done += math.prod(zero_state.full_shape(tensor))


def _kept_here(
    engine: Any, pieces: list[Piece], ranks: Ranks, dtype: str, *, from_masters: bool
) -> dict[int, dict[str, torch.Tensor]]:
    """CPU copies of the tensors in this rank's shards: {shard: {name: tensor}}. A collective at stage 3."""
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(piece: Piece, tensor: torch.Tensor) -> None:
        if piece.shard % ranks.world == ranks.rank:
            kind = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
            copied = tensor.detach().to(device="cpu", dtype=kind, copy=True).contiguous()
            kept.setdefault(piece.shard, {})[piece.name] = copied

    for group in _gather_groups(pieces):
        if from_masters:
            for piece in group:
                trained = isinstance(piece.tensor, torch.nn.Parameter) and piece.tensor.requires_grad
                keep(piece, zero_state.master_weight(engine, piece.tensor) if trained else piece.tensor)
        else:
            with (
                torch.no_grad(),
                zero_state.gathered(engine, [p.tensor for p in group if _sharded(p.tensor)]),
            ):
                for piece in group:
                    keep(piece, piece.tensor)
    return kept


def _sharded(tensor: Any) -> bool:
    return hasattr(tensor, "ds_shape")


def _gather_groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += math.prod(zero_state.full_shape(piece.tensor))
        if size >= GATHER_NUMEL:
            yield group
            group, size = [], 0
    if group:
        yield group


def _finish(
    final: Path,
    part: Path,
    engine: Any,
    config: Config,
    hf: Any,
    ranks: Ranks,
    step: int,
    tokens: int,
    pieces: list[Piece],
    shards: int,
    dtype: str,
) -> None:
    """Rank 0, once every rank's files are on disk: index, config, tokenizer, manifest, and into place."""
    hashes: dict[str, str] = {}
    digests: dict[str, str] = {}
    for rank in range(ranks.world):
        sidecar = part / f".rank-{rank}.json"
        told = read_json(sidecar)
        hashes |= told["files"]
        digests |= told["tensors"]
        sidecar.unlink()
    weights = fingerprint_of_digests(digests)
    if shards > 1:
        numel = sum(math.prod(zero_state.full_shape(p.tensor)) for p in pieces)
        index = {
            "metadata": {"total_size": numel * DTYPES[dtype].itemsize},
            "weight_map": {p.name: shard_name(p.shard, shards) for p in pieces},
        }
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    described = copy.deepcopy(hf)
    described.architectures = [type(engine.module.lm).__name__]
    described.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    described.save_pretrained(part)
    generation = getattr(engine.module.lm, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(part)
    copy_tokenizer_files(config.data_dir / "tokenizer", part)
    if _same_weights_are_there(final, weights):
        import shutil

        shutil.rmtree(part)
        return
    _move_aside(final, config)
    manifest = {"kind": "snapshot", "step": step, "tokens": tokens, "dtype": dtype, "weights": weights}
    commit(final, manifest, hashes)


def _same_weights_are_there(final: Path, weights: str) -> bool:
    manifest = final / MANIFEST
    return manifest.is_file() and read_json(manifest).get("weights") == weights


def _move_aside(final: Path, config: Config) -> None:
    """What an earlier attempt left at this step is kept, out of the way, with the tables that were made from it."""
    if not final.exists():
        return
    run = RunDir(config.run_dir)
    places = (run.path / "replaced" / f"{final.name}.{number}" for number in count(1))
    place = next(p for p in places if not p.exists())
    place.mkdir(parents=True)
    final.rename(place / "snapshot")
    for table in run.losses.glob(f"*/{final.name}@*"):
        table.rename(place / table.name)
    run.add_event("replaced", f"{final.name} of an earlier attempt had other weights; it is in {place}")
