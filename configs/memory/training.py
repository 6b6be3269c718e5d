"""What one rank holds at its fullest moment while it trains, by part: arithmetic on sizes, nothing is built.

The sizes of DeepSpeed's buffers are those of 0.19.8 under the settings of trainer/engine/build.py; activations are
handed in (launcher/plan/activations.py finds them from the model itself). docs/plan.md has it in words, and what was
measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from configs.memory.saving import TrainingState, training_state
from configs.memory.scoring import BYTES

FP32 = BYTES["fp32"]
LEAST_BUCKET, MOST_BUCKET = 1_000_000, 500_000_000  # parameters; trainer/engine/build.py
ALL_REDUCED_AT_ONCE = 500_000_000  # gradients at stage 0 (DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE)
MOST_GATHERED = 1_000_000_000  # parameters whole at a time at stage 3 (stage3_max_live_parameters)

# Of a process on CPU with the pinned packages, x86-64 Linux, as `python -m benchmarks.plan_memory` measures them.
HOST_FIXED = 438 << 20  # Python, torch, DeepSpeed, transformers and a process group, before there is a model
HOST_AT_WORK = 30 << 20  # code that a step brings in, threads' stacks, TensorBoard: what a tiny model takes
DEVICE_FIXED = 1 << 30  # CUDA's context, its kernels and NCCL's buffers: taken, not measured

# glibc's malloc gives blocks from here on to the kernel and back at once (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
# Smaller ones come from a heap that keeps its largest size, with gaps.
LARGE_BLOCK = 32 << 20
GAPS = {0: 1.4, 1: 1.4, 2: 1.4, 3: 1.8}  # largest size of that heap ÷ what lay in it, by stage; as measured


@dataclass(frozen=True)
class Tensors:
    """The trained parameters of a model: how many, and how they are cut into tensors."""

    parameters: int
    largest: int  # parameters of the largest tensor
    loose: float = 1.0  # share of all parameters in tensors whose fp32 values are below LARGE_BLOCK
    largest_module: int = 0  # parameters that one module has itself, its submodules left out: experts' in one tensor

    @staticmethod
    def of(sizes: list[int], *, largest_module: int = 0) -> Tensors:
        """Of the numbers of parameters of a model's tensors, tied ones once."""
        total = sum(sizes)
        small = sum(size for size in sizes if FP32 * size < LARGE_BLOCK)
        return Tensors(total, max(sizes, default=0), small / total if total else 1.0, largest_module)

    @property
    def at_once(self) -> int:
        """Parameters that stage 3 has whole at a time: up to its limit, but a module's own all together."""
        return min(self.parameters, max(MOST_GATHERED, self.largest, self.largest_module))


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward and backward pass of one micro-batch hold at most, weights and gradients left out."""

    layers: int  # kept from the forward pass of all layers for their backward pass
    logits: int  # the most above that, until the gradient of the last layer's output is there
    working: int  # the most above both, further back: gradients of activations, layers computed again
    with_gradients: int  # the most together with the weights' gradients that are there by then
    loose: int  # of the most, in blocks below LARGE_BLOCK
    loose_with_gradients: int

    @property
    def most(self) -> int:
        return self.layers + self.logits + self.working


NOTHING = Activations(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Moment:
    """What is held at some moment of a step, in bytes by part. `loose`: of it what comes and goes in small blocks."""

    name: str
    parts: dict[str, int]
    loose: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """The most that one rank holds, with its parts at that moment; in bytes."""

    moment: str
    parts: dict[str, int]  # weights, gradients, optimizer, average, activations, logits, buffers, saving, gaps
    at_work: int  # of libraries while they work
    fixed: int  # before there is a model: imports and the process group
    start: int  # the most until the first step, `fixed` left out
    moments: tuple[Moment, ...] = field(repr=False, default=())

    @property
    def own(self) -> int:
        """What training takes on top of `fixed`."""
        return sum(self.parts.values()) + self.at_work

    @property
    def total(self) -> int:
        return self.own + self.fixed


@dataclass(frozen=True)
class Job:
    """What decides over a rank's memory."""

    tensors: Tensors
    activations: Activations
    precision: str
    stage: int
    ranks: int
    accumulation: int
    offload: bool = False
    average: bool = False
    on_gpu: bool = False
    saving: int = 0  # host memory of copies that are there while steps are made
    saving_at_end: int = 0  # and when all is due at once, at the last step
    bucket_asked: int | None = None  # reduce_bucket_size where `deepspeed:` has one

    @property
    def weight(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.precision] if self.precision in ("bf16", "fp16") else FP32

    @property
    def bucket(self) -> int:
        """Parameters of a bucket, as trainer/engine/build.py sets it."""
        if self.bucket_asked is not None:
            return self.bucket_asked
        return min(MOST_BUCKET, max(LEAST_BUCKET, self.tensors.parameters))

    @property
    def state(self) -> TrainingState:
        return training_state(
            self.tensors.parameters,
            precision=self.precision,
            stage=self.stage,
            ranks=self.ranks,
            offload=self.offload,
            average=self.average,
        )


