"""Divides documents between reference set and training, whole families at a time, and looks whether it held.

Legend: `_D` one entry a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.schema import ReferenceSettings
from trainer.data.families import families, joined
from trainer.data.sources import content_key

AIMED_AT = 20_480  # documents, and samples, of a set whose size is left open
MOST_WINDOWS = 16


@dataclass(frozen=True)
class Split:
    """`reference` and `training` are document indices, each in a random order keyed by content; `families`: of the
    reference documents."""

    reference: list[int]
    families: list[int]
    training: list[int]
    record: dict[str, Any]


def split_by_family(
    ids: Sequence[NDArray[np.uint32]], sha256s: Sequence[str], settings: ReferenceSettings, seed: int
) -> Split:
    """Takes families, in a random order, into the reference set until it has its documents.

    A family that would bring too many documents, or more than `max_fraction` of all tokens (uncut: so many
    leave the training data), goes to training.

    Args:
        ids: tokens of each document, uint32 [T] each.
        sha256s: of each document's text; they and the seed are all that the choice hangs on.

    Raises:
        DataError: fewer than two documents could be taken.
    """
    family_D = families(*joined(ids), settings.min_shared_run)
    tokens_D = np.asarray([len(one) for one in ids], np.int64)
    members: dict[int, list[int]] = {}
    for document, family in enumerate(family_D.tolist()):
        members.setdefault(family, []).append(document)
    keyed = sorted((content_key("family", seed, min(sha256s[d] for d in group)), group) for group in members.values())
    wanted = settings.documents or AIMED_AT
    budget = settings.max_fraction * float(tokens_D.sum())
    taken: list[int] = []
    taken_tokens = 0
    for _, group in keyed:
        if len(taken) == wanted:
            break
        tokens = int(tokens_D[group].sum())
        if len(taken) + len(group) <= wanted and taken_tokens + tokens <= budget:
            taken += group
            taken_tokens += tokens
    if len(taken) < 2:
        raise DataError(
            f"reference: only {len(taken)} of {len(ids)} documents ({len(members)} families) fit in "
            f"reference.documents={wanted} and reference.max_fraction={settings.max_fraction}; "
            "give more documents (a file is one, a row of JSONL or CSV is one), or raise those settings"
        )
    chosen = set(taken)
    taken.sort(key=lambda d: content_key("reference", seed, sha256s[d]))
    sizes = [len(group) for group in members.values()]
    return Split(
        taken,
        family_D[taken].tolist(),
        [d for d in range(len(ids)) if d not in chosen],
        {
            "min_shared_run": settings.min_shared_run,
            "documents": len(ids),
            "tokens": int(tokens_D.sum()),
            "families": len(members),
            "largest_family": max(sizes),
            "documents_in_families": sum(size for size in sizes if size > 1),
            "taken_documents": len(taken),
            "taken_tokens": taken_tokens,
        },
    )


def fewest_windows(tokens_D: NDArray[np.int64], sequence_length: int) -> int:
    """The fewest windows a document with which documents of so many tokens make 20,480 samples; else 16.

    Documents, not windows, make errors small: at one window a document the same error takes 1.4 times fewer samples
    than at four (1.0 to 1.9 times, by 11 pairs of real models).
    """
    windows_D = -(-tokens_D // sequence_length)
    for most in range(1, MOST_WINDOWS):
        if int(np.minimum(windows_D, most).sum()) >= AIMED_AT:
            return most
    return MOST_WINDOWS
