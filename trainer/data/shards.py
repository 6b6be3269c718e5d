"""Training tokens on disk: documents joined by EOS in flat, mapped arrays, and the windows cut from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError

SHARD_TOKENS = 2**28
FOLDER = "shards"
COUNT_CHUNK = 2**24  # tokens of the mask that are counted at once


def write_shards(
    directory: Path,
    documents: Iterable[NDArray[Any]],
    eos_id: int | None,
    vocab_size: int,
    scored: Iterable[NDArray[np.bool_]] | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Writes `documents`, each followed by EOS (None: by nothing), as shards of at most `shard_tokens` tokens into
    `directory`.

    `train-00000.npy` holds ids (uint16 where the vocabulary allows, else uint32), `train-00000.documents.npy`
    the places in the whole stream where documents start that start in this shard (int64).

    Args:
        documents: ids of each document.
        scored: for each document a bool a token, False where it is no target to train on; written to
            `train-00000.scored.npy`. The EOS after a document is as its last token.

    Returns:
        `tokens`, `documents`, `shards`, `scored_tokens` and the `sha256` of all content, however it is cut.

    Raises:
        DataError: a mask and its document differ in length.
    """
    directory.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    writer = _ShardWriter(directory, dtype, shard_tokens, masked=scored is not None)
    masks = iter(scored) if scored is not None else None
    for ids in documents:
        mask = None if masks is None else np.asarray(next(masks), bool)
        if mask is not None and len(mask) != len(ids):
            raise DataError(f"shards: a mask of {len(mask)} entries for a document of {len(ids)} tokens")
        if eos_id is not None:
            ids = np.append(ids, eos_id)
            mask = None if mask is None else np.append(mask, mask[-1:] if len(mask) else True)
        writer.add(ids.astype(dtype), mask)
    return writer.finish()


class _ShardWriter:
    """Fills shards to the token; a document may lie across two."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], shard_tokens: int, masked: bool) -> None:
        self.directory, self.shard_tokens, self.masked = directory, shard_tokens, masked
        self.digest = hashlib.sha256(dtype.str.encode())
        self.tokens = self.documents = self.shards = self.scored = 0
        self._ids: list[NDArray[Any]] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._starts: list[int] = []
        self._held = 0

    def add(self, ids: NDArray[Any], mask: NDArray[np.bool_] | None) -> None:
        self._starts.append(self.tokens)
        self.documents += 1
        for content in (np.int64(len(ids)), ids, mask):
            if content is not None:
                self.digest.update(content.tobytes())
        done = 0
        while done < len(ids):
            take = min(len(ids) - done, self.shard_tokens - self._held)
            self._ids.append(ids[done : done + take])
            if mask is not None:
                self._masks.append(mask[done : done + take])
            done += take
            self._held += take
            self.tokens += take
            if self._held == self.shard_tokens:
                self._flush()
        self.scored += len(ids) if mask is None else int(mask.sum())

    def _flush(self) -> None:
        stem = self.directory / f"train-{self.shards:05d}"
        np.save(f"{stem}.npy", np.concatenate(self._ids))
        np.save(f"{stem}.documents.npy", np.asarray(self._starts, np.int64))
        if self.masked:
            np.save(f"{stem}.scored.npy", np.concatenate(self._masks))
        self.shards += 1
        self._ids, self._masks, self._starts, self._held = [], [], [], 0

    def finish(self) -> dict[str, Any]:
        if self._held:
            self._flush()
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "shards": self.shards,
            "scored_tokens": self.scored,
            "sha256": self.digest.hexdigest(),
        }


class Fed(NamedTuple):
    """Windows as a causal LM is fed them: `ids` and `targets` int64 [n, T]; `scored` bool [n, T], which targets are
    trained on (None: all); `positions` int64 [n, T], of each token in its document (None: they run on)."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    scored: NDArray[np.bool_] | None = None
    positions: NDArray[np.int64] | None = None


