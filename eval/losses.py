"""The loss of every sample of a batch, without ever holding the batch's full logits.

Legend: B samples, T tokens fed (one fewer than a sample's ids), N scored targets, H hidden width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from eval.tables import POSITION_BINS

LOGITS_BYTES = int(os.environ.get("VERNIER_LOGITS_BYTES", 64 << 20))  # what a chunk of fp32 logits may take
IGNORED = -100  # a target that is not scored (torch's and transformers' convention)

Head = Callable[[torch.Tensor], torch.Tensor]


def chunk_length(vocab_size: int) -> int:
    """Targets a chunk, so that their fp32 logits stay within LOGITS_BYTES; depends on the vocabulary alone."""
    return max(16, LOGITS_BYTES // (4 * vocab_size))


def split_model(model: Any) -> tuple[Any, Head] | None:
    """(decoder, head) of a causal LM where logits are simply head(decoder(ids)), else None.

    Some models scale or cap their logits after the head; so it is tried on a few tokens rather than believed.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return None
    was_training = model.training
    model.eval()
    with torch.no_grad():
        probe_BT = torch.arange(1, 9, device=_device_of(model)).unsqueeze(0) % model.config.get_text_config().vocab_size
        # Logits of a new model are near 0, where a cap does nothing yet: seen at a hundredfold it shows.
        hook = head.register_forward_pre_hook(lambda _, given: (100 * given[0],))
        try:
            whole = model(input_ids=probe_BT, use_cache=False).logits
            parts = head(decoder(input_ids=probe_BT, use_cache=False).last_hidden_state)
        finally:
            hook.remove()
    model.train(was_training)
    alike = whole.shape == parts.shape and torch.allclose(whole.float(), parts.float(), rtol=1e-3, atol=1e-4)
    return (decoder, head) if alike else None


def _device_of(model: Any) -> torch.device:
    for tensor in model.parameters():
        return torch.device(tensor.device)
    return torch.device("cpu")


def target_nll(hidden_NH: torch.Tensor, target_N: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood (nats, fp32 [N]) and whether the target was the likeliest (bool [N])."""
    logits_NV = head(hidden_NH).float()
    nll_N = F.cross_entropy(logits_NV, target_N, reduction="none")
    return nll_N, logits_NV.argmax(dim=-1) == target_N


def training_loss(
    parts: tuple[Any, Head], ids_BT: torch.Tensor, target_BT: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Sum of negative log likelihood over the targets that are not IGNORED (nats, fp32 scalar, differentiable).

    Where the logits of all targets would be large, they are made chunk by chunk and again in the backward pass.
    """
    decoder, head = parts
    hidden_NH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    target_N = target_BT.flatten()

    def summed(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, ignore_index=IGNORED, reduction="sum")

    step = chunk_length(vocab_size)
    if target_N.numel() <= step:
        return summed(hidden_NH, target_N)
    total = torch.zeros((), device=hidden_NH.device)
    for start in range(0, target_N.numel(), step):
        chunk = hidden_NH[start : start + step], target_N[start : start + step]
        total = total + checkpoint(summed, *chunk, use_reentrant=False)
    return total


@dataclass(frozen=True)
class SampleLosses:
    """Of each sample of a batch, on the CPU."""

    loss: torch.Tensor  # f64 [B], nats, summed over scored targets
    correct: torch.Tensor  # i32 [B]
    position_loss: torch.Tensor  # f64 [B, 16]
    position_tokens: torch.Tensor  # i32 [B, 16]


class Scorer:
    """A causal LM made ready to score batches of a reference set.

    The result for a batch depends on the batch and the weights only, never on which rank meets it, or after what.
    """

    def __init__(
        self,
        model: Any,
        sequence_length: int,
        *,
        parts: tuple[Any, Head] | None = None,
        device: torch.device | None = None,
        gather_head: Callable[[], AbstractContextManager[Head]] | None = None,
    ) -> None:
        """`gather_head`: where the head's weights are sharded, gives it whole, once a batch (a collective)."""
        self.model = model
        self.gather_head = gather_head
        self.device = device or _device_of(model)
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.parts = parts or split_model(model)
        bins_T = torch.arange(sequence_length) * POSITION_BINS // sequence_length
        self.bins_TK = F.one_hot(bins_T, POSITION_BINS).double().to(self.device)

    @torch.no_grad()
    def score(self, ids: torch.Tensor, first_target_B: torch.Tensor, length_B: torch.Tensor) -> SampleLosses:
        """Losses of a batch.

        Args:
            ids: int64 [B, T + 1], padded on the right (what follows a sample's end cannot reach its loss).
            first_target_B: int64 [B], index in `ids` of a sample's first scored target.
            length_B: int64 [B], ids of a sample.
        """
        was_training = self.model.training
        self.model.eval()
        ids, first_target_B, length_B = (t.to(self.device) for t in (ids, first_target_B, length_B))
        fed_BT, target_BT = ids[:, :-1], ids[:, 1:]
        index_T = torch.arange(1, ids.shape[1], device=self.device)
        scored_BT = (index_T >= first_target_B[:, None]) & (index_T < length_B[:, None])

        nll_BT = torch.zeros(fed_BT.shape, dtype=torch.float64, device=self.device)
        hit_BT = torch.zeros(fed_BT.shape, dtype=torch.float64, device=self.device)
        if self.parts is not None:
            decoder, head = self.parts
            hidden_NH = decoder(input_ids=fed_BT, use_cache=False).last_hidden_state[scored_BT]
            with self.gather_head() if self.gather_head else nullcontext(head) as whole_head:
                nll_N, hit_N = self._in_chunks(hidden_NH, target_BT[scored_BT], whole_head)
            nll_BT[scored_BT], hit_BT[scored_BT] = nll_N, hit_N
        else:  # logits are more than head(decoder(ids)): a sample at a time bounds what they take
            for row in range(len(fed_BT)):
                logits_TV = self.model(input_ids=fed_BT[row : row + 1], use_cache=False).logits[0]
                at = scored_BT[row]
                nll_N, hit_N = self._in_chunks(logits_TV[at], target_BT[row][at], lambda x: x)
                nll_BT[row, at], hit_BT[row, at] = nll_N, hit_N
        self.model.train(was_training)

        bins_TK = self.bins_TK[: fed_BT.shape[1]]
        return SampleLosses(
            loss=nll_BT.sum(1).cpu(),
            correct=hit_BT.sum(1).to(torch.int32).cpu(),
            position_loss=(nll_BT @ bins_TK).cpu(),
            position_tokens=(scored_BT.double() @ bins_TK).to(torch.int32).cpu(),
        )

    def _in_chunks(self, rows: torch.Tensor, targets: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        step = chunk_length(self.vocab_size)
        pieces = [
            target_nll(rows[at : at + step], targets[at : at + step], head) for at in range(0, len(targets), step)
        ]
        return torch.cat([p[0] for p in pieces]).double(), torch.cat([p[1] for p in pieces]).double()
