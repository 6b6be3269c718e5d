"""Checkpoints: all that is needed to go on, as safetensors and JSON, whole or not there.

Every rank writes the fragments of the fp32 state that it owns. Whoever goes on reads just the ranges it needs, so the
world size and the ZeRO stage may be others.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.errors import DataError
from configs.fault_injection import reached
from configs.files.atomic import commit, read_json
from configs.run.directory import RunDir, step_name
from eval.distributed.ranks import Ranks
from trainer.checkpoint.async_save import HostCopy
from trainer.checkpoint.collective_write import save_tensors, write_together
from trainer.engine import zero_state
from trainer.engine.ema import EmaWeights

VERSION = 1
STATE = "state.json"


@dataclass(frozen=True)
class Clock:
    """Where training stands: updates made, batches used up, targets seen, batches used up since the last update."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    idle: int = 0

    def after(self, applied: bool, targets: int) -> Clock:
        """One batch later: `applied` says whether its update was made."""
        made, idle = (1, 0) if applied else (0, self.idle + 1)
        return Clock(self.step + made, self.position + 1, self.tokens + targets, idle)


@dataclass(frozen=True)
class CheckpointCopy:
    """What a checkpoint will hold, out of reach of further training once its host copy is filled."""

    clock: Clock
    tensors: dict[str, torch.Tensor]  # of this rank, in host memory
    index: dict[str, Any]  # which range of which parameter each of them is
    facts: dict[str, Any]


def copy_checkpoint(
    engine: Any,
    ranks: Ranks,
    clock: Clock,
    memory: HostCopy,
    average: EmaWeights | None = None,
    passed_over: Sequence[int] = (),
) -> CheckpointCopy:
    """Copies this rank's part of all that is needed to go on to host memory; most of it while the next step goes on.

    No update may be made before `memory.wait_until_taken`.
    """
    owned = list(zero_state.fragments(engine))
    saved = set(engine.module.lm.state_dict(keep_vars=True)) if ranks.is_rank_zero else set()
    buffers = [(name, buffer) for name, buffer in engine.module.lm.named_buffers() if name in saved]
    kinds = len(zero_state.KINDS) + (average is not None)
    size = kinds * 4 * sum(fragment.length for fragment in owned) + sum(buffer.nbytes for _, buffer in buffers)
    memory.refill(kinds * len(owned) + len(buffers), size)
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, Any] = {}
    for fragment in owned:
        index[fragment.name] = {"shape": fragment.shape, "start": fragment.start, "length": fragment.length}
        for kind, value in zero_state.values(engine, fragment).items():
            tensors[f"{kind}/{fragment.name}"] = memory.take(value, torch.float32, later=True)
    if average is not None:
        for name, held in average.fragments():
            tensors[f"ema/{name}"] = memory.take(held, torch.float32, later=True)
    for name, buffer in buffers:
        tensors[f"buffer/{name}"] = memory.take(buffer, buffer.dtype)
    memory.seal()
    facts = {
        "version": VERSION,
        "clock": asdict(clock),
        "world": ranks.world,
        "zero_stage": engine.zero_optimization_stage(),
        "adam_step": zero_state.adam_step(engine) if ranks.is_rank_zero else None,
        "counters": zero_state.counters(engine),
        "loss_scale": zero_state.loss_scale_state(engine),
        "ema_decay": None if average is None else average.decay,
        "passed_over": list(passed_over),
    }
    return CheckpointCopy(clock, tensors, index, facts)