class Windows:
    """The training windows of a data set: window w is ids[w·L : w·L + L + 1] of the whole stream.

    Shards stay on disk and are mapped into memory; windows may lie across. A last partial one is dropped.

    Raises:
        DataError: no shards, or some of them missing or cut short.
    """

    def __init__(self, data_dir: Path, sequence_length: int) -> None:
        folder = data_dir / FOLDER
        names = sorted(p for p in folder.glob("train-*.npy") if p.name.count(".") == 1)
        if not names:
            raise DataError(f"data.dir: {data_dir} holds no shards; run `vernier prepare CONFIG` first")
        if [p.name for p in names] != [f"train-{i:05d}.npy" for i in range(len(names))]:
            raise DataError(f"data.dir: a shard is missing in {folder}; prepare the data again with --fresh")
        self.sequence_length = sequence_length
        self._paths = names
        self._shards = [mapped(p) for p in names]
        masks = [p.with_name(f"{p.stem}.scored.npy") for p in names]
        self._masks = [mapped(p) for p in masks] if any(p.exists() for p in masks) else None
        lengths = [len(shard) for shard in self._shards]
        if self._masks is not None and [len(mask) for mask in self._masks] != lengths:
            raise DataError(f"data.dir: masks and shards in {folder} are not of one length")
        self._ends = np.cumsum(lengths)
        self.tokens = int(self._ends[-1])
        self._counts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return max(0, (int(self._ends[-1]) - 1) // self.sequence_length)

    def rows(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """(ids int64 [n, L + 1], scored bool [n, L] by target or None where all are).

        Raises:
            IndexError: there is no such window.
        """
        self._check(indices)
        places = indices[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        ids = self._taken(self._shards, places).astype(np.int64)
        return ids, None if self._masks is None else self._taken(self._masks, places[:, 1:])

    def fed(self, indices: NDArray[np.int64]) -> Fed:
        """Windows [n] as a causal LM is fed them.

        Raises:
            IndexError: there is no such window.
        """
        ids, scored = self.rows(indices)
        return Fed(ids[:, :-1], ids[:, 1:], scored)

    def at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """(ids, which of them are trained on, None: all) at places [...] of the whole stream, both [...]."""
        return self._taken(self._shards, places).astype(np.int64), self.mask(places)

    def mask(self, places: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Which tokens at places [...] of the whole stream are trained on, bool [...]; None: all."""
        return None if self._masks is None else self._taken(self._masks, places)

    def target_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many targets of each window are trained on, int64 [n]."""
        self._check(indices)
        if self._masks is None:
            return np.full(len(indices), self.sequence_length, np.int64)
        if self._counts is None:
            self._counts = np.concatenate([*self._counted(self._masks), np.empty(0, np.int64)])
        return self._counts[indices]

    def any_target(self) -> bool:
        """Whether there is a target at all to train on; reads no more than it takes to find one."""
        return self._masks is None or any(counts.any() for counts in self._counted(self._masks))

    def documents(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers from 0, ascending, int64 [D], of the documents that these windows [n] hold tokens of."""
        self._check(indices)
        if not len(indices):
            return np.empty(0, np.int64)
        starts = np.concatenate([mapped(p.with_name(f"{p.stem}.documents.npy")) for p in self._paths])
        places = indices[:, None] * self.sequence_length + np.array([0, self.sequence_length])
        first, last = np.searchsorted(starts, places, side="right").T - 1
        return np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))

    def _check(self, indices: NDArray[np.int64]) -> None:
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"windows {indices.min()} to {indices.max()} asked for, there are {len(self)}")

    def _taken(self, arrays: list[NDArray[Any]], places: NDArray[np.int64]) -> NDArray[Any]:
        if len(arrays) == 1:
            return arrays[0][places]
        shard = np.searchsorted(self._ends, places, side="right")
        out = np.empty(places.shape, arrays[0].dtype)
        for number in np.unique(shard):
            here = shard == number
            start = self._ends[number] - len(arrays[number])
            out[here] = arrays[number][places[here] - start]
        return out

    def _counted(self, masks: list[NDArray[np.bool_]]) -> Iterator[NDArray[np.int64]]:
        """Targets of each window, int64, some windows at a time."""
        length, windows = self.sequence_length, len(self)
        step = max(1, COUNT_CHUNK // length)
        for first in range(0, windows, step):
            last = min(windows, first + step)
            places = np.arange(first * length + 1, last * length + 1)
            yield self._taken(masks, places).reshape(last - first, length).sum(axis=1)


def mapped(path: Path) -> NDArray[Any]:
    """The array [...] in a file, read as it is looked at.

    Raises:
        DataError: it is missing, or cut short.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read, perhaps cut short ({error})") from None
