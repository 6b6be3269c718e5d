"""By how much a challenger must beat an incumbent: an advantage in loss that halves with the incumbent's age.

A new incumbent is guarded against a change that gains next to nothing; the older it is, the less a successor must gain.
Pure functions; prints nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from eval.compare.pair import Comparison, finite

UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([mhdw])")


@dataclass(frozen=True)
class Advantage:
    """What the rule asks of B now, and what is known of it. Gains are in percent of A's loss, positive: lower.

    `gain_percent` is the estimate, `sure_percent` the lower end of its 95 % interval. `enough_from_s`: the age of A
    beyond which `sure_percent` is enough, None where it never is, since B is not known to be better at all.
    """

    advantage_percent: float
    half_life_s: float
    age_s: float
    needed_percent: float
    gain_percent: float
    sure_percent: float
    enough_from_s: float | None

    @property
    def holds(self) -> bool:
        return self.sure_percent > self.needed_percent

    def to_json(self) -> dict[str, Any]:
        """The key `advantage` in what `vernier compare A B --advantage … --json` prints."""
        return {
            "holds": self.holds,
            "advantage_percent": self.advantage_percent,
            "half_life_s": self.half_life_s,
            "age_s": self.age_s,
            "needed_percent": self.needed_percent,
            "gain_percent": finite(self.gain_percent),
            "gain_lower95_percent": finite(self.sure_percent),
            "enough_from_age_s": self.enough_from_s,
        }


def parse_duration_s(text: str, option: str) -> float:
    """Seconds in a duration such as `90m`, `36h`, `7d`, `2w`; `option` goes into the error.

    Raises:
        ConfigError: it is none.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{option}: {text!r} is not a duration; write a number and m, h, d or w, such as 36h or 7d")
    return float(match[1]) * UNITS_S[match[2]]


def parse_advantage(text: str) -> float:
    """Percent in an advantage such as `0.4%`, `0.4 %` or `0.4`.

    Raises:
        ConfigError: it is none, or below zero.
    """
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--advantage: {text!r} is not a percentage of 0 or more, such as 0.4%")
    return value


def needed_percent(advantage_percent: float, half_life_s: float, age_s: float) -> float:
    """What a challenger must gain over an incumbent of this age: advantage · 2^(−age/half-life)."""
    return advantage_percent * 2.0 ** (-age_s / half_life_s)


def enough_from_s(advantage_percent: float, half_life_s: float, sure_percent: float) -> float | None:
    """The age beyond which a gain is enough: half-life · log2(advantage/gain), 0 or more; None for no gain."""
    if not sure_percent > 0:
        return None
    return half_life_s * max(0.0, math.log2(advantage_percent / sure_percent)) if advantage_percent > 0 else 0.0


def judge_advantage(
    change95_percent: tuple[float, float], change_percent: float, advantage: str, half_life: str, age: str
) -> Advantage:
    """The rule for a change B − A in percent with its 95 % interval.

    Raises:
        ConfigError: a percentage or duration that is none, a half-life of zero.
    """
    percent = parse_advantage(advantage)
    half_life_s, age_s = parse_duration_s(half_life, "--half-life"), parse_duration_s(age, "--age")
    if half_life_s == 0:
        raise ConfigError(f"--half-life: {half_life!r} is no time at all; give one above 0, such as 7d")
    sure = 0.0 - change95_percent[1]
    return Advantage(
        advantage_percent=percent,
        half_life_s=half_life_s,
        age_s=age_s,
        needed_percent=needed_percent(percent, half_life_s, age_s),
        gain_percent=0.0 - change_percent,
        sure_percent=sure,
        enough_from_s=enough_from_s(percent, half_life_s, sure),
    )


def advantage_of(comparison: Comparison, advantage: str, half_life: str, age: str) -> Advantage:
    """As `judge_advantage`, of a comparison of a challenger (B) with an incumbent (A)."""
    found = comparison.difference
    return judge_advantage(comparison.ci95_percent, found.percent, advantage, half_life, age)


def duration_words(seconds: float) -> str:
    """A duration in a unit of its size, to three digits: `2.5 days`."""
    least = (("weeks", 14 * 86_400), ("days", 86_400), ("hours", 3600))
    unit = next((name for name, size in least if seconds >= size), "minutes")
    value = seconds / UNITS_S[unit[0]]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
