"""Scores a reference set over a rank-group: whole batches to ranks, every sample's loss joined by one all-reduce.

A rank writes its samples' losses into its places of zero vectors, and a count of one; the sum over ranks is then exact,
whatever the number of ranks, and a sample that nobody or two scored shows in the counts.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.errors import VernierError
from eval.losses import Scorer
from eval.models import scored_fingerprint
from eval.ranks import Ranks
from eval.reference import ReferenceSet
from eval.tables import POSITION_BINS, LossTable

OBJECTIVE = "causal"


def score_reference(
    scorer: Scorer,
    reference: ReferenceSet,
    ranks: Ranks,
    facts: dict[str, Any],
    *,
    order_seed: int | None = None,
    lockstep: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> LossTable:
    """The loss table of a model; the same bits on every rank, at any number of ranks.

    Args:
        facts: what goes into the table's metadata besides the reference set.
        order_seed: meet the batches in this random order, which must not change anything.
        lockstep: every rank makes equally many forward passes (the weights are sharded, so each is a collective).
        on_batch: called with batches done and to do, of this rank.

    Raises:
        VernierError: a sample was scored by no rank, or by two.
    """
    samples = len(reference.sample)
    sums = torch.zeros(samples, 1 + POSITION_BINS, dtype=torch.float64)
    counts = torch.zeros(samples, 2 + POSITION_BINS, dtype=torch.int32)
    mine, idle_passes = _share(reference.batch_count, ranks, order_seed, lockstep)
    for done, batch in enumerate(mine, start=1):
        ids, first_target, length = (torch.from_numpy(a) for a in reference.batch_inputs(batch))
        found = scorer.score(ids, first_target, length)
        at = torch.from_numpy(reference.batch_samples(batch))
        sums[at, 0], sums[at, 1:] = found.loss, found.position_loss
        counts[at, 0] += 1
        counts[at, 1], counts[at, 2:] = found.correct, found.position_tokens
        if on_batch is not None:
            on_batch(done, len(mine))
    for _ in range(idle_passes):  # the other ranks still gather weights
        scorer.score(*(torch.from_numpy(a) for a in reference.batch_inputs(0)))

    sums, counts = (_joined(part, ranks) for part in (sums, counts))
    wrong = torch.nonzero(counts[:, 0] != 1).flatten()
    if len(wrong):
        first = int(wrong[0])
        raise VernierError(
            f"scoring: {len(wrong)} samples were not scored exactly once, the first is sample {first} "
            f"({int(counts[first, 0])} times); a rank may have died"
        )
    return LossTable(
        sample=reference.sample,
        document=reference.document,
        tokens=reference.tokens,
        bytes=reference.bytes,
        loss=sums[:, 0].numpy().copy(),
        correct=counts[:, 1].numpy().copy(),
        position_loss=sums[:, 1:].numpy().copy(),
        position_tokens=counts[:, 2:].numpy().copy(),
        meta={
            "reference": reference.tokens_fingerprint,
            "reference_text": reference.text_fingerprint,
            "reference_name": reference.name,
            "objective": OBJECTIVE,
            **facts,
        },
    )


def _share(batches: int, ranks: Ranks, order_seed: int | None, lockstep: bool) -> tuple[list[int], int]:
    """(batches this rank scores, forward passes it makes besides)."""
    order = np.arange(batches) if order_seed is None else np.random.default_rng(order_seed).permutation(batches)
    mine = [int(b) for b in order[ranks.rank :: ranks.world]]
    most = -(-batches // ranks.world)
    return mine, most - len(mine) if lockstep else 0


def _joined(part: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    on_device = part.to(ranks.device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def scoring_facts(model: Any, source: str, dtype: str, label: str, step: int | None, threads: int) -> dict[str, Any]:
    """Metadata of a loss table that says which weights were scored, and on what."""
    import transformers

    on_gpu = torch.cuda.is_available()
    return {
        "model": scored_fingerprint(source, dtype),
        "source": source,
        "label": label,
        "step": step,
        "dtype": dtype,
        "attention": getattr(model.config, "_attn_implementation", None),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """Scores with this many CPU threads, wherever scoring runs: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
