"""A label of each text: one of several names, any of them, or a number.

Legend: B texts, T tokens of the longest, K labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from configs.run.facts import read_dataset_facts
from configs.schema import Config
from eval.reference.tokenizer import open_tokenizer
from eval.scoring.classify import example_losses, padding_id
from trainer.data.examples import AnyWindows, Examples
from trainer.data.integrity import FACTS
from trainer.order import Int64s


class Classify:
    """Texts, each fed whole, and their labels. Each text is one target."""

    scored_as: tuple[str, ...] = ("classify",)

    def __init__(self, config: Config) -> None:
        self.length, self.problem = config.sequence_length, config.objective.problem
        self.padding = padding_id(open_tokenizer(config.data_dir / "tokenizer").special)
        labels = read_dataset_facts(config.data_dir / FACTS)["labels"]
        self.names = labels["names"]
        self.weight_K: torch.Tensor | None = None
        if config.objective.class_weights == "balanced" and self.problem == "single":
            counts_K = np.maximum(1, np.asarray(labels["counts"], np.float64))
            self.weight_K = torch.from_numpy(counts_K.sum() / (len(counts_K) * counts_K)).float()

    def count(self, data: AnyWindows, windows: Int64s, position: int) -> int:
        return len(windows)

    def inputs(self, data: AnyWindows, windows: Int64s, position: int) -> dict[str, torch.Tensor]:
        """Of windows [n]: ids and which of them are there, int64 [n, T]; labels [n] or [n, K], and weights [n]."""
        assert isinstance(data, Examples)
        assert data.labels is not None
        ids_BT, real_BT = data.whole(windows)
        label = torch.from_numpy(np.asarray(data.labels[data.document_E[windows]]))
        weight_B = torch.ones(len(windows)) if self.weight_K is None else self.weight_K[label]
        return {
            "ids_BT": torch.from_numpy(np.where(real_BT, ids_BT, self.padding)),
            "mask_BT": torch.from_numpy(real_BT.astype(np.int64)),
            "label": label,
            "weight_B": weight_B,
        }

    def dry(self, rows: int) -> dict[str, torch.Tensor]:
        """As `inputs`, of nothing, [rows, T]."""
        ids_BT = torch.full((rows, self.length), 1 if self.padding == 0 else 0, dtype=torch.int64)
        label = torch.zeros(rows, dtype=torch.int64)
        if self.problem == "several":
            label = torch.zeros((rows, len(self.names)))
        elif self.problem == "regression":
            label = torch.zeros(rows)
        return {"ids_BT": ids_BT, "mask_BT": torch.ones_like(ids_BT), "label": label, "weight_B": torch.ones(rows)}

    def module(self, lm: Any) -> TrainableClassifier:
        return TrainableClassifier(lm, self.problem)


class TrainableClassifier(nn.Module):
    """A classifier whose forward pass gives a micro-batch's summed loss."""

    adds = False
    added: torch.Tensor | None = None

    def __init__(self, lm: Any, problem: str) -> None:
        super().__init__()
        self.lm, self.problem = lm, problem

    def forward(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, label: torch.Tensor, weight_B: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the texts' losses (`eval.scoring.classify.example_losses`), each by its weight [B]: fp32 scalar."""
        logits_BK = self.lm(input_ids=ids_BT, attention_mask=mask_BT).logits
        return (example_losses(logits_BK, label, self.problem) * weight_B).sum()
