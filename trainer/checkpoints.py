"""Checkpoints: all that is needed to go on, as safetensors and JSON, whole or not there.

Every rank writes the fragments of the fp32 state that it owns. Whoever goes on reads just the ranges it needs, so the
world size and the ZeRO stage may be others.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.errors import DataError
from configs.rundir import RunDir, step_name
from configs.whole import commit, read_json
from eval.ranks import Ranks
from trainer import zero_state
from trainer.ema import MovingAverage
from trainer.together import begin_together, save_tensors, tell_first

VERSION = 1
STATE = "state.json"


@dataclass(frozen=True)
class Clock:
    """Where training stands: updates made, batches used up, targets seen."""

    step: int = 0
    position: int = 0
    tokens: int = 0


def save_checkpoint(engine: Any, run: RunDir, ranks: Ranks, clock: Clock, average: MovingAverage | None = None) -> None:
    """Writes checkpoint `clock.step` from all ranks, and commits it."""
    final = run.checkpoints / step_name(clock.step)
    part = begin_together(final, ranks)
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, Any] = {}
    for fragment in zero_state.fragments(engine):
        index[fragment.name] = {"shape": fragment.shape, "start": fragment.start, "length": fragment.length}
        for kind, value in zero_state.values(engine, fragment).items():
            tensors[f"{kind}/{fragment.name}"] = value.to("cpu", torch.float32, copy=True)
    if average is not None:
        for name, held in average.fragments():
            tensors[f"ema/{name}"] = held.to("cpu", copy=True)
    if ranks.first:
        kept = engine.module.lm.state_dict(keep_vars=True)
        for name, buffer in engine.module.lm.named_buffers():
            if name in kept:
                tensors[f"buffer/{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
    sha256 = save_tensors(tensors, part / _file_name(ranks.rank))
    told = tell_first(part, ranks, {"sha256": sha256, "fragments": index})
    if told is not None:
        state = {
            "version": VERSION,
            "clock": asdict(clock),
            "world": ranks.world,
            "zero_stage": engine.zero_optimization_stage(),
            "adam_step": zero_state.adam_step(engine),
            "counters": zero_state.counters(engine),
            "loss_scale": zero_state.loss_scale_state(engine),
            "ema_decay": None if average is None else average.decay,
            "parameters": _merged(rank["fragments"] for rank in told),
        }
        (part / STATE).write_text(json.dumps(state))
        _put_in_place(final, clock.step, {_file_name(rank): one["sha256"] for rank, one in enumerate(told)})
    ranks.barrier()


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _merged(told: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Where the ranges of each parameter are, from what each rank tells of its own."""
    merged: dict[str, Any] = {}
    for rank, fragments in enumerate(told):
        for name, at in fragments.items():
            entry = merged.setdefault(name, {"shape": at["shape"], "parts": []})
            entry["parts"].append([at["start"], at["length"], _file_name(rank)])
    for entry in merged.values():
        entry["parts"].sort()
    return merged


def _put_in_place(final: Path, step: int, hashes: dict[str, str]) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # of this very step: the new one is whole on disk before the old one goes
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    commit(final, {"kind": "checkpoint", "step": step}, hashes)
    shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(
    engine: Any, directory: Path, accumulation: int, average: MovingAverage | None = None
) -> tuple[Clock, dict[str, Any]]:
    """Puts the engine where the checkpoint was; gives the clock and (world, zero_stage, ema_decay) it was written with.

    A moving average that the checkpoint does not hold starts from its weights.

    Args:
        directory: whole, as `trainer.quarantine.find_whole_checkpoint` gives it.

    Raises:
        DataError: the checkpoint is of another model or another format. Nothing was changed.
    """
    state = read_json(directory / STATE)
    _check_tiling(directory, state, engine)
    files = {name: safe_open(directory / name, "pt") for name in file_names(state)}

    def lookup(kind: str, name: str, start: int, length: int) -> torch.Tensor:
        out = torch.empty(length)
        for part_start, part_length, file in state["parameters"][name]["parts"]:
            low, high = max(start, part_start), min(start + length, part_start + part_length)
            if low < high:
                piece = files[file].get_slice(f"{kind}/{name}")[low - part_start : high - part_start]
                out[low - start : high - start] = piece
        return out

    zero_state.restore(engine, lookup, state["adam_step"])
    if average is not None and state.get("ema_decay") is not None:
        average.restore(lookup)
    elif average is not None:
        average.start()
    first = files[_file_name(0)]
    saved = set(first.keys())
    for name, buffer in engine.module.lm.named_buffers():
        if f"buffer/{name}" in saved:
            buffer.data.copy_(first.get_tensor(f"buffer/{name}"))
    zero_state.restore_counters(engine, state["counters"], accumulation)
    zero_state.restore_loss_scale(engine, state["loss_scale"])
    written_by = {key: state.get(key) for key in ("world", "zero_stage", "ema_decay")}
    return Clock(**state["clock"]), written_by


def file_names(state: dict[str, Any]) -> list[str]:
    """The files of tensors that a checkpoint's `state.json` leads to; the first rank's also holds the buffers."""
    return sorted({_file_name(0), *(part[2] for entry in state["parameters"].values() for part in entry["parts"])})


def _check_tiling(directory: Path, state: dict[str, Any], engine: Any) -> None:
    """Every parameter of the model must be covered exactly once, none may be strange."""
    if state.get("version") != VERSION:
        raise DataError(f"{directory}: checkpoint format {state.get('version')}, this Vernier reads {VERSION}")
    wanted = {name: list(zero_state.full_shape(p)) for name, p in zero_state.trainable(engine)}
    odd = sorted(set(wanted) ^ set(state["parameters"]))
    if odd:
        raise DataError(f"{directory}: of another model: {odd[0]} is in only one of the two")
    for name, shape in wanted.items():
        entry, end = state["parameters"][name], 0
        if entry["shape"] != shape:
            raise DataError(f"{directory}: of another model: {name} has shape {entry['shape']}, the model's is {shape}")
        for start, length, _ in entry["parts"]:
            if start != end:
                raise DataError(f"{directory}: {name} is not covered from {end} to {start}")
            end = start + length
        if end != math.prod(shape):
            raise DataError(f"{directory}: {name} is covered up to {end} of {math.prod(shape)}")
