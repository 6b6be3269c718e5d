"""The same training over other ZeRO stages and numbers of ranks: memory, step time, and the micro-batch that fits.

The global batch stays as it is, so more ranks have fewer windows each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.load import micro_batch
from configs.memory.scoring import MARGIN
from configs.memory.step_time import Links, StepTime, Work, step_time
from configs.memory.training import NOTHING, Job, RankMemory, Tensors, rank_memory
from configs.schema import Config
from launcher.plan.activations import ModelSize
from launcher.plan.speed import Speed

STAGES = (0, 1, 2, 3)
MOST_RANKS = 1024


@dataclass(frozen=True)
class Row:
    """One stage on so many ranks."""

    ranks: int
    nodes: int
    stage: int
    micro: int
    accumulation: int
    memory: RankMemory
    time: StepTime | None  # None: the speed of a rank is not known

    def fits(self, device: int | None) -> bool | None:
        """Whether a rank with so many bytes holds it; None where that is not known."""
        return None if device is None else self.memory.total <= usable(device)


@dataclass(frozen=True)
class Sizes:
    """What the memory of any rank follows from: the config, its model, what there is of it."""

    config: Config
    tensors: Tensors
    model: ModelSize | None  # None: activations are not known
    on_gpu: bool
    saving: tuple[int, int]  # (while steps are made, at the end) of all ranks together

    def job(self, *, ranks: int, stage: int | None = None, micro: int | None = None) -> Job:
        """A rank's job in a world of `ranks`."""
        config = self.config
        micro = micro or micro_batch(config, ranks)
        activations = self.model.between(micro) if self.model is not None else None
        job = Job(
            tensors=self.tensors,
            activations=activations or NOTHING,
            precision=config.precision or "fp32",
            stage=config.zero.stage if stage is None else stage,
            ranks=ranks,
            accumulation=config.batch.global_ // (ranks * micro),
            offload=config.zero.offload == "cpu" and stage != 0,
            average=config.ema.decay is not None,
            on_gpu=self.on_gpu,
            bucket_asked=_bucket_asked(config),
        )
        return replace(job, saving=-(-self.saving[0] // ranks), saving_at_end=-(-self.saving[1] // ranks))


def _bucket_asked(config: Config) -> int | None:
    asked = config.deepspeed.get("zero_optimization")
    size = asked.get("reduce_bucket_size") if isinstance(asked, dict) else None
    return int(size) if isinstance(size, (int, float)) else None


def usable(device: int) -> int:
    """Bytes of a device that a plan may fill: the rest is left to the allocator's gaps and to kernels' workspaces."""
    return int(device * (1 - MARGIN))


def row(sizes: Sizes, work: Work, links: Links, speed: Speed | None, *, ranks: int, stage: int) -> Row:
    """Memory and step time of one stage on so many ranks."""
    job = sizes.job(ranks=ranks, stage=stage)
    config = sizes.config
    time = None
    if speed is not None:
        time = step_time(
            work,
            parameters=sizes.tensors.parameters,
            stage=stage,
            ranks=ranks,
            tokens=config.batch.global_ * config.sequence_length,
            accumulation=job.accumulation,
            weight_bytes=job.weight,
            bucket=job.bucket,
            flops=speed.flops,
            links=links,
            checkpointing=config.gradient_checkpointing,
            sending_included=speed.sending == (ranks, stage),
        )
    micro = micro_batch(config, ranks)
    nodes = -(-ranks // links.ranks_a_node)
    return Row(ranks, nodes, stage, micro, job.accumulation, rank_memory(job), time)


def scaling(
    sizes: Sizes, work: Work, links: Links, speed: Speed | None, *, also: int = 1
) -> tuple[list[Row], list[int]]:
    """A row for each stage and each power of two up to MOST_RANKS, and for `also`; of several nodes only full ones.

    Also gives the counts that are left out, since they do not divide the batch.
    """
    rows, left_out = [], []
    if sizes.model is not None:  # the two ends; what is between them lies on a line
        sizes.model.activations(1)
        sizes.model.activations(micro_batch(sizes.config, 1))
    for ranks in sorted({*(2**power for power in range(MOST_RANKS.bit_length())), also}):
        if sizes.config.batch.global_ % ranks:
            left_out.append(ranks)
        elif ranks <= links.ranks_a_node or ranks % links.ranks_a_node == 0:
            rows += [row(sizes, work, links, speed, ranks=ranks, stage=stage) for stage in STAGES]
    return rows, left_out


def largest_micro(sizes: Sizes, *, ranks: int, device: int) -> int | None:
    """The most windows at once, among divisors of a rank's share, that a rank with so many bytes holds; None: not one.

    More windows take more memory, so the divisors are searched by halves.
    """
    share = sizes.config.batch.global_ // ranks
    divisors = [micro for micro in range(1, share + 1) if share % micro == 0]
    low, high = 0, len(divisors)
    while low < high:
        middle = (low + high) // 2
        known = sizes.model is not None and sizes.model.known(divisors[middle])
        if known and rank_memory(sizes.job(ranks=ranks, micro=divisors[middle])).total <= usable(device):
            low = middle + 1
        else:
            high = middle
    return divisors[low - 1] if low else None
