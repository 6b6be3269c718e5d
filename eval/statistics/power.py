"""What a reference set can show, and what it costs to look again along a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import ndtri, stdtrit


def _quantiles(alpha: float, power: float, df: float | None = None) -> float:
    below = ndtri if df is None else partial(stdtrit, df)
    return float(below(1 - alpha / 2) + below(power))


def detectable(se: float, alpha: float = 0.05, power: float = 0.8, df: float | None = None) -> float:
    """Smallest true difference seen with probability `power`: (z_{1−α/2} + z_power)·SE, in the unit of `se`.

    Miller, arXiv 2411.00640, on power analysis. With `df` Student's t stands for z, as an error that is itself
    estimated asks for.
    """
    return _quantiles(alpha, power, df) * se


# Where signs of few documents are flipped a change has to be so many times larger than by Student's t to be seen with
# probability .8: by simulation of the verdict's own path, normal documents, α = .05 (tests/statistics/test_power.py).
FLIPPED = ((6, 1.32), (7, 1.17), (8, 1.16), (10, 1.09), (14, 1.06), (20, 1.03), (30, 1.01), (40, 1.0))


def flips_factor(documents: float) -> float:
    """How many times `detectable` by Student's t the smallest change is where p is by flipping the signs of so many
    documents; between the counts that were simulated on a straight line."""
    counts, factors = zip(*FLIPPED, strict=True)
    return float(np.interp(documents, counts, factors))


def samples_needed(sd: float, delta: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Independent samples to see a difference `delta` when paired differences have spread `sd` (same unit).

    n = ((z_{1−α/2} + z_power)·sd/δ)², rounded up; with clusters, `sd` is SE·√n of a pilot.

    Raises:
        ValueError: `delta` is 0: no number of samples shows that.
    """
    if delta == 0:
        raise ValueError("delta: no number of samples shows a difference of 0")
    return math.ceil((_quantiles(alpha, power) * sd / delta) ** 2)


@dataclass(frozen=True)
class Power:
    """What a set can show of a pair like this one, and what a wanted change would need. Changes in percent.

    `documents`, `samples`, `tokens`: of this set; what is needed is in its proportions, each of two sets where
    unpaired. It is never fewer than `least_documents`, below which another test is in use. `detectable_percent` is
    infinite where no change, however large, can be significant.
    """

    wanted_percent: float
    detectable_percent: float
    documents: int
    samples: int
    tokens: int
    documents_needed: int
    samples_needed: int
    tokens_needed: int
    documents_needed_unpaired: int
    least_documents: int = 2

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "wanted_percent": self.wanted_percent,
            "documents_needed": self.documents_needed,
            "samples_needed": self.samples_needed,
            "documents": self.documents,
            "samples": self.samples,
            "detectable_percent": self.detectable_percent if math.isfinite(self.detectable_percent) else None,
            "documents_needed_unpaired": self.documents_needed_unpaired,
        }


def power_for(
    wanted_percent: float,
    se_percent: float,
    se_unpaired_percent: float,
    *,
    documents: int,
    samples: int,
    tokens: int,
    alpha: float = 0.05,
    least_documents: int = 2,
) -> Power:
    """What a change of `wanted_percent` needs at 80 % power, by the spread that this pair showed.

    A clustered error shrinks as 1/√documents, so the set's own error times √documents is the spread that
    `samples_needed` asks for.

    Args:
        wanted_percent: above zero.
        se_percent, se_unpaired_percent: of the difference on this set, paired and as if scored on different documents.
        documents, samples, tokens: of this set.
        least_documents: never fewer are said to be needed.
    """
    needed, unpaired = (
        max(2, least_documents, samples_needed(se * math.sqrt(documents), wanted_percent, alpha))
        for se in (se_percent, se_unpaired_percent)
    )
    return Power(
        wanted_percent=wanted_percent,
        detectable_percent=detectable(se_percent, alpha),
        documents=documents,
        samples=samples,
        tokens=tokens,
        documents_needed=needed,
        samples_needed=math.ceil(needed * samples / documents),
        tokens_needed=math.ceil(needed * tokens / documents),
        documents_needed_unpaired=unpaired,
        least_documents=least_documents,
    )