def rank_memory(job: Job) -> RankMemory:
    """The most that a rank of `job` holds: on its GPU, or on CPU in its process.

    On a GPU it is the fullest moment (torch's allocator hands freed blocks out again). In a process on CPU, blocks of
    LARGE_BLOCK and more go back to the system and the heap of smaller ones does not shrink. So the fullest moment of
    the one adds to the fullest moment of the other, times what its gaps come to; the part `gaps` is what that is more
    than the parts at the fullest moment of all.
    """
    moments = tuple(_moments(job))
    top = max(moments, key=lambda moment: moment.total)
    parts = {name: size for name, size in top.parts.items() if size}
    if job.on_gpu:
        return RankMemory(top.name, parts, 0, DEVICE_FIXED, _start_on_gpu(job), moments)
    heap = int(GAPS[job.stage] * max(moment.loose for moment in moments))
    blocks = max(moment.total - moment.loose for moment in moments)
    start = _start_on_cpu(job)
    gaps = max(0, heap + blocks - top.total)
    if start > top.total + gaps:
        name = "at the start, when each rank builds the whole model in fp32"
        return RankMemory(name, {"start": start}, HOST_AT_WORK, HOST_FIXED, start, moments)
    return RankMemory(top.name, {**parts, "gaps": gaps}, HOST_AT_WORK, HOST_FIXED, start, moments)


def host_beside_gpu(job: Job) -> int:
    """Bytes in host memory of a rank whose training is on a GPU, without what its imports and CUDA take."""
    start = FP32 * job.tensors.parameters  # trainer/model/build.py builds it on the CPU
    staging = _part(job.weight * job.tensors.parameters, job.ranks) if job.offload and job.stage < 3 else 0
    return max(start, job.state.host + staging + max(job.saving, job.saving_at_end))


@dataclass(frozen=True)
class _Sizes:
    """Bytes that the moments of any stage are made of."""

    held: dict[str, int]  # by part, from the first step to the last
    whole: int  # gradients of all parameters
    own: int  # gradients of what this rank updates; 0 where they go to the host
    bucket: int  # that DeepSpeed reduces in
    in_bucket: int  # what of it is filled
    fp32_copy: int  # of gradients, for the update


def _sizes(job: Job) -> _Sizes:
    count, state = job.tensors.parameters, job.state
    bucket = job.weight * job.bucket
    if job.precision == "amp" and job.stage in (1, 2):
        bucket *= 2  # one of each type that DeepSpeed communicates in
    moved = job.offload and job.on_gpu
    held = {
        "weights": state.weights,
        "optimizer": 0 if moved else state.optimizer,
        "average": 0 if moved else state.average,
        "saving": 0 if job.on_gpu else job.saving,
    }
    fp32_copy = _part(FP32 * count, job.ranks if job.stage else 1) if job.weight < FP32 else 0
    return _Sizes(
        held,
        whole=job.weight * count,
        own=0 if moved else _part(job.weight * count, job.ranks),
        bucket=bucket,
        in_bucket=job.weight * min(job.bucket, count),
        fp32_copy=0 if moved and job.stage else fp32_copy,
    )


def _moments(job: Job) -> list[Moment]:
    sizes = _sizes(job)
    passes, summed, updated = {0: _stage_0, 1: _stage_1_or_2, 2: _stage_1_or_2}.get(job.stage, _stage_3)(job, sizes)
    # At stage 3 gradients and bucket stay; else they are let go of with the update.
    after = {**sizes.held, "gradients": sizes.own, "buffers": sizes.bucket} if job.stage == 3 else sizes.held
    saved = {**after, "saving": 0 if job.on_gpu else job.saving_at_end}
    return [passes, summed, updated, Moment("at the last save", saved)]


