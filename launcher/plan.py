"""`vernier plan`: what a training would take, reckoned before anything is started: tokens, memory, host memory, disk.

The arithmetic is in configs.host_memory and configs.memory; here it is asked, held against this machine, and told.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.devices import gpu_count
from configs.errors import EXIT_DONE, DataError
from configs.host_memory import (
    FP32,
    SavingCopy,
    TrainingState,
    checkpoint_bytes,
    checkpoints_kept,
    saving_copy,
    snapshot_bytes,
    snapshots_kept,
    training_state,
)
from configs.load import load_config, micro_batch, resolve
from configs.memory import gib
from configs.whole import read_json
from launcher.plan_model import Model, find_model
from launcher.verdict_words import new_table, print_table, say

if TYPE_CHECKING:
    from configs.schema import Config


@dataclass(frozen=True)
class Plan:
    """What a training would take. Memory is in bytes a rank unless it says otherwise."""

    config: Config
    model: Model
    on_gpu: bool
    windows: int | None  # prepared for training; None where the data is not prepared
    state: TrainingState
    saving: SavingCopy
    machine_bytes: int  # memory of this machine
    free_disk_bytes: int  # where run.dir is to be

    @property
    def ranks(self) -> int:
        return self.config.nproc or 1

    @property
    def average(self) -> bool:
        return self.config.ema.decay is not None

    @property
    def host_bytes(self) -> int:
        """Host memory that all ranks of this machine take at most, as far as it is reckoned."""
        own = self.state.host if self.on_gpu else self.state.device + self.state.host
        return max(self.starting_bytes, self.ranks * (own + self.saving.most))

    @property
    def starting_bytes(self) -> int:
        """Host memory of all ranks while they start: each builds the whole model in fp32, before it is cut."""
        return self.ranks * FP32 * self.model.parameters

    @property
    def checkpoint(self) -> int:
        return checkpoint_bytes(self.model.parameters, average=self.average)

    @property
    def snapshot(self) -> int:
        """Of the weights; with `ema.decay` there is one more of the average."""
        return snapshot_bytes(self.model.parameters, snapshot_dtype(self.config)) * (2 if self.average else 1)

    @property
    def checkpoints(self) -> int:
        asked = self.config.checkpoint
        return checkpoints_kept(self.config.steps, every=asked.every, keep=asked.keep, keep_every=asked.keep_every)

    @property
    def snapshots(self) -> int:
        asked = self.config.snapshot
        return snapshots_kept(
            self.config.steps, every=asked.every, at=asked.at, keep=asked.keep, keep_every=asked.keep_every
        )

    @property
    def disk_bytes(self) -> int:
        return self.checkpoints * self.checkpoint + self.snapshots * self.snapshot


def run_plan(source: str, overrides: list[str], *, json_out: bool, console: Console) -> int:
    """Reckons what a config would take, and prints it.

    Raises:
        ConfigError: the settings are wrong, or the model's size cannot be told from them.
    """
    plan = make_plan(resolve(load_config(source, overrides)))
    if json_out:
        json.dump(to_json(plan), sys.stdout, indent=2)
        print()
    else:
        _print(plan, console)
    return EXIT_DONE


def make_plan(config: Config) -> Plan:
    """The plan of a resolved config, on this machine."""
    data = _data_facts(config)
    model = find_model(config, data)
    return Plan(
        config=config,
        model=model,
        on_gpu=gpu_count() > 0,
        windows=None if data is None else max(0, (int(data["train"]["tokens"]) - 1) // config.sequence_length),
        state=_state(config, model.parameters),
        saving=_saving(config, model.parameters),
        machine_bytes=machine_memory(),
        free_disk_bytes=shutil.disk_usage(_existing(config.run_dir)).free,
    )


def _state(config: Config, parameters: int) -> TrainingState:
    return training_state(
        parameters,
        precision=config.precision or "fp32",
        stage=config.zero.stage,
        ranks=config.nproc or 1,
        offload=config.zero.offload == "cpu",
        average=config.ema.decay is not None,
    )


def _saving(config: Config, parameters: int) -> SavingCopy:
    average = config.ema.decay is not None
    return saving_copy(parameters, dtype=snapshot_dtype(config), ranks=config.nproc or 1, average=average)


def snapshot_dtype(config: Config) -> str:
    """The kind of number that snapshots hold."""
    half = config.precision in ("bf16", "fp16")
    return config.snapshot.dtype or (str(config.precision) if half else "fp32")


def _data_facts(config: Config) -> dict[str, Any] | None:
    path = config.data_dir / "dataset.json"
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or not {"vocab_size", "train"} <= set(found):
        raise DataError(f"data.dir: {path} is not what `vernier prepare` writes; prepare the data again with --fresh")
    return found


def machine_memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of this machine, or of the container where that has less."""
    with open(meminfo) as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemTotal:"))
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def warnings(plan: Plan) -> list[str]:
    """What does not fit, a line each, with the settings that would change it."""
    out = []
    if plan.host_bytes > plan.machine_bytes:
        out.append(
            f"memory: {gib(plan.host_bytes)} are more than this machine's {gib(plan.machine_bytes)}; {_advice(plan)}"
        )
    if plan.disk_bytes > plan.free_disk_bytes:
        fewer = ["checkpoint.keep"] if plan.config.checkpoint.keep > 1 else []
        fewer += ["snapshot.keep" if plan.config.snapshot.keep is None else "a smaller snapshot.keep"]
        out.append(
            f"disk: {gib(plan.disk_bytes)} are more than the {gib(plan.free_disk_bytes)} that are free at "
            f"{_existing(plan.config.run_dir)}; set {' or '.join(fewer)}, or another run.dir"
        )
    return out


