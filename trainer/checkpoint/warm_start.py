"""`model.path: RUN@STEP`: the weights that a run had after a step, to start another training from. No optimizer state.

The checkpoint of that step is read where there is one, for its fp32 masters; else its snapshot. Never another step's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.errors import ConfigError, DataError
from configs.files.atomic import read_json, verify
from configs.run.directory import RunDir, step_name, step_of
from trainer.checkpoint.checkpoint import STATE, VERSION, file_names, state_problem

_NAMED = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class StepWeights:
    """Weights of a step of a run."""

    step: int
    home: Path  # the Hugging Face directory that says what kind of model it is, and has its tokenizer
    checkpoint: Path | None  # None: they are in `home`


def find_step(path: Path) -> StepWeights | None:
    """What `RUN@STEP` means; None where `path` is written otherwise, or is a directory of that very name.

    Raises:
        ConfigError: there is no such run, or nothing of that step; names the steps that there are.
    """
    named = _NAMED.fullmatch(str(path))
    if named is None or path.is_dir():
        return None
    run, step = RunDir(Path(named[1])), int(named[2])
    if not run.config.is_file():
        raise ConfigError(f"model.path: {path}: {run.path} is not a run directory (it has no config.yaml)")
    shown, kept = run.whole_steps(run.snapshots), run.whole_steps(run.checkpoints)
    if not shown or step not in {*shown, *kept}:
        steps = ", ".join(map(str, sorted({*shown, *kept}))) or "none"
        raise ConfigError(f"model.path: {run.path} has no snapshot and no checkpoint of step {step}; it has: {steps}")
    home = run.snapshots / step_name(step if step in shown else shown[-1])
    return StepWeights(step, home, run.checkpoints / step_name(step) if step in kept else None)


def check_step(found: StepWeights, *, hashes: bool) -> None:
    """Refuses weights that are not as they were written.

    Raises:
        DataError: names the file.
    """
    verify(found.home, "snapshot", hashes=hashes)
    if found.checkpoint is not None:
        verify(found.checkpoint, "checkpoint", hashes=hashes)


@torch.no_grad()
def load_masters(model: Any, checkpoint: Path) -> None:
    """Fills a causal LM with the fp32 master weights and the buffers of a checkpoint that was checked.

    Raises:
        DataError: it is of another model or another format. Nothing is in the model then that should not be used.
    """
    state = read_json(checkpoint / STATE)
    if state.get("version") != VERSION:
        raise DataError(
            f"{checkpoint}: checkpoint format {state.get('version') or 'unknown'}, this Vernier reads {VERSION}"
        )
    problem = state_problem(state, step_of(checkpoint.name))
    if problem is not None:
        raise DataError(f"{checkpoint / STATE}: {problem}")
    files = {name: safe_open(checkpoint / name, "pt") for name in file_names(state)}
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    odd = sorted(set(wanted) ^ set(state["parameters"]))
    if odd:
        raise DataError(f"{checkpoint}: of another model: {odd[0]} is in only one of the two")
    for name, parameter in wanted.items():
        entry = state["parameters"][name]
        lengths = sum(length for _, length, _ in entry["parts"])
        if entry["shape"] != list(parameter.shape) or lengths != math.prod(parameter.shape):
            raise DataError(f"{checkpoint}: of another model: {name} has shape {entry['shape']}")
        flat = torch.cat([files[file].get_tensor(f"master/{name}") for _, _, file in entry["parts"]])
        parameter.copy_(flat.view(parameter.shape))
    first = files[file_names(state)[0]]
    saved = set(first.keys())
    for name, buffer in model.named_buffers():
        if f"buffer/{name}" in saved:
            buffer.copy_(first.get_tensor(f"buffer/{name}"))
