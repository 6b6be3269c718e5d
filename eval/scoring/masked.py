"""Scoring of masked language models (BERT and its kin): masked targets, and pseudo-log-likelihood.

What is fed is made here, from the reference set alone; which ranks score what is in eval/scoring/score.py.
Legend: B samples of a batch, T tokens fed, N masked targets or rows, V vocabulary, H hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from configs.errors import DataError
from eval.reference.set import ReferenceSet
from eval.reference.tokenizer import open_tokenizer
from eval.scoring.losses import IGNORED, SampleLosses, chunk_length, evaluating
from eval.scoring.models import load_checked
from eval.tables import POSITION_BINS

OBJECTIVES = ("masked", "pll")
MASKED_PERCENT = 15  # of a sample's targets; BERT, arXiv 1810.04805, section 3.1, as are the two below
MASK_SHARE = 0.8  # of these become the mask token
RANDOM_SHARE = 0.1  # and these a random one; the rest stay
PLL_ROWS = 64  # rows a forward pass


@dataclass(frozen=True, eq=False)
class SpecialIds:
    """Ids that masked scoring adds to a text. `ordinary` int64 [n]: those that may stand in at random."""

    cls: int
    sep: int
    mask: int
    pad: int
    ordinary: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """A batch of samples as fed: `ids` int64 [B, T], `attention` bool [B, T], False where padded.

    `target` int64 [B, T] is what a masked token was, IGNORED where nothing is asked. `samples` int64 [B].
    """

    ids: NDArray[np.int64]
    attention: NDArray[np.bool_]
    target: NDArray[np.int64]
    samples: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PllRows:
    """One sample as many times as it has scored targets: `ids` int64 [N, T], where row k has its target k,
    at `place[k]` (int64 [N]), masked; it was `target[k]` (int64 [N])."""

    ids: NDArray[np.int64]
    place: NDArray[np.int64]
    target: NDArray[np.int64]


def special_ids(tokenizer_dir: Path) -> SpecialIds:
    """The special ids of a tokenizer; BOS and EOS stand in where there is no CLS or SEP, as in RoBERTa's.

    Raises:
        DataError: it has no mask token, or cannot be read.
    """
    tokenizer = open_tokenizer(tokenizer_dir)
    special = tokenizer.special
    if "mask_token" not in special:
        raise DataError(
            f"{tokenizer_dir}: has no mask token; tokenize the reference set for a masked LM: "
            "vernier prepare --reference REF --tokenizer MODEL --out NEW_DIR"
        )
    added = list(tokenizer.backend.get_added_tokens_decoder())
    every = np.fromiter(tokenizer.backend.get_vocab(with_added_tokens=True).values(), np.int64)
    return SpecialIds(
        cls=special.get("cls_token", tokenizer.prefix_id),
        sep=special.get("sep_token", tokenizer.eos_id),
        mask=special["mask_token"],
        pad=special.get("pad_token", 0),
        ordinary=np.setdiff1d(every, added),  # sorted, so no order of a dictionary gets in
    )


def masked_counts(tokens_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """How many of so many targets are masked: 15 %, rounded, and at least one."""
    return np.maximum(1, (MASKED_PERCENT * tokens_N.astype(np.int64) + 50) // 100).astype(np.int32)


def masked_batch(reference: ReferenceSet, batch: int, special: SpecialIds, *, seed_of: str) -> MaskedBatch:
    """The samples of `batch` as they are fed, with 15 % of their scored targets chosen: 80 % of those are masked,
    10 % another token, 10 % as they were (BERT, arXiv 1810.04805, section 3.1).

    A sample is CLS, its ids but the first, SEP. So its first id, the prefix or one token of context, makes room
    for CLS, every target is where it was in `input_ids`, and each belongs to just one sample. What is chosen is a
    function of `seed_of` (the set's tokens fingerprint) and the sample's number: the same for every model, in any
    batch. It does not change with the version of numpy, which keeps its raw generators' streams.
    """
    samples, ids_BT, attention_BT, first_B, stop_B = _fed(reference, batch, special)
    target_BT = np.full(ids_BT.shape, IGNORED, np.int64)
    for row, sample in enumerate(samples.tolist()):
        places, shown = _chosen(ids_BT[row], int(first_B[row]), int(stop_B[row]), special, f"{seed_of} {sample}")
        target_BT[row, places] = ids_BT[row, places]
        ids_BT[row, places] = shown
    return MaskedBatch(ids_BT, attention_BT, target_BT, samples)


def pll_rows(reference: ReferenceSet, sample: int, special: SpecialIds) -> PllRows:
    """The rows whose summed losses are minus a sample's pseudo-log-likelihood: each scored target masked alone
    (Salazar et al., arXiv 1910.14659, equation 1), the sample fed as in `masked_batch`."""
    whole = reference.input_ids[reference.offsets[sample] : reference.offsets[sample + 1]].astype(np.int64)
    place = np.arange(int(reference.labels_from[sample]), len(whole))
    ids = np.tile(np.concatenate([[special.cls], whole[1:], [special.sep]]), (len(place), 1))
    ids[np.arange(len(place)), place] = special.mask
    return PllRows(ids, place, whole[place])


def _fed(
    reference: ReferenceSet, batch: int, special: SpecialIds
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """(samples [B], ids [B, T], attention [B, T], first scored target [B], end of the scored targets [B])."""
    plain_BT, first_B, length_B = reference.batch_inputs(batch)
    rows = np.arange(len(length_B))
    at_T = np.arange(plain_BT.shape[1] + 1)
    ids_BT = np.full((len(rows), len(at_T)), special.pad, np.int64)
    ids_BT[:, :-1][at_T[:-1] < length_B[:, None]] = plain_BT[at_T[:-1] < length_B[:, None]]
    ids_BT[:, 0] = special.cls
    ids_BT[rows, length_B] = special.sep
    return reference.batch_samples(batch), ids_BT, at_T <= length_B[:, None], first_B, length_B


def _chosen(
    ids_T: NDArray[np.int64], first: int, stop: int, special: SpecialIds, key: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places of a sample's chosen targets, ascending; what stands there instead)."""
    tokens = stop - first
    count = int(masked_counts(np.asarray([tokens], np.int32))[0])
    generator = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    raw = generator.random_raw(tokens + 2 * count)
    places = first + np.sort(np.argsort(raw[:tokens], kind="stable")[:count])
    kind = raw[tokens : tokens + count] / 2.0**64
    random = special.ordinary[(raw[tokens + count :] % np.uint64(len(special.ordinary))).astype(np.int64)]
    shown = np.where(kind < MASK_SHARE, special.mask, np.where(kind < MASK_SHARE + RANDOM_SHARE, random, ids_T[places]))
    return places.astype(np.int64), shown


def _loaded(directory: Path, dtype: str, trust_remote_code: bool) -> Any:
    model = load_checked("masked", directory, dtype, trust_remote_code)
    if getattr(model.config, "is_encoder_decoder", False):
        raise DataError(f"{directory}: is an encoder-decoder, not a masked LM that predicts what it is fed")
    return model


def make_scorer(
    objective: str,
    directory: Path,
    dtype: str,
    reference: ReferenceSet,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> MaskedScorer:
    """A model of a checked directory made ready to score `reference` by `objective`, "masked" or "pll".

    Raises:
        DataError: the set's tokenizer has no mask token, the model is no masked LM, or takes too few tokens.
    """
    if objective not in OBJECTIVES:
        raise DataError(f"objective: {objective!r} is none of {', '.join(OBJECTIVES)}")
    special = special_ids(reference.directory / "tokenizer")
    model = _loaded(directory, dtype, trust_remote_code)
    longest, takes = int(np.diff(reference.offsets).max()) + 1, positions(model)
    if takes is not None and takes < longest:  # looked at before it is on a GPU, where it would end the process
        raise DataError(
            f"{directory}: takes {takes} tokens, the reference set's windows have up to {longest} with CLS and SEP; "
            f"cut its documents anew: vernier prepare --reference {reference.directory} --tokenizer {directory} "
            f"--sequence-length {takes - 2} --out NEW_DIR"
        )
    return MaskedScorer(model.to(device), objective, reference, special, device)


def positions(model: Any) -> int | None:
    """How many tokens the model takes, None where nothing bounds them."""
    limits = [getattr(model.config, key, None) for key in ("max_position_embeddings", "n_positions")]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding's.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


class MaskedScorer:
    """A masked LM made ready to score batches of a reference set.

    The result for a batch depends on the batch and the weights only, never on which rank meets it, or after what.
    """

    def __init__(
        self, model: Any, objective: str, reference: ReferenceSet, special: SpecialIds, device: torch.device
    ) -> None:
        self.model, self.objective, self.special, self.device = model, objective, special, device
        self.encoder = encoder_of(model)
        self.chunk = chunk_length(int(model.config.get_text_config().vocab_size))
        length = reference.sequence_length
        bins = np.arange(length + 2) - 1  # by the target's place among the causal ones, as for other objectives
        self.bins_TK = np.eye(POSITION_BINS)[np.clip(bins * POSITION_BINS // length, 0, POSITION_BINS - 1)]

    def tokens_of(self, reference: ReferenceSet) -> NDArray[np.int32]:
        """Scored targets of each sample, int32 [samples]."""
        return masked_counts(reference.tokens) if self.objective == "masked" else reference.tokens

    def bytes_of(self, reference: ReferenceSet) -> NDArray[np.int32]:
        """Bytes that were scored, int32 [samples]; 0 where only some tokens were: that is no loss of the text."""
        return np.zeros_like(reference.bytes) if self.objective == "masked" else reference.bytes

    @torch.no_grad()
    def score_batch(self, reference: ReferenceSet, batch: int) -> SampleLosses:
        """Losses of the samples of `batch`, ascending."""
        with evaluating(self.model):
            return self._scored(reference, batch)

    def _scored(self, reference: ReferenceSet, batch: int) -> SampleLosses:
        if self.objective == "masked":
            fed = masked_batch(reference, batch, self.special, seed_of=reference.tokens_fingerprint)
            row, place = np.nonzero(fed.target != IGNORED)
            nll, hit = self._nll(fed.ids, fed.attention, row, place, fed.target[row, place])
            return self._summed(len(fed.samples), row, place, nll, hit)
        found = []
        samples = reference.batch_samples(batch)
        for number, sample in enumerate(samples.tolist()):
            rows = pll_rows(reference, sample, self.special)
            for start in range(0, len(rows.ids), PLL_ROWS):
                ids, place, target = (part[start : start + PLL_ROWS] for part in (rows.ids, rows.place, rows.target))
                nll, hit = self._nll(ids, np.ones(ids.shape, bool), np.arange(len(ids)), place, target)
                found.append((np.full(len(ids), number), place, nll, hit))
        return self._summed(len(samples), *(np.concatenate(part) for part in zip(*found, strict=True)))

    def _nll(
        self,
        ids_BT: NDArray[np.int64],
        attention_BT: NDArray[np.bool_],
        row_N: NDArray[np.int64],
        place_N: NDArray[np.int64],
        target_N: NDArray[np.int64],
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(negative log likelihood in nats, 1 where the target was the likeliest) at (row, place), rows ascending."""
        nll, hit = [], []
        for first, stop in self._portions(row_N, len(ids_BT)):
            mine = slice(*np.searchsorted(row_N, [first, stop]))
            ids, attention, row, place, target = (
                torch.from_numpy(part).to(self.device)
                for part in (
                    ids_BT[first:stop],
                    attention_BT[first:stop],
                    row_N[mine] - first,
                    place_N[mine],
                    target_N[mine],
                )
            )
            logits_NV = logits_at(self.model, self.encoder, ids, attention, row, place).float()
            nll.append(F.cross_entropy(logits_NV, target, reduction="none").double().cpu().numpy())
            hit.append((logits_NV.argmax(-1) == target).long().cpu().numpy())
        return np.concatenate(nll), np.concatenate(hit)

    def _portions(self, row_N: NDArray[np.int64], rows: int) -> Iterator[tuple[int, int]]:
        """Consecutive rows (first, stop) whose fp32 logits stay within bounds, or one row."""
        upto = np.searchsorted(row_N, np.arange(rows + 1))  # masked targets before each row
        first = 0
        while first < rows:
            fit = int(np.searchsorted(upto, upto[first] + self.chunk, side="right")) - 1
            stop = first + 1 if self.encoder is None else max(first + 1, fit)
            yield first, stop
            first = stop

    def _summed(
        self,
        samples: int,
        row_N: NDArray[np.int64],
        place_N: NDArray[np.int64],
        nll_N: NDArray[np.float64],
        hit_N: NDArray[np.int64],
    ) -> SampleLosses:
        bin_NK = self.bins_TK[place_N]
        loss_BK, tokens_BK = np.zeros((samples, POSITION_BINS)), np.zeros((samples, POSITION_BINS))
        np.add.at(loss_BK, row_N, nll_N[:, None] * bin_NK)
        np.add.at(tokens_BK, row_N, bin_NK)
        return SampleLosses(
            loss=torch.from_numpy(np.bincount(row_N, weights=nll_N, minlength=samples)),
            correct=torch.from_numpy(np.bincount(row_N, weights=hit_N, minlength=samples).astype(np.int32)),
            position_loss=torch.from_numpy(loss_BK),
            position_tokens=torch.from_numpy(tokens_BK.astype(np.int32)),
        )


def encoder_of(model: Any) -> Any | None:
    """The encoder of a masked LM whose logits at a place hang on nothing but its hidden state there, else None.

    Then logits are made at masked places only. It is tried on a few tokens rather than believed.
    """
    encoder = model.base_model
    if encoder is model:
        return None
    with evaluating(model):
        return _tried(model, encoder)


def _tried(model: Any, encoder: Any) -> Any | None:
    device = next(model.parameters()).device
    line = torch.arange(1, 9, device=device) % model.config.get_text_config().vocab_size
    ids = torch.stack([line, line.flip(0)])
    row, place = torch.tensor([0, 0, 1], device=device), torch.tensor([2, 7, 5], device=device)
    with torch.no_grad():
        whole = logits_at(model, None, ids, torch.ones_like(ids, dtype=torch.bool), row, place)
        try:
            parts = logits_at(model, encoder, ids, torch.ones_like(ids, dtype=torch.bool), row, place)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return None  # its head wants more than hidden states
    alike = whole.shape == parts.shape and bool((whole - parts).abs().max() <= 0.01 * whole.abs().max())
    return encoder if alike else None


def logits_at(
    model: Any,
    encoder: Any | None,
    ids: torch.Tensor,
    attention: torch.Tensor | None,
    row: torch.Tensor,
    place: torch.Tensor,
) -> torch.Tensor:
    """Logits [N, V] at (row, place) of ids [B, T]; with `encoder` the head sees no other places.

    `attention`: bool [B, T], False where padded; None: nothing is.
    """
    mask = None if attention is None else attention.long()
    if encoder is None:
        return model(input_ids=ids, attention_mask=mask).logits[row, place]

    def select(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][row, place][None], *output[1:])
        output.last_hidden_state = output.last_hidden_state[row, place][None]  # [1, N, H]
        return output

    hook = encoder.register_forward_hook(select)
    try:
        return model(input_ids=ids, attention_mask=mask).logits[0]
    finally:
        hook.remove()
