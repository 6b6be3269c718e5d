"""Groups documents that share a long run of tokens into families, so that a split can keep each on one side.

Legend: `_N` one entry a token of all documents joined, `_R` one a run, `_D` one a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that multiplying by it loses nothing mod 2^64


def families(ids_N: NDArray[np.uint32], offsets: NDArray[np.int64], run: int) -> NDArray[np.int64]:
    """Family of each document, int64 [documents]: the smallest index in its family.

    Documents are linked where they share `run` consecutive tokens. Runs are told apart by a 64-bit hash: a
    collision would only make a family larger, which errs on the safe side. Shorter documents are alone.

    Args:
        ids_N: ids of all documents, one after the other.
        offsets: document d is `ids_N[offsets[d]:offsets[d + 1]]`; int64 [documents + 1].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    documents = len(offsets) - 1
    hash_R, document_R = _runs(ids_N, offsets, run)
    order = np.argsort(hash_R)
    hash_R, document_R = hash_R[order], document_R[order]
    # Among equal hashes, linking neighbours links all.
    linked = (hash_R[1:] == hash_R[:-1]) & (document_R[1:] != document_R[:-1])
    a, b = document_R[:-1][linked], document_R[1:][linked]
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(documents, documents))
    _, label_D = connected_components(graph, directed=False)
    _, first = np.unique(label_D, return_index=True)
    return first[label_D].astype(np.int64)


def sharing(
    ids_N: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    other_ids: NDArray[np.uint32],
    other_offsets: NDArray[np.int64],
    run: int,
) -> NDArray[np.bool_]:
    """Which documents of the first corpus share a run of tokens with any of the second, bool [documents]."""
    hash_R, document_R = _runs(ids_N, offsets, run)
    others, _ = _runs(other_ids, other_offsets, run)
    out = np.zeros(len(offsets) - 1, bool)
    out[document_R[np.isin(hash_R, others)]] = True
    return out


def joined(documents: Sequence[NDArray[np.uint32]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """(ids one after the other, offsets int64 [documents + 1])."""
    lengths = np.asarray([len(ids) for ids in documents], np.int64)
    flat = np.concatenate(list(documents)) if documents else np.zeros(0, np.uint32)
    return flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _runs(
    ids_N: NDArray[np.uint32], offsets: NDArray[np.int64], run: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash, document) of every run that lies inside one document."""
    document_N = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if len(ids_N) < run:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hash_R = _run_hashes(ids_N, run)
    inside = document_N[: len(hash_R)] == document_N[run - 1 :]
    return hash_R[inside], document_N[: len(hash_R)][inside]


def _run_hashes(ids_N: NDArray[np.uint32], run: int) -> NDArray[np.uint64]:
    """Polynomial hash mod 2^64 of the `run` tokens from each place on, [N - run + 1], in log2(run) passes.

    h(a + b tokens from i) = h(a from i) · base^b + h(b from i + a); lengths double along the bits of `run`.
    """
    single = ids_N.astype(np.uint64) + np.uint64(1)
    single *= np.uint64(0xBF58476D1CE4E5B9)  # spreads small ids over all bits (constants of splitmix64)
    single ^= single >> np.uint64(27)
    single *= np.uint64(0x94D049BB133111EB)
    single ^= single >> np.uint64(31)

    def joined_hash(
        left: NDArray[np.uint64], left_run: int, right: NDArray[np.uint64], right_run: int
    ) -> NDArray[np.uint64]:
        places = len(ids_N) - (left_run + right_run) + 1
        power = np.uint64(pow(_BASE, right_run, 1 << 64))
        return left[:places] * power + right[left_run : left_run + places]

    have, length = single, 1
    for bit in bin(run)[3:]:  # from the second bit on: double, and add one token where it is set
        have, length = joined_hash(have, length, have, length), 2 * length
        if bit == "1":
            have, length = joined_hash(have, length, single, 1), length + 1
    return have