def write_checkpoint(
    copied: CheckpointCopy, run: RunDir, ranks: Ranks, before: Callable[[], None] = lambda: None
) -> None:
    """Writes a copy from all ranks, and puts it in place.

    Args:
        before: on the first rank, puts on the disk what must be there before the checkpoint is.

    Raises:
        SaveFailed: it is not there; what was there before is.
    """
    final = run.checkpoints / step_name(copied.clock.step)

    def own(part: Path) -> dict[str, Any]:
        reached("copied")
        starts = {name: [0] * tensor.dim() for name, tensor in copied.tensors.items()}
        for kind in (*zero_state.KINDS, "ema"):
            starts |= {f"{kind}/{n}": [at["start"]] for n, at in copied.index.items() if f"{kind}/{n}" in starts}
        # By this key torch's own reader (torch.distributed.checkpoint) finds the ranges, as flat tensors.
        metadata = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": at} for name, at in starts.items()})}
        sha256 = save_tensors(copied.tensors, part / _file_name(ranks.rank), metadata)
        return {"sha256": sha256, "fragments": copied.index}

    def join(part: Path, told: list[dict[str, Any]]) -> None:
        before()
        state = {**copied.facts, "parameters": _merged(rank["fragments"] for rank in told)}
        (part / STATE).write_text(json.dumps(state))
        _put_in_place(final, copied.clock.step, {_file_name(rank): one["sha256"] for rank, one in enumerate(told)})

    size = sum(tensor.nbytes for tensor in copied.tensors.values())
    write_together(final, ranks, size, own, join)


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


def clear_up(run: RunDir) -> None:
    """Removes what a killed attempt has left half written, and puts back what it was about to replace.

    For the first rank, once it holds the run's lock.
    """
    for replaced in run.checkpoints.glob(".step-*.replaced"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(replaced)
        else:  # killed between the two renames of `_put_in_place`
            replaced.rename(final)
    for folder in (run.checkpoints, run.snapshots, run.ema):
        for part in folder.glob(".step-*.partial"):
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink()


def _put_in_place(final: Path, step: int, hashes: dict[str, str]) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # of this very step: the new one is whole on disk before the old one goes
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    try:
        commit(final, {"kind": "checkpoint", "step": step}, hashes)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(
    engine: Any,
    directory: Path,
    accumulation: int,
    average: EmaWeights | None = None,
    moved: Callable[[str, int, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[Clock, dict[str, Any]]:
    """Puts the engine where the checkpoint was; gives the clock and the rest of its `state.json`.

    A moving average that the checkpoint does not hold starts from its weights.

    Args:
        directory: whole, as `trainer.checkpoint.find_whole.find_whole_checkpoint` gives it.
        moved: what to make of master weights, by name and start in the flat parameter, [length]; none: as they are.

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
        return moved(name, start, out) if moved is not None and kind == "master" else out

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
    return Clock(**state["clock"]), state


def file_names(state: dict[str, Any]) -> list[str]:
    """The files of tensors that a checkpoint's `state.json` leads to; the first rank's also holds the buffers."""
    return sorted({_file_name(0), *(part[2] for entry in state["parameters"].values() for part in entry["parts"])})


def state_problem(state: Any, step: int | None) -> str | None:
    """What is wrong with the `state.json` of a checkpoint; None for a good one, or one of another format.

    Args:
        step: that which its directory is called by; None: any.
    """
    if not isinstance(state, dict):
        return "no object"
    if state.get("version") != VERSION:
        return None  # refused, with a reason of its own, when it is loaded
    clock = state.get("clock")
    known = {field.name for field in fields(Clock)}
    if not isinstance(clock, dict) or not {"step", "position", "tokens"} <= set(clock) <= known:
        return f"its clock is {clock!r}"
    if any(type(count) is not int or count < 0 for count in clock.values()):
        return f"its clock is {clock!r}"
    if step is not None and clock["step"] != step:
        return f"its clock stands at step {clock['step']}, its directory is called {step_name(step)}"
    lacks = {"world", "zero_stage", "adam_step", "counters", "loss_scale", "parameters"} - set(state)
    if lacks:
        return f"it has no {min(lacks)}"
    parameters = state["parameters"]
    whole = isinstance(parameters, dict) and all(map(_is_entry, parameters.values()))
    return None if whole else "it does not say where its parameters are"


def _is_entry(entry: Any) -> bool:
    try:
        parts = [(type(start), type(length), type(file)) for start, length, file in entry["parts"]]
        return bool(parts) and set(parts) == {(int, int, str)} and all(type(size) is int for size in entry["shape"])
    except (KeyError, TypeError, ValueError):
        return False


def _check_tiling(directory: Path, state: dict[str, Any], engine: Any) -> None:
    """Every parameter of the model must be covered exactly once, none may be strange."""
    if state.get("version") != VERSION:
        raise DataError(
            f"{directory}: checkpoint format {state.get('version') or 'unknown'}, this Vernier reads {VERSION}"
        )
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