def _advice(plan: Plan) -> str:
    """Settings of this machine's share, each with what memory would be with it alone, least first."""
    config, found = plan.config, []
    zero = config.zero
    tries: list[tuple[str, dict[str, Any]]] = []
    if zero.offload == "cpu" and plan.on_gpu:
        tries.append(("zero.offload=none", {"zero": zero.model_copy(update={"offload": "none"})}))
    if zero.stage < 3 and plan.ranks > 1 and not plan.on_gpu:
        tries.append(("zero.stage=3", {"zero": zero.model_copy(update={"stage": 3})}))
    if snapshot_dtype(config) == "fp32":
        tries.append(("snapshot.dtype=bf16", {"snapshot": config.snapshot.model_copy(update={"dtype": "bf16"})}))
    if plan.average:
        tries.append(("ema.decay=null", {"ema": config.ema.model_copy(update={"decay": None})}))
    if plan.ranks > 1 and not plan.on_gpu and zero.stage < 3:
        tries.append(("nproc=1", {"nproc": 1}))
    for name, change in tries:
        changed = config.model_copy(update=change)
        count = plan.model.parameters
        other = replace(plan, config=changed, state=_state(changed, count), saving=_saving(changed, count))
        if other.host_bytes < plan.host_bytes:
            found.append((other.host_bytes, name))
    found.sort()
    said = [f"{name} needs {gib(size)}" for size, name in found]
    return "; ".join([*said, "over more machines each has its part of it"])


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: counts, and bytes."""
    config, state, saving = plan.config, plan.state, plan.saving
    micro = micro_batch(config, plan.ranks)
    tokens = config.batch.global_ * config.sequence_length
    return {
        "model": plan.model.name,
        "parameters": plan.model.parameters,
        "notes": list(plan.model.notes),
        "ranks": plan.ranks,
        "micro": micro,
        "accumulation": config.batch.global_ // (plan.ranks * micro),
        "batch": config.batch.global_,
        "sequence_length": config.sequence_length,
        "tokens_a_step": tokens,
        "steps": config.steps,
        "tokens": tokens * config.steps,
        "windows": plan.windows,
        "precision": config.precision,
        "zero_stage": config.zero.stage,
        "memory_a_rank": {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "average": state.average,
            "device": state.device,
            "host": state.host,
        },
        "saving_a_rank": {
            "background": config.checkpoint.background,
            "checkpoint": saving.checkpoint,
            "snapshot": saving.snapshot,
            "average": saving.average,
            "most": saving.most,
        },
        "machine": {
            "needed": plan.host_bytes,
            "starting": plan.starting_bytes,
            "memory": plan.machine_bytes,
            "gpus": gpu_count(),
        },
        "disk": {
            "checkpoint": plan.checkpoint,
            "checkpoints": plan.checkpoints,
            "snapshot": plan.snapshot,
            "snapshots": plan.snapshots,
            "needed": plan.disk_bytes,
            "free": plan.free_disk_bytes,
        },
        "warnings": warnings(plan),
    }


def _print(plan: Plan, console: Console) -> None:
    config, said = plan.config, to_json(plan)
    saving = plan.saving
    ranks = "1 rank" if plan.ranks == 1 else f"{plan.ranks} ranks"
    say(console, f"model     {plan.model.name}, {plan.model.parameters:,} parameters")
    for note in plan.model.notes:
        say(console, f"          {note}", "yellow")
    say(console, f"batch     {ranks} × {said['micro']} × {said['accumulation']} = {said['batch']:,} windows a step")
    say(
        console,
        f"tokens    {said['tokens_a_step']:,} a step; {said['steps']:,} steps: {said['tokens']:,}{_passes(plan)}",
    )
    place = "of the GPU" if plan.on_gpu else "of this machine, there is no GPU"
    say(console, f"memory    a rank, {config.precision}, ZeRO-{config.zero.stage} ({place})")
    _print_memory(plan, console)
    say(console, "          without activations, logits and DeepSpeed's buffers")
    how = "written in the background" if config.checkpoint.background else "training waits until they are written"
    parts = {"checkpoint": saving.checkpoint, "snapshot": saving.snapshot, "snapshot of the average": saving.average}
    copies = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    say(console, f"saving    copies in host memory, a rank: {gib(saving.most)} ({copies}), {how}")
    what = "training and copies"
    if plan.on_gpu:
        what = "offloaded state and copies" if plan.state.host else "copies"
    if plan.host_bytes == plan.starting_bytes:
        what = "at the start, when each rank builds the whole model in fp32"
    say(
        console,
        f"machine   {ranks} {'takes' if plan.ranks == 1 else 'take'} {gib(plan.host_bytes)} of host memory in all "
        f"({what}); this machine has {gib(plan.machine_bytes)}",
    )
    say(
        console,
        f"disk      a checkpoint {gib(plan.checkpoint)}, a snapshot {gib(plan.snapshot)}"
        f"{' with that of the average' if plan.average else ''}; at most {_count(plan.checkpoints, 'checkpoint')} and "
        f"{_count(plan.snapshots, 'snapshot')} at a time: {gib(plan.disk_bytes)}; free: {gib(plan.free_disk_bytes)}",
    )
    for line in said["warnings"]:
        say(console, f"does not fit: {line}", "red")


def _passes(plan: Plan) -> str:
    if not plan.windows:
        return ""
    passes = plan.config.steps * plan.config.batch.global_ / plan.windows
    return f", {passes:.3g} passes over the {plan.windows:,} windows that are prepared"


def _print_memory(plan: Plan, console: Console) -> None:
    state = plan.state
    table = new_table()
    table.add_column("         ")
    for heading in ("weights", "gradients", "optimizer", *(["average"] if plan.average else []), "together"):
        table.add_column(heading, justify="right")
    moved = state.on_host and plan.on_gpu
    average = [state.average] if plan.average else []
    if moved:
        table.add_row("on the GPU", gib(state.weights), "", "", *("" for _ in average), gib(state.device))
        table.add_row(
            "in host memory", "", gib(state.gradients), gib(state.optimizer), *map(gib, average), gib(state.host)
        )
    else:
        sizes = [state.weights, state.gradients, state.optimizer, *average]
        table.add_row("", *map(gib, sizes), gib(sum(sizes)))
    print_table(table, console)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
