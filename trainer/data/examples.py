"""Training on whole documents: several packed into a window, none of which sees another, or one a window.

Legend: `_E` one entry a piece (a document, or a part of one that is too long), `_D` one a document.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.schema import Config
from trainer.data.shards import COUNT_CHUNK, FOLDER, Fed, Windows, mapped

LABELS = "labels.npy"  # beside the shards: of each document, what a classifier is to say


class Examples:
    """The windows of a data set that is packed by documents, or not at all; the same each epoch.

    A piece is fed without its last token, and asked for all but its first; in a window pieces lie one after the other.
    Texts come with what stands before a document (`prefix`), so that their first token is asked for too, and are cut
    into pieces of `sequence_length` targets where they are longer.

    Raises:
        DataError: no shards, or a document is longer than a window.
    """

    def __init__(self, data_dir: Path, sequence_length: int, packing: str, prefix: int | None = None) -> None:
        self.stream = Windows(data_dir, sequence_length)
        self.sequence_length, self.packing, self.prefix = sequence_length, packing, prefix
        folder = data_dir / FOLDER
        starts = [mapped(path) for path in sorted(folder.glob("train-*.documents.npy"))]
        self.starts_D = np.concatenate([*starts, np.empty(0, np.int64)]).astype(np.int64)
        ends_D = np.append(self.starts_D[1:], self.stream.tokens)
        self.labels = mapped(folder / LABELS) if (folder / LABELS).is_file() else None
        # A piece is asked for the tokens from `first` to `stop`, and fed those one place before.
        first_D = self.starts_D + (prefix is None)
        self.first_E, self.stop_E, self.document_E = _pieces(first_D, ends_D, sequence_length, cut=prefix is not None)
        size_E = self.stop_E - self.first_E
        if len(size_E) and int(size_E.max()) > sequence_length:
            raise DataError(
                f"sequence_length: {sequence_length} is shorter than a document of {int(size_E.max()) + 1} tokens that "
                "the data was prepared with; prepare it anew with this sequence_length"
            )
        self.bounds = np.arange(len(size_E) + 1)
        if packing == "documents":
            order_E, self.bounds = _packed(size_E, sequence_length)
            self.first_E, self.stop_E, self.document_E = (
                one[order_E] for one in (self.first_E, self.stop_E, self.document_E)
            )
        self._counts: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def fill(self) -> float:
        """The part of all windows' places that hold a token."""
        return float((self.stop_E - self.first_E).sum()) / max(1, len(self) * self.sequence_length)

    def fed(self, indices: NDArray[np.int64]) -> Fed:
        """Windows [n] as a causal LM is fed them; the longest of them has T tokens where they are not packed.

        Raises:
            IndexError: there is no such window.
        """
        spans = [range(int(self.bounds[at]), int(self.bounds[at + 1])) for at in self._checked(indices)]
        sizes = [int((self.stop_E[list(span)] - self.first_E[list(span)]).sum()) for span in spans]
        width = self.sequence_length if self.packing == "documents" else max(sizes)
        place_BT = np.zeros((len(spans), width), np.int64)  # in the stream, of what is asked for
        position_BT = np.zeros((len(spans), width), np.int64)
        real_BT = np.zeros((len(spans), width), bool)
        opens_BT = np.zeros((len(spans), width), bool)
        for row, span in enumerate(spans):
            at = 0
            for piece in span:
                first, stop = int(self.first_E[piece]), int(self.stop_E[piece])
                part = slice(at, at + stop - first)
                place_BT[row, part] = np.arange(first, stop)
                position_BT[row, part] = np.arange(stop - first)
                real_BT[row, part] = True
                opens_BT[row, at] = self.prefix is not None and first == self.starts_D[self.document_E[piece]]
                at += stop - first
            position_BT[row, at:] = np.arange(width - at)  # what is left is a piece of its own, and asked for nothing
        ids_BT, _ = self.stream.at(np.maximum(place_BT - 1, 0))
        if self.prefix is not None:
            ids_BT[opens_BT] = self.prefix
        ids_BT[~real_BT] = 0
        targets_BT, scored_BT = self.stream.at(place_BT)
        wanted = real_BT if scored_BT is None else real_BT & scored_BT
        return Fed(ids_BT, targets_BT, wanted, position_BT if self.packing == "documents" else None)

    def whole(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(ids, which of them are there) of windows [n] of one document each: int64 and bool, both [n, T].

        Raises:
            IndexError: there is no such window.
        """
        document = self.document_E[self._checked(indices)]
        start = self.starts_D[document]
        sizes = np.append(self.starts_D[1:], self.stream.tokens)[document] - start
        at_T = np.arange(int(sizes.max()))
        real_BT = at_T < sizes[:, None]
        ids_BT, _ = self.stream.at(np.where(real_BT, start[:, None] + at_T, 0))
        return ids_BT, real_BT

    def target_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many targets of each window are trained on, int64 [n]."""
        self._checked(indices)
        if self._counts is None:
            upto = np.concatenate([[0], np.cumsum(self._of_pieces())])
            self._counts = upto[self.bounds[1:]] - upto[self.bounds[:-1]]
        return self._counts[indices]

    def _of_pieces(self) -> NDArray[np.int64]:
        """Targets of each piece, int64 [E]."""
        size_E = self.stop_E - self.first_E
        out = size_E.copy()
        for chunk in np.split(np.arange(len(size_E)), np.flatnonzero(np.diff(np.cumsum(size_E) // COUNT_CHUNK)) + 1):
            if len(chunk):  # pieces of about so many tokens
                begins = np.cumsum(size_E[chunk]) - size_E[chunk]
                places = np.arange(size_E[chunk].sum()) + np.repeat(self.first_E[chunk] - begins, size_E[chunk])
                scored = self.stream.mask(places)
                if scored is not None:
                    out[chunk] = np.add.reduceat(scored, begins, dtype=np.int64)
        return out

    def any_target(self) -> bool:
        """Whether there is a target at all to train on."""
        return bool(self.target_counts(np.arange(len(self))).any())

    def documents(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers from 0, ascending, int64 [D], of the documents in these windows [n]."""
        found = [self.document_E[self.bounds[at] : self.bounds[at + 1]] for at in self._checked(indices)]
        return np.unique(np.concatenate([*found, np.empty(0, np.int64)]))

    def _checked(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"windows {indices.min()} to {indices.max()} asked for, there are {len(self)}")
        return indices


AnyWindows = Windows | Examples


def open_windows(config: Config, data_dir: Path, prefix: int) -> AnyWindows:
    """The training windows of a data set, as a config has them.

    Args:
        prefix: the id that stands before a text.

    Raises:
        DataError: no shards, some of them missing or cut short, or a document longer than a window.
    """
    if config.packing == "stream":
        return Windows(data_dir, config.sequence_length)
    texts = config.objective.name == "causal"
    return Examples(data_dir, config.sequence_length, config.packing, prefix if texts else None)


def _pieces(
    first_D: NDArray[np.int64], stop_D: NDArray[np.int64], most: int, *, cut: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(first, stop, document) of each piece: documents with a target, `cut` into pieces of at most so many."""
    size_D = stop_D - first_D
    parts_D = -(-size_D // most) if cut else (size_D > 0).astype(np.int64)
    document_E = np.repeat(np.arange(len(size_D)), np.maximum(parts_D, 0))
    number_E = np.arange(len(document_E)) - np.repeat(np.cumsum(parts_D) - parts_D, parts_D)
    first_E = first_D[document_E] + number_E * (most if cut else 0)
    stop_E = np.minimum(stop_D[document_E], first_E + most) if cut else stop_D[document_E]
    return first_E, stop_E, document_E


def _packed(size_E: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(pieces in the order of windows, where windows begin and end in it: int64 [windows + 1]).

    Best fit decreasing: from the longest to the shortest, each goes where the least is left over (Johnson et al.,
    "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3, 1974).
    """
    window_E = np.empty(len(size_E), np.int64)
    with_room: dict[int, list[int]] = {}  # windows by the places they have left
    rooms: list[int] = []  # those places, ascending
    windows = 0
    for piece in np.argsort(-size_E, kind="stable").tolist():
        size = int(size_E[piece])
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            left = rooms[at]
            window = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        else:
            left, window, windows = most, windows, windows + 1
        window_E[piece] = window
        left -= size
        if left:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(window)
    order_E = np.argsort(window_E, kind="stable")
    return order_E, np.searchsorted(window_E[order_E], np.arange(windows + 1)).astype(np.int64)


def write_labels(part: Path, labels: Sequence[Any] | NDArray[Any]) -> None:
    """Writes the labels of training documents, [D] or [D, K], beside their shards."""
    np.save(part / FOLDER / LABELS, np.asarray(labels))
