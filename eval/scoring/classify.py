"""Scoring of classifiers: a loss of each text of a reference set, and whether its label was the likeliest.

Legend: B texts of a batch, T tokens of the longest, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from configs.errors import DataError
from eval.reference.set import ReferenceSet
from eval.scoring.losses import SampleLosses, evaluating
from eval.scoring.models import load_checked
from eval.tables import POSITION_BINS


def example_losses(logits_BK: torch.Tensor, label: torch.Tensor, problem: str) -> torch.Tensor:
    """The loss of each text, fp32 [B]: −log p of its label in nats; of several labels the mean over all of them of −log
    p that each is there or not; of a number the squared error.

    Args:
        label: int64 [B], float [B, K] or float [B], by the problem: "single", "several" or "regression".
    """
    logits_BK = logits_BK.float()
    if problem == "single":
        return F.cross_entropy(logits_BK, label, reduction="none")
    if problem == "several":
        return F.binary_cross_entropy_with_logits(logits_BK, label.float(), reduction="none").mean(-1)
    return (logits_BK[:, 0] - label.float()) ** 2


def is_right(logits_BK: torch.Tensor, label: torch.Tensor, problem: str) -> torch.Tensor:
    """Whether a text's label is the likeliest, or all of its labels are those above one half; bool [B]. Of a number
    False."""
    if problem == "single":
        return logits_BK.argmax(-1) == label
    if problem == "several":
        return ((logits_BK > 0) == (label > 0.5)).all(-1)
    return torch.zeros(len(logits_BK), dtype=torch.bool, device=logits_BK.device)


def padding_id(special: Mapping[str, int]) -> int:
    """What texts are padded with: the tokenizer's padding token, else what ends a text."""
    roles = ("pad_token", "eos_token", "bos_token", "sep_token")
    return next((special[role] for role in roles if role in special), 0)


class ClassifyScorer:
    """A classifier made ready to score batches of a reference set.

    The result for a batch depends on the batch and the weights only, never on which rank meets it, or after what.
    """

    def __init__(self, model: Any, reference: ReferenceSet, device: torch.device) -> None:
        """
        Raises:
            DataError: the model has other labels than the set.
        """
        assert reference.labels is not None
        self.model, self.device, self.labels = model, device, reference.labels
        padding = getattr(model.config, "pad_token_id", None)
        self.padding = 0 if padding is None else int(padding)
        outputs = int(model.config.num_labels)
        if outputs != max(1, len(self.labels.names)):
            raise DataError(f"model: has {outputs} labels, the reference set {len(self.labels.names)}")

    @torch.no_grad()
    def score_batch(self, reference: ReferenceSet, batch: int) -> SampleLosses:
        """Losses of the samples of `batch`, ascending."""
        ids_BT, _, length_B = reference.batch_inputs(batch)
        real_BT = np.arange(ids_BT.shape[1]) < length_B[:, None]
        ids = torch.from_numpy(np.where(real_BT, ids_BT, self.padding)).to(self.device)
        mask = torch.from_numpy(real_BT.astype(np.int64)).to(self.device)
        with evaluating(self.model):
            logits_BK = self.model(input_ids=ids, attention_mask=mask).logits.float()
        label = torch.from_numpy(self.labels.numbers[reference.batch_samples(batch)]).to(self.device)
        loss_B = example_losses(logits_BK, label, self.labels.problem).double().cpu()
        right_B = is_right(logits_BK, label, self.labels.problem).to(torch.int32).cpu()
        position_loss = torch.zeros((len(loss_B), POSITION_BINS), dtype=torch.float64)
        position_tokens = torch.zeros((len(loss_B), POSITION_BINS), dtype=torch.int32)
        position_loss[:, 0], position_tokens[:, 0] = loss_B, 1
        return SampleLosses(loss_B, right_B, position_loss, position_tokens)


def make_classify_scorer(
    directory: Path, dtype: str, reference: ReferenceSet, device: torch.device, *, trust_remote_code: bool = False
) -> ClassifyScorer:
    """A classifier of a checked directory, made ready to score `reference`.

    Raises:
        DataError: it is none, has other labels, or another order of them.
    """
    if reference.labels is None:
        raise DataError("--objective: classify needs a reference set with labels, and this one has none")
    model = load_checked("classify", directory, dtype, trust_remote_code)
    named = getattr(model.config, "id2label", None) or {}
    names = [str(named[key]) for key in sorted(named, key=int)]
    if reference.labels.problem != "regression" and names != list(reference.labels.names):
        raise DataError(
            f"{directory}: its labels are {', '.join(names[:6])}, the reference set's "
            f"{', '.join(reference.labels.names[:6])}; they must be the same, in the same order"
        )
    return ClassifyScorer(model.to(device), reference, device)
