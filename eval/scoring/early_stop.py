"""Scoring only as much of a reference set as a verdict needs: looks at block ends, an interval valid at all of them.

The documents of a set are in random order, so its blocks are a growing random sample. What is reported is the interval
at the stop: the estimate there is inflated by having been chosen to stop at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.reference.set import ReferenceSet
from eval.statistics import allowed_looks, by_cluster, confidence_sequence
from eval.statistics.sequential import FIRST_LOOK_DOCUMENTS, FIRST_LOOK_SAMPLES
from eval.tables import LossTable

ALPHA = 0.05
NARROWEST_AT = 8  # times the documents of the first look: where the interval is narrowest for its length


@dataclass(frozen=True)
class LookResult:
    """What the documents so far say of B − A, in percent of A; `interval` holds at all looks together at 95 %."""

    documents: int
    samples: int
    percent: float
    interval: tuple[float, float]
    verdict: str


@dataclass
class UntilVerdict:
    """Looks at the growing table of a model beside the table `against`, until zero or the margin is excluded."""

    reference: ReferenceSet
    against: LossTable
    margin_percent: float = 0.0
    looks: list[LookResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.against.meta.get("reference") != self.reference.tokens_fingerprint:
            raise DataError(
                f"--against: {self.against.meta.get('label') or 'it'} was scored on another reference set than "
                f"{self.reference.directory}; score it on this one first"
            )
        samples_D = np.bincount(self.reference.document)
        ends = np.flatnonzero(np.diff(self.reference.block, append=-1)) + 1
        documents_K = self.reference.document[ends - 1] + 1
        self._clusters_N = self.reference.document if self.reference.family is None else self.reference.family
        first_C = np.sort(np.unique(self._clusters_N, return_index=True)[1])  # where each is met first
        clusters_K = np.searchsorted(first_C, ends)
        self._allowed = allowed_looks(documents_K, samples_D)
        self._allowed = self._allowed[np.isin(self._allowed, documents_K[clusters_K >= FIRST_LOOK_DOCUMENTS])]
        self._samples = {int(d): int(s) for d, s in zip(documents_K, ends, strict=True)}
        if not len(self._allowed):
            raise DataError(
                f"--until-verdict: the reference set has {len(samples_D)} documents and {len(self.reference.sample)} "
                f"samples; a look needs at least {FIRST_LOOK_DOCUMENTS} documents and {FIRST_LOOK_SAMPLES} samples"
            )
        self._narrowest = min(len(samples_D), NARROWEST_AT * int(self._allowed[0]))

    def __call__(self, samples: int, loss_N: NDArray[np.float64]) -> bool:
        """Whether the losses of the first `samples` samples are enough."""
        documents = int(self.reference.document[samples - 1]) + 1
        if documents not in self._allowed or len(self.against) < samples:
            return False
        self.looks.append(self._look(documents, samples, loss_N))
        return self.looks[-1].verdict != "not settled"

    def all_looks(self, loss_N: NDArray[np.float64]) -> None:
        """Takes all the looks there are at these losses, the last one included; a verdict does not end them."""
        self.looks.clear()
        for stop in sorted(self._samples.values()):
            if stop <= len(loss_N):
                self(stop, loss_N[:stop])

    def _look(self, documents: int, samples: int, loss_N: NDArray[np.float64]) -> LookResult:
        cluster_N, a_N = self._clusters_N[:samples], self.against.loss[:samples]
        difference_C, a_C = by_cluster(loss_N[:samples] - a_N, cluster_N), by_cluster(a_N, cluster_N)
        # Families, where they are known, are the units; they too come in random order.
        found = confidence_sequence(difference_C, a_C, [len(a_C)], self._narrowest, ALPHA)
        value = 100 * float(found.value_K[-1])
        interval = (100 * float(found.low_K[-1]), 100 * float(found.high_K[-1]))
        return LookResult(documents, samples, value, interval, self._verdict(interval))

    def _verdict(self, interval: tuple[float, float]) -> str:
        low, high = interval
        if high < 0:
            return "better"
        if low > 0:
            return "worse"
        if max(high, -low) < self.margin_percent:
            return "no difference as large as the margin"
        return "not settled"

    def to_json(self) -> dict[str, Any]:
        """For the table's metadata and `vernier eval --json`."""
        last = self.looks[-1] if self.looks else None
        return {
            "against": self.against.meta.get("model"),
            "against_label": self.against.meta.get("label"),
            "margin_percent": self.margin_percent,
            "looks": len(self.looks),
            "documents": last and last.documents,
            "of_documents": self.reference.documents,
            "samples": last and last.samples,
            "of_samples": len(self.reference.sample),
            "percent": last and last.percent,
            "interval95_percent": last and list(last.interval),
            "verdict": last.verdict if last else "not settled",
        }
