"""Snapshots: a Hugging Face model directory from any ZeRO stage, each rank writing some of its safetensors files.

No rank ever holds the whole model because of it: at stage 3 parameters are gathered a piece at a time, and a rank keeps
only what goes into its own files.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from configs.errors import DataError
from configs.fault_injection import reached
from configs.files.atomic import commit, partial_path, read_manifest, verify
from configs.run.directory import RunDir, step_name
from configs.schema import Config
from eval.distributed.ranks import Ranks
from eval.reference.tokenizer import copy_tokenizer_files
from eval.scoring.models import ADAPTER, DTYPES, fingerprint_of_digests, tensor_digest, weights_fingerprint
from eval.tables import read_mean_loss
from trainer.checkpoint.adapter_files import base_of, has_adapter, peft_name, write_adapter_config
from trainer.checkpoint.async_save import HostCopy
from trainer.checkpoint.checkpoint import Clock
from trainer.checkpoint.collective_write import save_tensors, write_together
from trainer.engine import zero_state
from trainer.engine.ema import EmaWeights

SHARD_BYTES = 5 << 30
GATHER_NUMEL = 64 << 20  # parameters gathered at once at ZeRO-3


@dataclass(frozen=True)
class Piece:
    """A tensor of the model on its way into a file."""

    name: str  # in the file
    tensor: Any
    shard: int
    own: str  # in the model


def dtype_of(config: Config) -> str:
    """The kind of number that snapshots hold: fp32 masters for fp32 and amp, the 16-bit weights otherwise."""
    held = {"fp32": "fp32", "amp": "fp32", "bf16": "bf16", "fp16": "fp16"}[config.precision or "fp32"]
    return config.snapshot.dtype or held


@dataclass(frozen=True)
class SnapshotCopy:
    """What a snapshot will hold, out of reach of further training once its host copy is filled."""

    final: Path
    kept: dict[int, dict[str, torch.Tensor]]  # this rank's shards, in host memory
    files: dict[int, str]  # names of all shards
    weight_map: dict[str, str]
    numel: int
    manifest: dict[str, Any]


def copy_snapshot(
    engine: Any,
    config: Config,
    ranks: Ranks,
    clock: Clock,
    memory: HostCopy,
    average: EmaWeights | None = None,
) -> SnapshotCopy:
    """Copies what goes into this rank's files to host memory; a collective at ZeRO-3 and where masters are wanted.

    Args:
        average: take this instead of the weights, for the run's `ema/`.
    """
    run = RunDir(config.run_dir)
    dtype = dtype_of(config)
    pieces = list(_pieces(engine, ranks.world, DTYPES[dtype].itemsize))
    here = [piece.tensor for piece in pieces if piece.shard % ranks.world == ranks.rank]
    size = sum(math.prod(zero_state.full_shape(tensor)) * _kind(tensor, dtype).itemsize for tensor in here)
    memory.refill(len(here), size)
    kept = _kept_here(engine, pieces, ranks, dtype, _whole_weight(engine, config, average), memory)
    memory.seal()
    files = dict(_files(pieces, adapter=has_adapter(engine.module.lm)))
    manifest = {
        "kind": "snapshot",
        "step": clock.step,
        "tokens": clock.tokens,
        "dtype": dtype,
        **({} if average is None else {"ema_decay": average.decay}),
    }
    return SnapshotCopy(
        final=(run.snapshots if average is None else run.ema) / step_name(clock.step),
        kept=kept,
        files=files,
        weight_map={piece.name: files[piece.shard] for piece in pieces},
        numel=sum(math.prod(zero_state.full_shape(piece.tensor)) for piece in pieces),
        manifest=manifest,
    )


def write_snapshot(copied: SnapshotCopy, lm: Any, hf: Any, config: Config, ranks: Ranks) -> None:
    """Writes a copy from all ranks, and puts it in place.

    A whole snapshot of the same weights that is there already stays as it is; one of other weights (an earlier attempt
    at another world size, say) is moved to `replaced/` with its loss tables.

    Args:
        lm: the model that was copied, which says what is not in its weights.

    Raises:
        SaveFailed: it is not there.
    """
    run = RunDir(config.run_dir)

    def own(part: Path) -> dict[str, Any]:
        reached("copied")
        names = {copied.files[shard]: tensors for shard, tensors in copied.kept.items()}
        return {
            "files": {name: save_tensors(tensors, part / name) for name, tensors in names.items()},
            "tensors": {name: tensor_digest(t) for tensors in names.values() for name, t in tensors.items()},
        }

    def join(part: Path, told: list[dict[str, Any]]) -> None:
        digests = {name: digest for rank in told for name, digest in rank["tensors"].items()}
        hashes = {name: sha256 for rank in told for name, sha256 in rank["files"].items()}
        dtype = copied.manifest["dtype"]
        _describe(part, lm, hf, config, dtype)
        if has_adapter(lm):
            base = base_of(config)
            digests["base"] = weights_fingerprint(base)
            write_adapter_config(part, lm, base)
        _write_index(part, copied, dtype)
        own = {"base": digests["base"]} if "base" in digests else {}  # an adapter's
        manifest = {**copied.manifest, **own, "weights": fingerprint_of_digests(digests)}
        _put_in_place(copied.final, run, manifest, hashes)

    size = sum(tensor.nbytes for tensors in copied.kept.values() for tensor in tensors.values())
    write_together(copied.final, ranks, size, own, join)


def weights_of(directory: Path) -> str:
    """The fingerprint of the weights in a snapshot. Raises DataError where its manifest is missing or damaged."""
    return str(read_manifest(directory, "snapshot")["weights"])


def shard_name(shard: int, shards: int, *, adapter: bool = False) -> str:
    """transformers' name of a weights file, or peft's of an adapter's."""
    if adapter:
        return ADAPTER
    return "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def _pieces(engine: Any, world: int, itemsize: int) -> Iterator[Piece]:
    """The model's tensors in order, cut into about equal shards: one a rank, more where they would be too large."""
    lm = engine.module.lm
    if has_adapter(lm):  # one file, of what is trained alone
        yield from (Piece(peft_name(name), parameter, 0, name) for name, parameter in zero_state.trainable(engine))
        return
    named = [(zero_state.own_name(n), p) for n, p in engine.module.named_parameters()]
    held = {name for name, _ in named}
    tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
    saved = lm.state_dict(keep_vars=True)
    named += [(n, b) for n, b in lm.named_buffers() if n in saved and n not in held and n not in tied]
    total = sum(math.prod(zero_state.full_shape(t)) for _, t in named)
    shards = max(world, math.ceil(total * itemsize / SHARD_BYTES)) if total > 1 << 16 else 1
    done = 0
    for name, tensor in named:
        yield Piece(name, tensor, min(shards - 1, done * shards // total), name)
        done += math.prod(zero_state.full_shape(tensor))


def _files(pieces: list[Piece], *, adapter: bool) -> list[tuple[int, str]]:
    """(shard, file name) of all weights files."""
    shards = 1 + max(piece.shard for piece in pieces)
    return [(shard, shard_name(shard, shards, adapter=adapter)) for shard in range(shards)]


def _whole_weight(engine: Any, config: Config, average: EmaWeights | None) -> Callable[[Piece], torch.Tensor] | None:
    """What gives a trained weight as the snapshot should hold it; None: the weights as the model has them."""
    if average is not None:
        return lambda piece: average.whole(piece.own, piece.tensor)
    if dtype_of(config) == "fp32" and config.precision in ("bf16", "fp16"):
        return lambda piece: zero_state.master_weight(engine, piece.tensor)
    return None


def _kept_here(
    engine: Any,
    pieces: list[Piece],
    ranks: Ranks,
    dtype: str,
    whole_weight: Callable[[Piece], torch.Tensor] | None,
    memory: HostCopy,
) -> dict[int, dict[str, torch.Tensor]]:
    """CPU copies of the tensors in this rank's shards: {shard: {name: tensor}}. A collective."""
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(piece: Piece, tensor: torch.Tensor) -> None:
        if piece.shard % ranks.world == ranks.rank:
            kept.setdefault(piece.shard, {})[piece.name] = memory.take(tensor, _kind(tensor, dtype))

    for group in _gather_groups(pieces):
        as_held = [piece for piece in group if whole_weight is None or not _trained(piece.tensor)]
        with torch.no_grad(), zero_state.gathered(engine, [p.tensor for p in as_held if _sharded(p.tensor)]):
            for piece in as_held:
                keep(piece, piece.tensor)
        if whole_weight is not None:
            for piece in group:
                if _trained(piece.tensor):
                    keep(piece, whole_weight(piece))
    return kept


def _kind(tensor: Any, dtype: str) -> torch.dtype:
    """What a tensor is in a snapshot: a buffer of integers stays one."""
    kind: torch.dtype = DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype
    return kind


def _trained(tensor: Any) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad


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


def _describe(part: Path, lm: Any, hf: Any, config: Config, dtype: str) -> None:
    """What a Hugging Face directory has beside the weights: config, generation config, tokenizer."""
    described = copy.deepcopy(hf)
    described.architectures = [type(lm).__name__]
    described.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    described.save_pretrained(part)
    generation = getattr(lm, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(part)
    copy_tokenizer_files(config.data_dir / "tokenizer", part)


def _write_index(part: Path, copied: SnapshotCopy, dtype: str) -> None:
    """Says which tensor is in which file, where there are several."""
    if len(copied.files) == 1:
        return
    index = {
        "metadata": {"total_size": copied.numel * DTYPES[dtype].itemsize},
        "weight_map": copied.weight_map,
    }
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _put_in_place(final: Path, run: RunDir, manifest: dict[str, Any], hashes: dict[str, str]) -> None:
    there, damaged = _weights_there(final)
    if there == manifest["weights"]:
        shutil.rmtree(partial_path(final))
        return
    _move_aside(final, run, manifest["weights"], damaged)
    commit(final, manifest, hashes)


def _weights_there(final: Path) -> tuple[str, str]:
    """(fingerprint of the weights of the snapshot that is there and whole, else ""; what is wrong with it, else "")."""
    if not final.exists():
        return "", ""
    try:
        return str(verify(final, "snapshot").get("weights")), ""
    except DataError as error:
        return "", str(error)


def _is_of(table: Path, weights: str) -> bool:
    """Whether a loss table was made from these weights; the folder of a scoring at work knows that by itself."""
    try:
        return table.is_dir() or read_mean_loss(table)[1].get("source") == weights
    except DataError:
        return False


def _move_aside(final: Path, run: RunDir, weights: str, damaged: str) -> None:
    """What an earlier attempt left at this step is kept, out of the way, with the tables that were made from it.

    A table of these very weights stays where it is: what it was made from was whole then.
    """
    label = f"{final.name}.ema" if final.parent == run.ema else final.name  # as `vernier eval` names its tables
    tables = [table for table in run.losses.glob(f"*/{label}@*") if not _is_of(table, weights)]
    if not final.exists() and not tables:
        return
    places = (run.path / "replaced" / f"{label}.{number}" for number in count(1))
    place = next(p for p in places if not p.exists())
    place.mkdir(parents=True)
    if final.exists():  # it may have been thinned out, and its tables not
        final.rename(place / "snapshot")
    for table in tables:
        table.rename(place / table.name)
    told = f"{label} of an earlier attempt {'is damaged: ' + damaged if damaged else 'had other weights'}"
    run.add_event("replaced", f"{told}; it is in {place}")
