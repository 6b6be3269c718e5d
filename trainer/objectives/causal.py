"""Each token predicted from those before it: GPT and its kin, trained from scratch or on.

Legend: B windows, T tokens of a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.schema import Config
from eval.scoring.losses import IGNORED, evaluating, loss_of_hidden, positions, split_model, training_loss
from trainer.data.examples import AnyWindows
from trainer.model.auxiliary import added_loss, adds_loss, hidden_states_of
from trainer.order import Int64s


class Causal:
    """A window's tokens, each a target but those of prompts; of conversations those that the assistant says."""

    def __init__(self, config: Config) -> None:
        self.length = config.sequence_length
        self.scored_as: tuple[str, ...] = ("instruct",) if config.objective.name == "instruct" else ("causal", "prompt")

    def count(self, data: AnyWindows, windows: Int64s, position: int) -> int:
        return int(data.target_counts(windows).sum())

    def inputs(self, data: AnyWindows, windows: Int64s, position: int) -> dict[str, torch.Tensor]:
        """Ids and targets of windows [n], and positions where documents are packed: each int64 [n, T]."""
        fed = data.fed(windows)
        # Copies: the targets are written to, and in a stream they share their memory with the ids.
        ids_BT, target_BT = torch.from_numpy(fed.ids.copy()), torch.from_numpy(fed.targets.copy())
        if fed.scored is not None:
            target_BT[~torch.from_numpy(fed.scored)] = IGNORED
        out = {"ids_BT": ids_BT, "target_BT": target_BT}
        return out if fed.positions is None else {**out, "position_BT": torch.from_numpy(fed.positions)}

    def dry(self, rows: int) -> dict[str, torch.Tensor]:
        """As `inputs`, of nothing, [rows, T]."""
        ids_BT = torch.zeros((rows, self.length), dtype=torch.int64)
        return {"ids_BT": ids_BT, "target_BT": ids_BT}

    def module(self, lm: Any) -> TrainableLM:
        return TrainableLM(lm)


class TrainableLM(nn.Module):
    """A causal LM whose forward pass gives a micro-batch's summed loss, as DeepSpeed wants it: one module, one call.

    Raises:
        ConfigError: the model's own loss is one that is not trained here.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        # Held as `lm` only; listing decoder and head again would double the parameters' names.
        self.lm = lm
        self.split = split_model(lm) is not None
        self.adds = adds_loss(lm)  # something to its language loss
        self.added: torch.Tensor | None = None  # so much, in the last forward pass
        if self.adds:
            self.split = self.split and _adds_without_logits(lm)

    def parts(self) -> tuple[Any, Any] | None:
        """(decoder, head), where logits are head(decoder(ids))."""
        return (self.lm.get_decoder(), self.lm.get_output_embeddings()) if self.split else None

    def forward(
        self, ids_BT: torch.Tensor, target_BT: torch.Tensor, position_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Sum of the negative log likelihood over targets that are not IGNORED: nats, scalar.

        Positions that begin again keep attention inside each document (transformers makes the mask of them).
        Of a model that adds to its mean loss over a micro-batch, with that times the targets; which is in `added`.
        """
        vocab_size = int(self.lm.config.get_text_config().vocab_size)
        parts = self.parts()
        if parts is not None and not self.adds:
            return training_loss(parts, ids_BT, target_BT, vocab_size, position_BT)
        mean = None  # that is added
        if parts is not None:
            with hidden_states_of(parts[0]) as hidden:
                mean, _ = added_loss(self.lm, ids_BT, keep=1, position_BT=position_BT)
            loss = loss_of_hidden(hidden[0], target_BT, parts[1], vocab_size)
        else:
            if self.adds:
                mean, logits = added_loss(self.lm, ids_BT, position_BT=position_BT)
            else:
                logits = self.lm(input_ids=ids_BT, **positions(position_BT), use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), target_BT.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        if mean is None:
            return loss
        more = mean * (target_BT != IGNORED).sum()
        self.added = more.detach()
        return loss + more


@torch.no_grad()
def _adds_without_logits(lm: Any) -> bool:
    """Whether what a model adds to its loss is the same without most of its logits, its decoder showing its states."""
    ids_BT = torch.arange(1, 9, device=next(lm.parameters()).device)[None] % lm.config.get_text_config().vocab_size
    try:
        with evaluating(lm, training=True), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            whole, _ = added_loss(lm, ids_BT)
            torch.manual_seed(0)
            with hidden_states_of(lm.get_decoder()) as hidden:
                part, _ = added_loss(lm, ids_BT, keep=1)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return len(hidden) == 1 and torch.equal(whole, part)
