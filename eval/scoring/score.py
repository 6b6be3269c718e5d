"""Scores a reference set over a rank-group: whole batches to ranks, every sample's loss joined by one all-reduce.

A rank writes its samples' losses into its places of zero vectors, and a count of one; the sum over ranks is then exact,
whatever the number of ranks, and a sample that nobody or two scored shows in the counts.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import VernierError
from eval.distributed.ranks import Ranks
from eval.reference.set import ReferenceSet
from eval.scoring.journal import Journal, Scores, no_scores, scores_of_table
from eval.scoring.losses import LOGITS_BYTES, SampleLosses
from eval.scoring.models import scored_fingerprint
from eval.tables import LossTable

# Raised when losses come out in other bits: what was scored before is then neither completed nor taken up again.
SCORING_VERSION = "2" if LOGITS_BYTES == 64 << 20 else f"2, logits of {LOGITS_BYTES} bytes"

# Told at each block's end how many samples are scored, and their losses; True ends the scoring there.
Look = Callable[[int, NDArray[np.float64]], bool]


class BatchScorer(Protocol):
    """What scores batches: `eval.scoring.losses.Scorer`, or one of another objective."""

    def score_batch(self, reference: ReferenceSet, batch: int) -> SampleLosses: ...


def score_reference(
    scorer: BatchScorer,
    reference: ReferenceSet,
    ranks: Ranks,
    meta: dict[str, Any],
    *,
    order_seed: int | None = None,
    lockstep: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
    begun: LossTable | None = None,
    look: Look | None = None,
) -> LossTable:
    """The loss table of a model; the same bits on every rank, at any number of ranks.

    Args:
        meta: the table's metadata.
        order_seed: meet the batches in this random order, which must not change anything.
        lockstep: every rank makes equally many forward passes (the weights are sharded, so each is a collective).
        on_batch: called with batches done and to do, of this rank.
        journal: keeps what is scored, and has what earlier attempts scored.
        begun: a table of a prefix of the set's blocks, which is completed. Of rank 0 only.
        look: asked on rank 0 after each block whether that is enough; the table is then a prefix of the blocks.

    Raises:
        VernierError: a sample was scored by no rank, or by two.
    """
    scores = no_scores(len(reference.sample))
    if ranks.is_rank_zero:
        _known_already(scores, reference, journal, begun)
    known_N = ranks.broadcast(scores.has().to(torch.uint8)).bool().numpy()
    joined: list[Scores] = []
    stages = _blocks(reference) if look is not None else [(0, len(reference.sample))]
    for start, stop in stages:
        to_do = [b for b in _batches_of(reference, start, stop) if not known_N[reference.batch_samples(b)].all()]
        mine, idle_passes = _share(to_do, ranks, order_seed, lockstep)
        for done, batch in enumerate(mine, start=1):
            _score_batch(scorer, reference, batch, scores, journal)
            if on_batch is not None:
                on_batch(done, len(mine))
        for _ in range(idle_passes):  # the other ranks still gather weights
            scorer.score_batch(reference, to_do[0])
        ranks.barrier()  # waits as long as it takes; the sums below are given up after a while
        joined.append(Scores(ranks.sum(scores.sums[start:stop]), ranks.sum(scores.counts[start:stop])))
        _check_holes(joined[-1], start)
        if look is not None and stop < len(reference.sample):
            losses = np.concatenate([part.sums[:, 0].numpy() for part in joined])
            if ranks.broadcast_int(int(look(stop, losses)) if ranks.is_rank_zero else 0):
                break
    return _table(scorer, reference, joined, meta)


def _known_already(scores: Scores, reference: ReferenceSet, journal: Journal | None, begun: LossTable | None) -> None:
    """Puts in what was scored before; a batch of which some is missing counts as not scored."""
    rows = scores_of_table(begun) if begun is not None else None
    if rows is not None:
        scores.put(torch.arange(len(rows[0])), *rows)
    if journal is not None:
        journal.read(scores)
    whole_B = np.ones(reference.batch_count, dtype=bool)
    whole_B[reference.batch[~scores.has().numpy()]] = False
    torn = torch.from_numpy(~whole_B[reference.batch])
    scores.sums[torn], scores.counts[torn] = 0, 0


def _blocks(reference: ReferenceSet) -> list[tuple[int, int]]:
    """(first sample, end) of each block; blocks are whole documents in order."""
    ends = np.flatnonzero(np.diff(reference.block, append=reference.block[-1] + 1)) + 1
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _batches_of(reference: ReferenceSet, start: int, stop: int) -> list[int]:
    return np.unique(reference.batch[start:stop]).tolist()


def _score_batch(
    scorer: BatchScorer, reference: ReferenceSet, batch: int, scores: Scores, journal: Journal | None
) -> None:
    found = scorer.score_batch(reference, batch)
    at = torch.from_numpy(reference.batch_samples(batch))
    sums = torch.cat([found.loss[:, None], found.position_loss], 1)
    ones = torch.ones(len(at), dtype=torch.int32)
    counts = torch.cat([torch.stack([ones, found.correct], 1), found.position_tokens], 1)
    scores.sums[at] = sums
    scores.counts[at] += counts
    if journal is not None:
        journal.add(at, sums, counts)


def _share(batches: list[int], ranks: Ranks, order_seed: int | None, lockstep: bool) -> tuple[list[int], int]:
    """(batches this rank scores, forward passes it makes besides)."""
    order = batches if order_seed is None else np.random.default_rng(order_seed).permutation(batches).tolist()
    mine = order[ranks.rank :: ranks.world]
    most = -(-len(batches) // ranks.world)
    return mine, most - len(mine) if lockstep else 0


def _check_holes(scores: Scores, start: int) -> None:
    wrong = torch.nonzero(scores.counts[:, 0] != 1).flatten()
    if len(wrong):
        first = int(wrong[0])
        raise VernierError(
            f"scoring: {len(wrong)} samples were not scored exactly once, the first is sample {start + first} "
            f"({int(scores.counts[first, 0])} times); a rank may have died: the same command scores what is missing"
        )


def _table(scorer: BatchScorer, reference: ReferenceSet, joined: Sequence[Scores], meta: dict[str, Any]) -> LossTable:
    sums = torch.cat([part.sums for part in joined]).numpy()
    counts = torch.cat([part.counts for part in joined]).numpy()
    count = len(sums)
    blocks = int(reference.block[-1]) + 1
    part = {"blocks": int(reference.block[count - 1]) + 1, "of": blocks, "samples": count}
    return LossTable(
        sample=reference.sample[:count],
        document=reference.document[:count],
        tokens=_of_scorer(scorer, "tokens_of", reference, reference.tokens)[:count],
        bytes=_of_scorer(scorer, "bytes_of", reference, reference.bytes)[:count],
        loss=sums[:, 0].copy(),
        correct=counts[:, 1].copy(),
        position_loss=sums[:, 1:].copy(),
        position_tokens=counts[:, 2:].copy(),
        family=None if reference.family is None else reference.family[:count],
        meta=meta if part["blocks"] == blocks else {**meta, "partial": part},
    )


def _of_scorer(scorer: BatchScorer, name: str, reference: ReferenceSet, otherwise: Any) -> Any:
    """What the objective counts in a sample, where it is not every target."""
    return getattr(scorer, name)(reference) if hasattr(scorer, name) else otherwise


def ensemble_source(sources: Sequence[str]) -> str:
    """What stands for the weights of an ensemble: those of its models, in order; of one model, its own."""
    if len(sources) == 1:
        return sources[0]
    return hashlib.sha256(f"ensemble {' '.join(sources)}".encode()).hexdigest()


def table_meta(
    reference: ReferenceSet,
    model: Any,
    *,
    source: str,
    dtype: str,
    objective: str,
    label: str,
    step: int | None,
    threads: int,
    sharded: bool = False,
    settings: str = "",
) -> dict[str, Any]:
    """Metadata of a loss table: the reference set, which weights were scored and how, and on what."""
    import transformers

    on_gpu = torch.cuda.is_available()
    return {
        "reference": reference.tokens_fingerprint,
        "reference_text": reference.text_fingerprint,
        "reference_name": reference.name,
        "objective": objective,
        **({} if reference.labels is None else {"unit": reference.labels.unit}),
        "model": scored_fingerprint(source, dtype, settings),
        "source": source,
        "label": label,
        "step": step,
        "dtype": dtype,
        **({"weights": "sharded"} if sharded else {}),
        "attention": getattr(model.config, "_attn_implementation", None),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "scoring": SCORING_VERSION,
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