def _summed(sizes: _Sizes, gradients: int, buffers: int, loose: float) -> Moment:
    parts = {**sizes.held, "gradients": gradients, "buffers": buffers}
    return Moment("while gradients are summed over the ranks", parts, int(loose))


def _updated(sizes: _Sizes, gradients: int, buffers: int = 0, loose: float = 0) -> Moment:
    return Moment("in the update", {**sizes.held, "gradients": gradients, "buffers": buffers}, int(loose))


def _stage_0(job: Job, sizes: _Sizes) -> tuple[Moment, Moment, Moment]:
    """Every rank has all gradients, and copies some of them into a flat block to be reduced."""
    loose = sizes.whole * job.tensors.loose
    flat = min(sizes.whole, job.weight * ALL_REDUCED_AT_ONCE)
    return (
        _passes(job, sizes.held, sizes.whole if job.accumulation > 1 else None, 0),
        _summed(sizes, sizes.whole, flat, loose),
        _updated(sizes, sizes.whole + sizes.fp32_copy, loose=loose),
    )


def _stage_1_or_2(job: Job, sizes: _Sizes) -> tuple[Moment, Moment, Moment]:
    """A rank updates its part. At stage 2 it keeps only that part's gradients from the reduction on."""
    second = job.stage == 2
    before = (sizes.own if second else sizes.whole) if job.accumulation > 1 else 0 if second else None
    # The bucket, a copy of what goes to one rank, and what came to this one; gradients beyond the bucket.
    waiting = (sizes.own if job.accumulation > 1 else 0) if second else max(0, sizes.whole - sizes.in_bucket)
    return (
        _passes(job, sizes.held, before, sizes.bucket),
        _summed(
            sizes,
            sizes.own + waiting,
            sizes.bucket + _part(sizes.in_bucket, job.ranks),
            waiting * job.tensors.loose,
        ),
        _updated(sizes, 2 * sizes.own + sizes.fp32_copy),
    )


def _stage_3(job: Job, sizes: _Sizes) -> tuple[Moment, Moment, Moment]:
    """Weights are cut too: those in use are gathered."""
    gathered = job.weight * job.tensors.at_once
    passes = _passes(job, sizes.held, sizes.own, sizes.bucket + gathered)
    # A bucket is put together anew for its reduce-scatter; gloo takes a copy of that.
    sent = sizes.in_bucket * (1 if job.on_gpu else 2)
    still = gathered if sizes.in_bucket < sizes.whole else 0
    return (
        replace(passes, loose=passes.loose + int(gathered * job.tensors.loose)),
        _summed(sizes, sizes.own, sizes.bucket + sent + still, still * job.tensors.loose),
        _updated(sizes, sizes.own + sizes.fp32_copy, sizes.bucket),
    )


def _passes(job: Job, held: dict[str, int], gradients: int | None, buffers: int) -> Moment:
    """The forward and backward pass; `gradients`: those there from the beginning, None: they come with the pass."""
    made = job.activations
    parts = {**held, "activations": made.layers + made.working, "logits": made.logits, "buffers": buffers}
    if gradients is None:
        parts["gradients"] = max(0, made.with_gradients - made.most)
        loose = made.loose_with_gradients
    else:
        parts["gradients"] = gradients
        loose = made.loose + (int(gradients * job.tensors.loose) if job.stage < 2 else 0)
    return Moment("in the backward pass", parts, loose)


def _start_on_cpu(job: Job) -> int:
    """Until the first step: the whole model in fp32, then what DeepSpeed makes of it while that is still there."""
    count = job.tensors.parameters
    built = FP32 * count
    master = _part(FP32 * count, job.ranks)
    if job.stage == 0:
        cast = job.weight * count + FP32 * count if job.weight < FP32 else 0
        return built + cast
    if job.stage < 3:  # a flat copy of the weights, and of it the masters of this rank
        return built + job.weight * count + master
    return built + 2 * _part(job.weight * count, job.ranks) + master + job.weight * job.bucket


def _start_on_gpu(job: Job) -> int:
    count = job.tensors.parameters
    return (2 if job.stage in (1, 2) else 1) * job.weight * count + (0 if job.offload else job.state.optimizer // 3)


def _part(size: int, ranks: int) -> int:
    return -(-size // ranks)
