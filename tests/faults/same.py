"""Whether a run is, to the last bit, another one; and whether what lies in its folders is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from configs.errors import DataError
from configs.files.atomic import verify
from configs.run.directory import RunDir, read_jsonl

OF_A_STEP = ("step", "position", "tokens", "lr", "loss", "grad_norm")
OF_A_CHECKPOINT = ("clock", "world", "zero_stage", "adam_step", "counters", "loss_scale")
NOT_AFTER_A_KILL = ("quarantined", "replaced", "not scored")  # events: whatever is killed leaves nothing damaged


def tensors_of(checkpoint: Path) -> dict[str, NDArray[Any]]:
    """Master weights and both moments of a checkpoint by name, flat and whole, put together from the ranks' files."""
    state = json.loads((checkpoint / "state.json").read_text())
    files = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    whole = {}
    for name, entry in state["parameters"].items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            out = np.full(int(np.prod(entry["shape"])), np.nan, dtype=np.float32)
            for start, length, file in entry["parts"]:
                out[start : start + length] = files[file][f"{kind}/{name}"]
            whole[f"{kind}/{name}"] = out
    return whole


def not_whole(run: Path) -> list[str]:
    """What in `checkpoints/` and `snapshots/` goes by the name of a step and is not as its manifest says."""
    found = []
    for folder, kind in (("checkpoints", "checkpoint"), ("snapshots", "snapshot")):
        for directory in sorted((run / folder).glob("step-*")):
            try:
                verify(directory, kind)
            except DataError as error:
                found.append(f"looks whole and is not: {error}")
    return found


def differences(straight: Path, run: Path, *, scored: bool = True) -> list[str]:
    """What differs between a run and the one that nobody disturbed, a line each; empty where it is the same run."""
    found = [*_state(straight, run), *_steps(straight, run), *not_whole(run)]
    found += _folders(straight, run, [("checkpoints", "*"), ("snapshots", "*")])
    for checkpoint in sorted((straight / "checkpoints").glob("step-*")):
        if (run / "checkpoints" / checkpoint.name / "state.json").is_file():
            found += _checkpoint(checkpoint, run / "checkpoints" / checkpoint.name)
    for snapshot in sorted((straight / "snapshots").glob("step-*")):
        if _weights(snapshot) != _weights(run / "snapshots" / snapshot.name):
            found.append(f"{snapshot.name}: the snapshot has other weights")
    if scored:
        found += _folders(straight, run, [("losses", "*/*")])
        for table in sorted((straight / "losses").glob("*/*.parquet")):
            other = run / table.relative_to(straight)
            if other.is_file() and other.read_bytes() != table.read_bytes():
                found.append(f"{table.name}: another loss table")
    return found


def _state(straight: Path, run: Path) -> list[str]:
    before, now = (json.loads((one / "state.json").read_text()) for one in (straight, run))
    found = [
        f"state.json: {key} is {now.get(key)!r}, not {before.get(key)!r}"
        for key in ("state", "step", "steps", "exit_code", "failure")
        if before.get(key) != now.get(key)
    ]
    if RunDir(run).is_held():
        found.append("lock: still held")
    found += [f"{name}/ is there" for name in ("quarantine", "replaced") if (run / name).exists()]
    events = read_jsonl(run / "events.jsonl")
    return found + [f"event: {one['message']}" for one in events if one["kind"] in NOT_AFTER_A_KILL]


def _steps(straight: Path, run: Path) -> list[str]:
    before, now = (read_jsonl(one / "metrics.jsonl") for one in (straight, run))
    steps = [line["step"] for line in now]
    if steps != list(range(1, len(before) + 1)):
        twice = sorted({step for step in steps if steps.count(step) > 1})
        missing = sorted(set(range(1, len(before) + 1)) - set(steps))
        return [f"metrics.jsonl: {len(steps)} lines; steps twice: {twice}; steps missing: {missing}"]
    for one, other in zip(before, now, strict=True):
        for key in OF_A_STEP:
            if one[key] != other[key]:
                return [f"metrics.jsonl: from step {one['step']} on: {key} is {other[key]!r}, not {one[key]!r}"]
    return []


def _folders(straight: Path, run: Path, patterns: list[tuple[str, str]]) -> list[str]:
    found = []
    for folder, pattern in patterns:
        before, now = ({str(p.relative_to(one)) for p in (one / folder).glob(pattern)} for one in (straight, run))
        found += [f"{name}: missing" for name in sorted(before - now)]
        found += [f"{name}: should not be there" for name in sorted(now - before)]
    return found


def _checkpoint(before: Path, now: Path) -> list[str]:
    states = [json.loads((one / "state.json").read_text()) for one in (before, now)]
    found = [
        f"{now.name}/state.json: {key} is {states[1].get(key)!r}, not {states[0].get(key)!r}"
        for key in OF_A_CHECKPOINT
        if states[0].get(key) != states[1].get(key)
    ]
    tensors, others = tensors_of(before), tensors_of(now)
    if set(tensors) != set(others):
        return [*found, f"{now.name}: other tensors: {sorted(set(tensors) ^ set(others))[:3]}"]
    odd = [name for name, tensor in tensors.items() if tensor.tobytes() != others[name].tobytes()]
    return found + ([f"{now.name}: {len(odd)} of {len(tensors)} tensors differ, {odd[0]} first"] if odd else [])


def _weights(snapshot: Path) -> Any:
    manifest = snapshot / "manifest.json"
    return json.loads(manifest.read_text()).get("weights") if manifest.is_file() else None
