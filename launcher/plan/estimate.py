"""`vernier plan`: what a training would take, reckoned before anything is started: memory, time, host memory, disk.

The arithmetic is in `configs.memory`; what the model itself says is found by
launcher.plan.activations. Here it is asked and held against what there is; launcher.plan.report tells it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.devices import gpu_count
from configs.errors import ConfigError, DataError
from configs.files.atomic import read_json
from configs.load import batch_problems, micro_batch
from configs.memory.saving import (
    FP32,
    SavingCopy,
    checkpoint_bytes,
    checkpoints_kept,
    saving_copy,
    snapshot_bytes,
    snapshots_kept,
)
from configs.memory.scoring import gib
from configs.memory.step_time import GB, Links, Work
from configs.memory.training import HOST_FIXED, Job, RankMemory, Tensors, host_beside_gpu, rank_memory
from launcher.plan.model import Decay, Model, decay_of, find_model, model_size, work_of
from launcher.plan.scaling import Row, Sizes, largest_micro, row, scaling, usable
from launcher.plan.speed import Speed, find_speed, gpu_memory, read_size

if TYPE_CHECKING:
    from configs.schema import Config


LINKS = {True: (200.0, 50.0), False: (2.0, 1.25)}  # GB/s, on GPUs (NVLink, 400 Gbit/s) and on CPU (gloo, 10 Gbit/s)


@dataclass(frozen=True)
class Given:
    """What a user may know better than this machine does."""

    flops: float | None = None  # operations/s that a rank attains; None: found out
    memory: str | None = None  # of the device of a rank, such as 80GiB; None: what there is here
    bandwidth: float | None = None  # GB/s of a rank to the others of its node, one way; None: as in LINKS
    node_bandwidth: float | None = None  # GB/s of a whole node to others, one way
    latency_us: float = 5.0  # of one hop between ranks


@dataclass(frozen=True)
class Plan:
    """What a training would take. Memory is in bytes, of a rank unless it says otherwise."""

    config: Config
    model: Model
    ranks: int  # of the whole world
    ranks_here: int  # of one machine
    sizes: Sizes
    work: Work
    links: Links
    speed: Speed | None  # None: it is for GPUs, and there is none here to try
    device_bytes: int | None  # what a rank has: its GPU, or its part of this machine's memory; None: not known
    windows: int | None  # prepared for training; None where the data is not prepared
    saving: SavingCopy
    machine_bytes: int  # memory of this machine
    free_disk_bytes: int  # where run.dir is to be

    @property
    def on_gpu(self) -> bool:
        return self.sizes.on_gpu

    @property
    def average(self) -> bool:
        return self.config.ema.decay is not None

    @cached_property
    def job(self) -> Job:
        return self.sizes.job(ranks=self.ranks)

    @cached_property
    def memory(self) -> RankMemory:
        return rank_memory(self.job)

    @cached_property
    def here(self) -> Row:
        return row(self.sizes, self.work, self.links, self.speed, ranks=self.ranks, stage=self.config.zero.stage)

    @cached_property
    def table(self) -> tuple[list[Row], list[int]]:
        return scaling(self.sizes, self.work, self.links, self.speed, also=self.ranks)

    @cached_property
    def largest_micro(self) -> int | None:
        """The most windows at once that a rank holds; None: not one, or what it has or needs is not known."""
        if self.device_bytes is None:
            return None
        return largest_micro(self.sizes, ranks=self.ranks, device=self.device_bytes)

    @cached_property
    def decay(self) -> tuple[Decay, Decay] | None:
        """What weight decay pulls at, and what it does not; None where that is not known."""
        return decay_of(self.model, self.config)

    @property
    def activations_known(self) -> bool:
        return self.sizes.model is not None and self.sizes.model.known(self.here.micro)

    @property
    def host_bytes(self) -> int:
        """Host memory that all ranks of this machine take at most."""
        if self.on_gpu:
            return self.ranks_here * (host_beside_gpu(self.job) + HOST_FIXED)
        return self.ranks_here * self.memory.total

    @property
    def starting_bytes(self) -> int:
        """Host memory of all ranks of a machine while they start: each builds the whole model in fp32, then cuts it."""
        return self.ranks_here * (FP32 * self.model.parameters if self.on_gpu else self.memory.start)

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


def make_plan(config: Config, given: Given = Given()) -> Plan:
    """The plan of a resolved config, on this machine or, with `launch.nodes`, on machines like it.

    Raises:
        ConfigError: the batch cannot be cut over the ranks, or what was given makes no sense.
    """
    ranks, ranks_here = _world(config)
    problems = list(batch_problems(config, ranks))
    for name, value in (("--bandwidth", given.bandwidth), ("--node-bandwidth", given.node_bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"{name}: {value}; expected GB/s above 0")
    if not 0 <= given.latency_us < float("inf"):
        problems.append(f"--latency: {given.latency_us}; expected microseconds, 0 or more")
    if problems:
        raise ConfigError(*problems)
    data = _data_facts(config)
    model = find_model(config, data)
    on_gpu = gpu_count() > 0 or bool(config.launch.gpus_per_node)
    found = model_size(model, config, on_gpu=on_gpu)
    tensors = Tensors(model.parameters, 0) if found is None else found.tensors
    if found is not None:
        found.activations(micro_batch(config, ranks))  # what is asked about is run, other micro-batches may be reckoned
    machine = machine_memory()
    device = read_size(given.memory, "--memory") if given.memory is not None else None
    if device is None:
        device = gpu_memory() if on_gpu else machine // ranks_here
    work = work_of(model, config.sequence_length)
    whole = _saving(config, model.parameters, ranks=1)
    first = whole.snapshot + whole.average  # of step 0, in the same place ever after
    during = whole.most if config.checkpoint.every < config.steps else first
    return Plan(
        config=config,
        model=model,
        ranks=ranks,
        ranks_here=ranks_here,
        sizes=Sizes(config, tensors, found, on_gpu, (during, whole.most)),
        work=work,
        links=Links(
            ranks_here,
            (given.bandwidth or LINKS[on_gpu][0]) * GB,
            (given.node_bandwidth or LINKS[on_gpu][1]) * GB,
            given.latency_us * 1e-6,
        ),
        speed=find_speed(config, work, given.flops, on_gpu=on_gpu),
        device_bytes=device,
        windows=None if data is None else max(0, (int(data["train"]["tokens"]) - 1) // config.sequence_length),
        saving=_saving(config, model.parameters, ranks=ranks),
        machine_bytes=machine,
        free_disk_bytes=shutil.disk_usage(_existing(config.run_dir)).free,
    )


def _world(config: Config) -> tuple[int, int]:
    """(all ranks, those of one machine)."""
    launch, here = config.launch, config.nproc or 1
    if launch.nodes > 1 or launch.ranks_per_node or launch.gpus_per_node:
        here = launch.ranks_per_node or launch.gpus_per_node or here
    return launch.nodes * here, here


def _saving(config: Config, parameters: int, *, ranks: int) -> SavingCopy:
    average = config.ema.decay is not None
    return saving_copy(parameters, dtype=snapshot_dtype(config), ranks=ranks, average=average)


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


def machine_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Bytes of memory of this machine, or of the container where that has less, which psutil does not know."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(limit.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def warnings(plan: Plan) -> list[str]:
    """What does not fit, a line each, with the settings that would change it."""
    out = []
    device = plan.device_bytes
    if plan.on_gpu and device is not None and plan.memory.total > usable(device):
        out.append(
            f"memory: {gib(plan.memory.total)} a rank are more than {gib(usable(device))}, nine tenths of its GPU's "
            f"{gib(device)}; {_advice(plan)}"
        )
    asked = not plan.on_gpu and device is not None and device * plan.ranks_here != plan.machine_bytes
    room = device * plan.ranks_here if asked and device is not None else plan.machine_bytes
    # With --memory on CPU the ranks have that; a machine's own memory is held against what all of them take.
    if plan.host_bytes > room and not (plan.on_gpu and plan.config.launch.gpus_per_node and gpu_count() == 0):
        has = f"the {gib(room)} that they have" if asked else f"this machine's {gib(plan.machine_bytes)}"
        out.append(f"memory: {gib(plan.host_bytes)} are more than {has}; {_advice(plan, host=True)}")
    if plan.disk_bytes > plan.free_disk_bytes:
        fewer = ["checkpoint.keep"] if plan.config.checkpoint.keep > 1 else []
        fewer += ["snapshot.keep" if plan.config.snapshot.keep is None else "a smaller snapshot.keep"]
        out.append(
            f"disk: {gib(plan.disk_bytes)} are more than the {gib(plan.free_disk_bytes)} that are free at "
            f"{_existing(plan.config.run_dir)}; set {' or '.join(fewer)}, or another run.dir"
        )
    return out


def _advice(plan: Plan, *, host: bool = False) -> str:
    """Settings, each with what memory would be with it alone, least first.

    Args:
        host: of host memory, which all ranks of a machine share; else of a rank's GPU.
    """

    def needed(one: Plan) -> int:
        return one.host_bytes if host else one.memory.total

    found = []
    for name, change in _tries(plan):
        size = needed(changed(plan, change))
        if size < needed(plan):
            found.append((size, name))
    found.sort()
    said = [f"{name} needs {gib(size)}" for size, name in found]
    more = "over more machines each has its part of it" if host else "more ranks have less each"
    return "; ".join([*said, more])


def _tries(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    config, zero = plan.config, plan.config.zero
    if plan.here.micro > 1:
        smaller = max(m for m in range(1, plan.here.micro) if config.batch.global_ // plan.ranks % m == 0)
        yield f"batch.micro={smaller}", {"batch": config.batch.model_copy(update={"micro": smaller})}
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if zero.offload == "cpu" and plan.on_gpu:
        yield "zero.offload=none", {"zero": zero.model_copy(update={"offload": "none"})}
    if zero.offload == "none" and plan.on_gpu and zero.stage:
        yield "zero.offload=cpu", {"zero": zero.model_copy(update={"offload": "cpu"})}
    if zero.stage < 3 and plan.ranks > 1:
        yield "zero.stage=3", {"zero": zero.model_copy(update={"stage": 3})}
    if snapshot_dtype(config) == "fp32":
        yield "snapshot.dtype=bf16", {"snapshot": config.snapshot.model_copy(update={"dtype": "bf16"})}
    if plan.average:
        yield "ema.decay=null", {"ema": config.ema.model_copy(update={"decay": None})}
    if plan.ranks == plan.ranks_here > 1 and not plan.on_gpu and zero.stage < 3:
        yield "nproc=1", {"nproc": 1}


def changed(plan: Plan, change: dict[str, Any]) -> Plan:
    """The plan of the same model and machine with other settings."""
    config = plan.config.model_copy(update=change)
    ranks, here = _world(config)
    found = plan.sizes.model
    if "gradient_checkpointing" in change:
        found = model_size(plan.model, config, on_gpu=plan.on_gpu)
    if found is not None:
        found.activations(micro_batch(config, ranks))
    whole = _saving(config, plan.model.parameters, ranks=1)
    during = whole.most if config.checkpoint.every < config.steps else whole.snapshot + whole.average
    sizes = Sizes(config, plan.sizes.tensors, found, plan.on_gpu, (during, whole.most))
    saving = _saving(config, plan.model.parameters, ranks=ranks)
    return replace(plan, config=config, ranks=ranks, ranks_here=here, sizes=sizes, saving=saving)
