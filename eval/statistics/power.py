"""What a reference set can show, and what it costs to look again along a run."""

from __future__ import annotations

import math

from scipy.special import ndtri


def _quantiles(alpha: float, power: float) -> float:
    return float(ndtri(1 - alpha / 2) + ndtri(power))


def detectable(se: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference seen with probability `power`: (z_{1−α/2} + z_power)·SE, in the unit of `se`.

    Miller, arXiv 2411.00640, on power analysis.
    """
    return _quantiles(alpha, power) * se


def samples_needed(sd: float, delta: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Independent samples to see a difference `delta` when paired differences have spread `sd` (same unit).

    n = ((z_{1−α/2} + z_power)·sd/δ)², rounded up; with clusters, `sd` is SE·√n of a pilot.
    """
    if delta == 0:
        raise ValueError("delta: no number of samples shows a difference of 0")
    return math.ceil((_quantiles(alpha, power) * sd / delta) ** 2)


def spent_alpha(alpha: float, look: int | None) -> float:
    """Error rate given to the k-th look along a run: α·6/(π²k²), so that all looks together spend α.

    Σ 1/k² = π²/6 (Bonferroni over an endless series; no number of looks has to be planned). `look` None: one
    comparison that stands by itself, which gets all of α.
    """
    return alpha if look is None else alpha * 6 / (math.pi**2 * look**2)


def adjusted_p(p: float, look: int | None) -> float:
    """p to hold against α itself at the k-th look: min(1, p·π²k²/6); `look` None leaves p as it is."""
    return p if look is None else min(1.0, p * math.pi**2 * look**2 / 6)
