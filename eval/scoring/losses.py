"""The loss of every sample of a batch, without ever holding the batch's full logits.

Legend: B samples, T tokens fed (one fewer than a sample's ids), N scored targets, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from eval.scoring.fused_head import IGNORED, head_loss
from eval.tables import POSITION_BINS

if TYPE_CHECKING:
    from eval.reference.set import ReferenceSet

LOGITS_BYTES = int(os.environ.get("VERNIER_LOGITS_BYTES", 64 << 20))  # what a chunk of fp32 logits may take
ROWS = 1024  # targets at once against pieces of a plain head's output matrix
# A piece's logits: what a CPU's cache holds; large enough for a GPU to be busy. See `benchmarks.scoring --chunks`.
PIECE_BYTES = LOGITS_BYTES if torch.cuda.is_available() else min(LOGITS_BYTES, 4 << 20)

Head = Callable[[torch.Tensor], torch.Tensor]


def chunk_length(vocab_size: int) -> int:
    """Targets a chunk, so that their fp32 logits stay within LOGITS_BYTES; depends on the vocabulary alone."""
    return max(16, LOGITS_BYTES // (4 * vocab_size))


@contextmanager
def evaluating(model: Any, training: bool = False) -> Iterator[None]:
    """Within it a model is as for evaluation, or as for `training`: what drops and what does not. Then as it was."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def split_model(model: Any) -> tuple[Any, Head] | None:
    """(decoder, head) of a causal LM where logits are simply head(decoder(ids)), else None.

    Some models scale or cap their logits after the head; so it is tried on a few tokens rather than believed.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return None
    with evaluating(model), torch.no_grad():
        probe_BT = torch.arange(1, 9, device=_device_of(model)).unsqueeze(0) % model.config.get_text_config().vocab_size
        # Logits of a new model are near 0, where a cap does nothing yet: seen at a hundredfold it shows.
        hook = head.register_forward_pre_hook(lambda _, given: (100 * given[0],))
        try:
            whole = probe_BT.new_empty(1)
            whole = model(input_ids=probe_BT, use_cache=False).logits
        except BaseException:
            hook.remove()
            raise
        try:
            parts = head(decoder(input_ids=probe_BT, use_cache=False).last_hidden_state)
        except RuntimeError:  # a layer between the two changes the width (electra)
            parts = whole.new_empty(0)
        finally:
            hook.remove()
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


def linear_nll(
    hidden_NH: torch.Tensor, target_N: torch.Tensor, head: torch.nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `target_nll` for a plain head, whose output matrix is taken a piece of the vocabulary at a time.

    The log of the sum of exponentials is carried from piece to piece with its running maximum (Milakov & Gimelshein,
    "Online normalizer calculation for softmax", arXiv 1805.02867, algorithm 3). Pieces stay in the cache, which rows
    of a large vocabulary do not. A target that ties with the likeliest counts as it.
    """
    size = max(256, PIECE_BYTES // (4 * ROWS))
    top_N = hidden_NH.new_full((len(hidden_NH),), -math.inf, dtype=torch.float32)
    sum_N, own_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
    for start in range(0, head.out_features, size):
        bias = head.bias[start : start + size] if head.bias is not None else None
        logits_NV = F.linear(hidden_NH, head.weight[start : start + size], bias).float()
        place_N = target_N - start
        inside_N = (place_N >= 0) & (place_N < logits_NV.shape[1])
        found_N = logits_NV.gather(1, place_N.clamp(0, logits_NV.shape[1] - 1)[:, None])[:, 0]
        own_N = torch.where(inside_N, found_N, own_N)
        higher_N = torch.maximum(top_N, logits_NV.amax(-1))
        sum_N = sum_N * (top_N - higher_N).exp_() + logits_NV.sub_(higher_N[:, None]).exp_().sum(-1)
        top_N = higher_N
    return top_N + sum_N.log() - own_N, own_N >= top_N


def mixture_nll(
    states: Sequence[torch.Tensor], target_N: torch.Tensor, heads: Sequence[Head]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `target_nll`, of the mean of the models' probabilities: −log( Σ_k p_k(target) / K )."""
    log_p, sum_NV = [], torch.zeros(())
    for state_NH, head in zip(states, heads, strict=True):
        log_p_NV = F.log_softmax(head(state_NH).float(), dim=-1)
        log_p.append(log_p_NV.gather(-1, target_N[:, None])[:, 0])
        p_NV = log_p_NV.exp_()
        # Vocabularies may be padded to other sizes: what one of the models lacks is no target.
        sum_NV = p_NV if len(log_p) == 1 else sum_NV[:, : p_NV.shape[1]] + p_NV[:, : sum_NV.shape[1]]
    nll_N = math.log(len(states)) - torch.stack(log_p).logsumexp(0)
    return nll_N, sum_NV.argmax(dim=-1) == target_N


def positions(position_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a model is told of positions [B, T]: nothing where they run on, as some take none."""
    return {} if position_BT is None else {"position_ids": position_BT}


def training_loss(
    parts: tuple[Any, Head],
    ids_BT: torch.Tensor,
    target_BT: torch.Tensor,
    vocab_size: int,
    position_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of negative log likelihood over the targets that are not IGNORED (nats, fp32 scalar, differentiable)."""
    decoder, head = parts
    hidden_BTH = decoder(input_ids=ids_BT, **positions(position_BT), use_cache=False).last_hidden_state
    return loss_of_hidden(hidden_BTH, target_BT, head, vocab_size)


def loss_of_hidden(hidden_BTH: torch.Tensor, target_BT: torch.Tensor, head: Head, vocab_size: int) -> torch.Tensor:
    """As `training_loss`, of a decoder's last hidden states.

    Where the logits of all targets would be large, they are made chunk by chunk: of a plain head once, with the
    gradient (`fused_head`), of another again in the backward pass.
    """
    hidden_NH = hidden_BTH.flatten(0, 1)
    target_N = target_BT.flatten()

    def summed(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(hidden).float(), target, ignore_index=IGNORED, reduction="sum")

    step = chunk_length(vocab_size)
    if target_N.numel() <= step:
        return summed(hidden_NH, target_N)
    if type(head) is torch.nn.Linear:
        return head_loss(head, hidden_NH, target_N, step)
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


class TargetLosses(torch.nn.Module):
    """Losses of the scored targets under one model, or under the mean of several models' probabilities.

    A module, so that weights can be sharded over ranks with it as their root (eval/scoring/fsdp.py): all that
    needs weights happens in its forward.
    """

    def __init__(
        self,
        models: Sequence[Any],
        parts: tuple[Any, Head] | None = None,
        gather_head: Callable[[], AbstractContextManager[Head]] | None = None,
    ) -> None:
        """`parts`: of the only model, where they are known. Otherwise they are found at the first forward."""
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        self.gather_head = gather_head
        # In a list, so that modules inside are not registered twice.
        self._parts: list[tuple[Any, Head] | None] | None = [parts] if parts is not None else None
        self.vocab_size = max(int(model.config.get_text_config().vocab_size) for model in models)

    def forward(
        self, fed_BT: torch.Tensor, target_BT: torch.Tensor | None = None, scored_BT: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(negative log likelihood in nats, 1 where the target was the likeliest), f64 [B, T], 0 where not scored.

        Without targets the only model's logits [B, T, V], and whether they are those of its parts (a bool tensor).
        """
        if self._parts is None:
            self._parts = [split_model(model) for model in self.models]
        if target_BT is None or scored_BT is None:
            return self.models[0](input_ids=fed_BT, use_cache=False).logits, torch.tensor(self._parts[0] is not None)
        nll_BT = torch.zeros(fed_BT.shape, dtype=torch.float64, device=fed_BT.device)
        hit_BT = torch.zeros(fed_BT.shape, dtype=torch.float64, device=fed_BT.device)
        if all(parts is not None for parts in self._parts):
            nll_BT[scored_BT], hit_BT[scored_BT] = self._of_rows(fed_BT, target_BT, scored_BT)
            return nll_BT, hit_BT
        # Logits are more than head(decoder(ids)): a sample at a time bounds what they take.
        for row in range(len(fed_BT)):
            one, at = slice(row, row + 1), scored_BT[row]
            nll_BT[row, at], hit_BT[row, at] = self._of_rows(fed_BT[one], target_BT[one], scored_BT[one])
        return nll_BT, hit_BT

    def _of_rows(
        self, fed_BT: torch.Tensor, target_BT: torch.Tensor, scored_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the scored targets alone, f64 [N]."""
        assert self._parts is not None
        states, heads = [], []
        for model, parts in zip(self.models, self._parts, strict=True):
            if parts is not None:
                states.append(parts[0](input_ids=fed_BT, use_cache=False).last_hidden_state[scored_BT])
                heads.append(parts[1])
            else:
                states.append(model(input_ids=fed_BT, use_cache=False).logits[scored_BT])
                heads.append(_as_it_is)
        target_N = target_BT[scored_BT]
        nll, hit = [], []
        with self.gather_head() if self.gather_head else nullcontext(heads[0]) as first:
            heads[0] = first
            plain = first if len(heads) == 1 and type(first) is torch.nn.Linear else None
            step = ROWS if plain is not None else chunk_length(self.vocab_size)
            for start in range(0, len(target_N), step):
                chunk = slice(start, start + step)
                if plain is not None:
                    found = linear_nll(states[0][chunk], target_N[chunk], plain)
                elif len(heads) == 1:
                    found = target_nll(states[0][chunk], target_N[chunk], first)
                else:
                    found = mixture_nll([state[chunk] for state in states], target_N[chunk], heads)
                nll.append(found[0])
                hit.append(found[1])
        return torch.cat(nll).double(), torch.cat(hit).double()


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits


class Scorer:
    """A causal LM, or an ensemble of several, made ready to score batches of a reference set.

    The result for a batch depends on the batch and the weights only, never on which rank meets it, or after what.
    """

    def __init__(
        self,
        model: Any,
        sequence_length: int,
        *,
        others: Sequence[Any] = (),
        parts: tuple[Any, Head] | None = None,
        device: torch.device | None = None,
        gather_head: Callable[[], AbstractContextManager[Head]] | None = None,
    ) -> None:
        """
        Args:
            others: further models; what is scored is then the mean of all their probabilities.
            gather_head: where the head's weights are sharded, gives it whole, once a batch (a collective).
        """
        self.model = model
        self.losses = TargetLosses([model, *others], parts, gather_head)
        self.device = device or _device_of(model)
        bins_T = torch.arange(sequence_length) * POSITION_BINS // sequence_length
        self.bins_TK = F.one_hot(bins_T, POSITION_BINS).double().to(self.device)

    def score_batch(self, reference: ReferenceSet, batch: int) -> SampleLosses:
        """Losses of the samples of `batch`, ascending."""
        ids, first_B, length_B = (torch.from_numpy(a) for a in reference.batch_inputs(batch))
        wanted = reference.batch_scored(batch)
        return self.score(ids, first_B, length_B, None if wanted is None else torch.from_numpy(wanted))

    @torch.no_grad()
    def score(
        self,
        ids: torch.Tensor,
        first_target_B: torch.Tensor,
        length_B: torch.Tensor,
        wanted_BT: torch.Tensor | None = None,
    ) -> SampleLosses:
        """Losses of a batch.

        Args:
            ids: int64 [B, T + 1], padded on the right (what follows a sample's end cannot reach its loss).
            first_target_B: int64 [B], index in `ids` of a sample's first scored target.
            length_B: int64 [B], ids of a sample.
            wanted_BT: bool [B, T + 1], which ids are scored; None: those from the first target on.
        """
        ids, first_target_B, length_B = (t.to(self.device) for t in (ids, first_target_B, length_B))
        index_T = torch.arange(1, ids.shape[1], device=self.device)
        scored_BT = (index_T >= first_target_B[:, None]) & (index_T < length_B[:, None])
        if wanted_BT is not None:
            scored_BT &= wanted_BT.to(self.device)[:, 1:]
        with evaluating(self.model):
            nll_BT, hit_BT = self.losses(ids[:, :-1], ids[:, 1:], scored_BT)
        bins_TK = self.bins_TK[: scored_BT.shape[1]]
        return SampleLosses(
            loss=nll_BT.sum(1).cpu(),
            correct=hit_BT.sum(1).to(torch.int32).cpu(),
            position_loss=(nll_BT @ bins_TK).cpu(),
            position_tokens=(scored_BT.double() @ bins_TK).to(torch.int32).cpu(),
        )
