"""Gates: whether a comparison says enough to let a checkpoint through, and to which question."""

from __future__ import annotations

import math
from typing import Literal, Protocol

from configs.errors import ConfigError
from eval.compare.pair import Comparison, Verdict
from eval.statistics.paired import t_quantile

Gate = Literal["better", "not-worse"]
Question = Literal["weights", "run", "recipe"]


class Gated(Protocol):
    """What a gate can be held against."""

    @property
    def ci95_percent(self) -> tuple[float, float]: ...

    @property
    def verdict(self) -> Verdict: ...


def upper_bound(comparison: Comparison, question: Question) -> float:
    """Upper bound of the 95 % interval of B − A, in percent, as an answer to a question.

    `weights`: that of the verdict. `run`, whether checkpoints nearby would say the same: the interval with the
    training noise of both put to it, hypot(half, t·√2·noise): by twins, t with as many degrees of freedom as there
    are; else by the wobble, 1.96.

    Raises:
        ConfigError: that question cannot be answered from these two.
    """
    found = comparison
    if question == "recipe":
        raise ConfigError(
            "--of recipe: one run of each cannot tell whether a recipe is better; name several seeds of each: "
            "vernier compare A… --against B… --gate better"
        )
    upper = found.ci95_percent[1]
    if question == "weights" or found.one_step or found.same_weights:
        return upper
    if found.twins is not None and not found.noise_is_known:
        raise ConfigError(
            f"--of run: what twins of the run differ by, after {found.twins.since} steps, is a lower bound, as vernier "
            "compare RUN says; make longer ones from the start (vernier twin RUN --steps N), or take --of weights"
        )
    if found.noise_percent is None:
        raise ConfigError(
            "--of run: needs the noise of training, which is not known: vernier twin RUN measures it, 12 scored "
            "checkpoints give a wobble; --of weights asks about these weights alone"
        )
    centre, df = found.difference.percent, math.inf if found.twins is None else found.twins.df
    return centre + math.hypot(upper - centre, t_quantile(0.95, df) * math.sqrt(2) * found.noise_percent)


def gate_holds(
    comparison: Gated, gate: Gate, margin_percent: float = 0.0, *, upper_percent: float | None = None
) -> bool:
    """Whether the upper bound of B − A is below −margin (better) or below margin (not-worse): that of the 95 % interval
    which the verdict goes by, so that the two never contradict each other; or `upper_percent`.

    Identical tables, and the same weights, are not worse at any margin, zero included, and never better.

    Raises:
        ConfigError: there is no such gate.
    """
    upper = comparison.ci95_percent[1] if upper_percent is None else upper_percent
    alike = comparison.verdict in ("identical", "same weights")
    if gate == "better":
        return upper < -margin_percent and not alike
    if gate == "not-worse":
        return upper < margin_percent or alike
    raise ConfigError(f"--gate: {gate!r} is not a verdict; use better or not-worse")
