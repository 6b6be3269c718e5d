"""Scores model directories once, all ranks on each: what `vernier eval` starts a rank-group for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import DataError
from eval.distributed.ranks import Ranks
from eval.reference.set import ReferenceSet
from eval.scoring.early_stop import UntilVerdict
from eval.scoring.journal import Journal, clear, scoring_key
from eval.scoring.models import settings_fingerprint, snapshot_step, weights_fingerprint
from eval.scoring.placement import Scoring, open_scorer
from eval.scoring.score import cpu_threads, ensemble_source, score_reference, table_meta
from eval.tables import LossTable, parse_table_name, partial_path, read_table, write_table


def score_models(
    models: list[Path],
    table: Path,
    reference: ReferenceSet,
    ranks: Ranks,
    how: Scoring,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> None:
    """Writes the loss table of a model, or of several as an ensemble (the mean of their probabilities).

    What an earlier attempt left (a partial table, a journal) is taken up. With `how.against`, a verdict before the
    end of the set leaves a partial table.

    Args:
        progress: told, on rank 0, the table's name, and its batches that are done and to do.

    Raises:
        DataError: a model cannot be scored so.
    """
    name = (parse_table_name(table.name) or (table.stem,))[0]
    if ranks.is_rank_zero:
        progress(name, 0, 0)
    if how.fresh and ranks.is_rank_zero:
        clear(table)
        partial_path(table).unlink(missing_ok=True)
    ranks.barrier()
    scorer, model, sharded = open_scorer(models, reference, ranks, how)
    meta = table_meta(
        reference,
        model,
        source=ensemble_source([weights_fingerprint(directory) for directory in models]),
        dtype=how.dtype,
        objective=how.objective or reference.objective,
        label=name,
        step=_step(models),
        threads=how.threads,
        sharded=sharded,
        settings="".join(settings_fingerprint(directory) for directory in models),
    )
    look = UntilVerdict(reference, read_table(how.against), how.margin_percent) if how.against else None
    journal = Journal(table, meta, ranks.rank)
    started = time.monotonic()
    with cpu_threads(how.threads), _kept(journal):
        found = score_reference(
            scorer,
            reference,
            ranks,
            meta,
            order_seed=how.order_seed,
            lockstep=sharded,
            on_batch=(lambda done, of: progress(name, done, of)) if ranks.is_rank_zero else None,
            journal=journal,
            begun=_begun(table, meta) if ranks.is_rank_zero else None,
            look=look,
        )
    if ranks.is_rank_zero:
        path = _write(table, found, look)
        loss = found.loss.sum() / found.tokens.sum()
        say(f"{name}: {loss:.4f} nats/token, {time.monotonic() - started:.1f} s -> {path}")
    ranks.barrier()


@contextmanager
def _kept(journal: Journal) -> Iterator[None]:
    """Writes what this rank has scored also where another's death ends it."""
    try:
        yield
    except BaseException:
        journal.flush()
        raise


def _step(models: list[Path]) -> int | None:
    if len(models) == 1:
        with suppress(DataError):  # a foreign model has no step
            return snapshot_step(models[0])
    return None


def _begun(table: Path, meta: dict[str, Any]) -> LossTable | None:
    """The partial table that an earlier scoring of the same kind left."""
    path = partial_path(table)
    if not path.is_file():
        return None
    begun = read_table(path)
    return begun if scoring_key(begun.meta) == scoring_key(meta) else None


def _write(table: Path, found: LossTable, look: UntilVerdict | None) -> Path:
    """Writes the table, or the part of it that was enough; gives its path."""
    if look is not None and "partial" in found.meta:
        look.all_looks(found.loss)
        found = replace(found, meta={**found.meta, "until_verdict": look.to_json()})
    part = partial_path(table)
    path = part if "partial" in found.meta else table
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_table(path, found)
    finally:
        clear(table)  # also of losses that no table can have (not finite, say): they would be taken up again
    if path == table:
        part.unlink(missing_ok=True)
    return path
