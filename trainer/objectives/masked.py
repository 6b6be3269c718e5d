"""Hidden tokens predicted from both sides: BERT, RoBERTa and their kin.

A window is fed as the reference set's samples are (eval/scoring/masked.py): CLS, its tokens, SEP. Which tokens are
asked for, and what stands there instead, is a function of (seed, position, window), drawn anew each time a window comes
(RoBERTa, arXiv 1907.11692, section 4.1): neither ranks nor the micro-batch change it.
Legend: B windows, T tokens of a window, V vocabulary, H hidden width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from configs.schema import Config
from eval.reference.tokenizer import open_tokenizer
from eval.scoring.losses import IGNORED
from eval.scoring.masked import MASK_SHARE, RANDOM_SHARE, SpecialIds, encoder_of, logits_at, special_ids
from trainer.data.examples import AnyWindows
from trainer.data.shards import Windows
from trainer.order import Int64s, draws, window_seeds

LAST = np.uint64(0xFFFFFFFFFFFFFFFF)


class Masked:
    """A window's tokens, some of which are hidden and asked for; no special ones."""

    scored_as: tuple[str, ...] = ("masked",)

    def __init__(self, config: Config) -> None:
        directory = config.data_dir / "tokenizer"
        self.special = special_ids(directory)
        self.length, self.seed, self.ratio = config.sequence_length, config.seed, config.objective.mask_ratio
        self.ordinary_V = np.zeros(open_tokenizer(directory).vocab_size, bool)
        self.ordinary_V[self.special.ordinary] = True
        self.starts_V = word_starts(directory) if config.objective.whole_words else None

    def count(self, data: AnyWindows, windows: Int64s, position: int) -> int:
        rows = stream(data).rows(windows)[0]
        if self.starts_V is not None:  # how many tokens the words have is known once they are drawn
            return int((self._masked(rows, windows, position)[1] != IGNORED).sum())
        return int(asked_for(self.ordinary_V[rows[:, 1:]].sum(1), self.ratio).sum())

    def inputs(self, data: AnyWindows, windows: Int64s, position: int) -> dict[str, torch.Tensor]:
        """Ids of windows [n] as fed, int64 [n, T]; row, place and token of each target, int64 [N]."""
        ids_BT, target_BT = self._masked(stream(data).rows(windows)[0], windows, position)
        # Found here, where the host need not wait for a device to know how many they are.
        row_N, place_N = np.nonzero(target_BT != IGNORED)
        found = {"ids_BT": ids_BT, "row_N": row_N, "place_N": place_N, "target_N": target_BT[row_N, place_N]}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _masked(
        self, rows: NDArray[np.int64], windows: Int64s, position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(ids as fed, targets) of windows [B, T + 1], each int64 [B, T + 2]."""
        seeds = np.asarray(window_seeds(self.seed, position, windows), np.uint64)
        can_BT = self.ordinary_V[rows[:, 1:]]
        starts_BT = None if self.starts_V is None else self.starts_V[rows[:, 1:]]
        return mask_rows(rows, can_BT, seeds, self.special, self.ratio, starts_BT)

    def dry(self, rows: int) -> dict[str, torch.Tensor]:
        """As `inputs`, of nothing, [rows, T]."""
        asked = int(asked_for(np.asarray([self.length]), self.ratio)[0])
        row_N = torch.arange(rows).repeat_interleave(asked)
        place_N = torch.arange(asked).repeat(rows)
        ids_BT = torch.zeros((rows, self.length + 2), dtype=torch.int64)
        return {"ids_BT": ids_BT, "row_N": row_N, "place_N": place_N, "target_N": torch.zeros_like(row_N)}

    def module(self, lm: Any) -> TrainableMaskedLM:
        return TrainableMaskedLM(lm)


class TrainableMaskedLM(nn.Module):
    """A masked LM whose forward pass gives a micro-batch's summed loss; logits are made at the targets alone, where
    its head lets them."""

    adds = False
    added: torch.Tensor | None = None

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.alone = encoder_of(lm) is not None

    def forward(
        self, ids_BT: torch.Tensor, row_N: torch.Tensor, place_N: torch.Tensor, target_N: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the negative log likelihood of the targets [N] at (row, place): nats, fp32 scalar."""
        encoder = self.lm.base_model if self.alone else None
        logits_NV = logits_at(self.lm, encoder, ids_BT, None, row_N, place_N)
        return F.cross_entropy(logits_NV.float(), target_N, reduction="sum")


def stream(data: AnyWindows) -> Windows:
    """The windows of a masked LM, which are a stream's: its settings allow no other."""
    assert isinstance(data, Windows)
    return data


def asked_for(tokens_B: NDArray[np.int64], ratio: float) -> NDArray[np.int64]:
    """How many of so many tokens are asked for: the ratio, rounded; at least one where there is one. int64 [B]."""
    return np.where(tokens_B > 0, np.maximum(1, np.floor(ratio * tokens_B + 0.5)), 0).astype(np.int64)


def mask_rows(
    rows: NDArray[np.int64],
    can_BT: NDArray[np.bool_],
    seeds: NDArray[np.uint64],
    special: SpecialIds,
    ratio: float,
    starts_BT: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids as fed, targets) of windows: CLS, T tokens, SEP; each int64 [B, T + 2], targets IGNORED where nothing is
    asked.

    Of the tokens that can be asked for, `ratio` are, in each window: 80 % of them become the mask, 10 % another token,
    10 % stay (BERT, arXiv 1810.04805, section 3.1).

    Args:
        rows: int64 [B, T + 1]; the first is context, and makes room for CLS.
        can_BT: which of the last T can be asked for.
        seeds: uint64 [B].
        starts_BT: where words start; then whole words are drawn until one more would be too many. None: tokens are.
    """
    size = rows.shape[1] - 1
    draw_BT = draws(seeds, 3 * size)
    key_BT, first_BT = draw_BT[:, :size] >> np.uint64(1), None
    count_B = asked_for(can_BT.sum(1), ratio)
    if starts_BT is not None:
        first_BT = np.maximum.accumulate(np.where(starts_BT | ~can_BT, np.arange(size), 0), axis=1)
        key_BT = np.take_along_axis(key_BT, first_BT, axis=1)  # a word's tokens share its key
    key_BT = np.where(can_BT, key_BT, LAST)  # who cannot be asked for comes last
    order_BT = np.argsort(key_BT, axis=1, kind="stable")
    rank_BT = np.empty_like(order_BT)
    np.put_along_axis(rank_BT, order_BT, np.arange(size)[None, :].repeat(len(rows), 0), axis=1)
    chosen_BT = can_BT & (rank_BT < count_B[:, None])
    if first_BT is not None:  # the word that the last one is of goes in whole or, unless it is the first, not at all
        chosen_BT = _whole(chosen_BT, can_BT, first_BT)
    kind_BT = draw_BT[:, size : 2 * size] / 2.0**64
    pick_BT = (draw_BT[:, 2 * size :] % np.uint64(len(special.ordinary))).astype(np.int64)
    shown_BT = np.where(
        kind_BT < MASK_SHARE,
        special.mask,
        np.where(kind_BT < MASK_SHARE + RANDOM_SHARE, special.ordinary[pick_BT], rows[:, 1:]),
    )
    ids_BT = np.empty((len(rows), size + 2), np.int64)
    ids_BT[:, 0], ids_BT[:, -1] = special.cls, special.sep
    ids_BT[:, 1:-1] = np.where(chosen_BT, shown_BT, rows[:, 1:])
    target_BT = np.full_like(ids_BT, IGNORED)
    target_BT[:, 1:-1] = np.where(chosen_BT, rows[:, 1:], IGNORED)
    return ids_BT, target_BT


def _whole(chosen_BT: NDArray[np.bool_], can_BT: NDArray[np.bool_], first_BT: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The choice without the word that it would cut in two; of a single word all of it."""
    out = np.zeros_like(chosen_BT)
    for row, chosen_T in enumerate(chosen_BT):
        words, taken = np.unique(first_BT[row][chosen_T], return_counts=True)
        whole = np.array([int((can_BT[row] & (first_BT[row] == word)).sum()) for word in words], np.int64)
        kept = words[taken == whole] if (taken == whole).any() else words
        out[row] = can_BT[row] & np.isin(first_BT[row], kept)
    return out


def word_starts(tokenizer_dir: Any) -> NDArray[np.bool_]:
    """Whether each id begins a word, bool [V]: by the mark that the tokenizer has for a blank before, or for none.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    tokenizer = open_tokenizer(tokenizer_dir)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    pieces = list(vocabulary)
    blank = next((mark for mark in ("Ġ", "▁") if any(piece.startswith(mark) for piece in pieces)), None)
    out_V = np.ones(tokenizer.vocab_size, bool)
    for piece, number in vocabulary.items():
        out_V[number] = piece.startswith((blank, "Ċ", "ĉ")) if blank else not piece.startswith("##")
    return out_V
