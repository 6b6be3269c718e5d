"""Paired training curves: the training losses of two runs on the same windows, step by step. Prints nothing.

Runs with the same data, seed, sequence length and global batch meet the same windows at the same positions, so what
makes a batch hard drops out of the difference. It is a difference of *training* losses, never of scores.

Legend: `_T` one entry a step, `_C` one a block of steps (for pictures), `_K` one a look at the running mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.load import load_config
from configs.run.directory import RunDir
from eval.curves.pairing import (
    Curve,
    pairing_cautions,
    pairing_of_run,
    pairing_problems,
    read_curve,
    settings_changed,
)
from eval.curves.twins import CurveNoise, curve_noise
from eval.statistics import mixture_rho, mixture_width
from eval.statistics.long_run import LEAST, LongRunMean, long_run_mean, running_half, step_variance
from eval.statistics.paired import t_quantile

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Verdict = Literal["lower", "higher", "no difference seen", "as twins", "cannot be told", "identical"]

ALPHA = 0.05
LOOKS = 60  # at the running mean, and points of a picture
QUARTERS = 4


@dataclass(frozen=True)
class Change:
    """B − A over a stretch of steps: nats per target, and percent of A's mean loss there, with half 95 % intervals.

    `wanders`: the difference moves as slowly as the stretch is long, so that no test can tell it from chance: `p` is
    NaN, and the interval a lower bound. Of parts of a stretch `p` and the intervals are corrected for their number.
    """

    first_step: int
    last_step: int
    loss_a: float
    loss_b: float
    nats: float
    half95_nats: float
    percent: float
    half95_percent: float
    t: float
    p: float
    wanders: bool


@dataclass(frozen=True)
class Band:
    """At each look: the mean difference so far, and the half widths that hold at all of them together.

    `half_K` is of the paired difference, `half_unpaired_K` what it would be had the runs met other windows.
    """

    step_K: Integers
    mean_K: Floats
    half_K: Floats
    half_unpaired_K: Floats


@dataclass(frozen=True)
class TrainingComparison:
    """Training losses of B against those of A. `changed`: settings that differ, both values in words.

    The question is about these two *runs*, on other windows: documents, seeds and settings are not in the error.
    `twins`: how far such a run moves by chance in the last bit of its weights; with it, a verdict is for what is more.
    `gain`: variance of what is new in a step's difference without pairing ÷ with it; None where the latter is zero.
    `*_from_step`: from there to the end the band leaves out zero. `*_steps`: about how many steps that takes for a
    constant difference of this size; None where none is seen.
    """

    a: str
    b: str
    whole: Change
    quarters: tuple[Change, ...]
    gain: float | None
    paired_from_step: int | None
    unpaired_from_step: int | None
    paired_steps: int | None
    unpaired_steps: int | None
    band: Band
    last_step_C: Integers
    loss_a_C: Floats
    loss_b_C: Floats
    changed: tuple[str, ...]
    cautions: tuple[str, ...]
    twins: CurveNoise | None = None

    @property
    def p(self) -> float:
        """Of these two runs on other windows; where there are twins, also of chance in training: the larger. Where the
        difference wanders it is NaN, or that of the twins. To be more than twins that still move apart says nothing."""
        if self.twins is None:
            return self.whole.p
        by_twins = self.twins.p(self.whole.nats)
        if by_twins < ALPHA and not self.twins.settled:
            return self.whole.p
        return by_twins if self.whole.wanders else max(by_twins, self.whole.p)

    @property
    def verdict(self) -> Verdict:
        if not np.any(self.loss_a_C - self.loss_b_C) and self.whole.nats == 0:
            return "identical"
        if self.p < ALPHA:
            return "lower" if self.whole.nats < 0 else "higher"
        clear = self.whole.wanders or self.whole.p < ALPHA
        if self.twins is not None and clear and self.twins.p(self.whole.nats) >= ALPHA:
            return "as twins"
        return "cannot be told" if self.whole.wanders else "no difference seen"

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B --training --json` prints; null where a number is infinite."""
        return {
            "of": "training loss",
            "question": "run",
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "difference": {**_change_json(self.whole), "p_verdict": _finite(self.p), "alpha": ALPHA},
            "quarters": [_change_json(quarter) for quarter in self.quarters],
            "pairing_gain_variance": _finite(self.gain),
            "paired": {"from_step": self.paired_from_step, "steps_needed": self.paired_steps},
            "unpaired": {"from_step": self.unpaired_from_step, "steps_needed": self.unpaired_steps},
            "blocks": {
                "last_step": self.last_step_C.tolist(),
                "loss_a": self.loss_a_C.tolist(),
                "loss_b": self.loss_b_C.tolist(),
                "difference": (self.loss_b_C - self.loss_a_C).tolist(),
            },
            "band": {
                "last_step": self.band.step_K.tolist(),
                "mean": self.band.mean_K.tolist(),
                "half95": self.band.half_K.tolist(),
                "half95_unpaired": self.band.half_unpaired_K.tolist(),
            },
            "twins": self.twins and {**self.twins.to_json(), "p": self.twins.p(self.whole.nats)},
            "settings_changed": list(self.changed),
            "cautions": list(self.cautions),
        }


def _change_json(change: Change) -> dict[str, Any]:
    return {key: _finite(value) if isinstance(value, float) else value for key, value in change.__dict__.items()}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def compare_training(
    run_a: Path,
    run_b: Path,
    *,
    first: int | None = None,
    last: int | None = None,
    names: tuple[str, str] | None = None,
) -> TrainingComparison:
    """The paired comparison of two runs' training losses over the steps that both have made.

    Args:
        first, last: the steps (of A) to look at; default all.
        names: what to call the two; default their directories' names.

    Raises:
        DataError: their steps cannot be paired, or are too few.
        ConfigError: no such stretch.
    """
    problems = pairing_problems(pairing_of_run(run_a), pairing_of_run(run_b))
    if problems:
        raise DataError(
            f"compare --training: the steps of {run_a} and {run_b} did not meet the same windows: "
            f"{'; '.join(problems)}; compare their snapshots instead, without --training"
        )
    labels = names or _labels(run_a, run_b)
    curve_a, curve_b = _joined(read_curve(run_a), read_curve(run_b), labels, first, last)
    for label, curve in zip(labels, (curve_a, curve_b), strict=True):
        bad_T = ~np.isfinite(curve.loss_T)
        if bad_T.any():
            step = curve.step_T[int(bad_T.argmax())]
            raise DataError(
                f"compare --training: the loss of {label} is not finite at step {step}; "
                f"end before it: --to-step {step - 1}"
            )
    config_a, config_b = load_config(RunDir(run_a).config), load_config(RunDir(run_b).config)
    cautions = pairing_cautions(labels, (run_a, run_b), (config_a, config_b), (curve_a, curve_b))
    twins, short = curve_noise((run_a, run_b), int(curve_a.step_T[0]), int(curve_a.step_T[-1]))
    about = "this is about these two runs on other windows, not about their settings: another seed"
    if twins is not None and not twins.settled:
        short.append("twins still move apart over these steps, so to be more than they differ by says nothing")
    if twins is None:
        about += f", or the last bit of one weight, can move a curve as far (vernier twin {run_a} measures that)"
    cautions += [*short, f"{about} may say otherwise" if twins is not None else about]
    made = _compared(labels, curve_a, curve_b, tuple(settings_changed(config_a, config_b)), tuple(cautions))
    return replace(made, twins=twins)


def _labels(run_a: Path, run_b: Path) -> tuple[str, str]:
    a, b = run_a.absolute().name, run_b.absolute().name
    return (a, b) if a != b else (str(run_a), str(run_b))


def _joined(a: Curve, b: Curve, labels: tuple[str, str], first: int | None, last: int | None) -> tuple[Curve, Curve]:
    """Both curves at the positions of their common stretch."""
    low, high = max(first or 1, 1), last if last is not None else int(a.step_T[-1])
    if last is not None and low > last:
        raise ConfigError(f"--from-step, --to-step: {low} to {high} is not a stretch of steps, such as 1 to 200")
    a = a.part((a.step_T >= low) & (a.step_T <= high))
    if not len(a.step_T):
        raise DataError(f"compare --training: {labels[0]} has not made step {low} yet")
    start, end = max(a.position_T[0], b.position_T[0]), min(a.position_T[-1], b.position_T[-1])
    a, b = (curve.part((curve.position_T >= start) & (curve.position_T <= end)) for curve in (a, b))
    for has, lacks, name in ((a, b, labels[1]), (b, a, labels[0])):
        missing = np.setdiff1d(has.position_T, lacks.position_T)
        if len(missing):
            shown = ", ".join(map(str, missing[:8])) + (f", … ({len(missing)})" if len(missing) > 8 else "")
            raise DataError(
                f"compare --training: {name} made no update with the batches at positions {shown}, which the other "
                "trained on; choose a stretch without them with --from-step and --to-step"
            )
    if not len(a.step_T):
        raise DataError(f"compare --training: {labels[0]} and {labels[1]} have no step in common there")
    other_T = a.targets_T != b.targets_T
    if other_T.any():
        at = int(other_T.argmax())
        raise DataError(
            f"compare --training: the batch at position {a.position_T[at]} has {a.targets_T[at]:,.0f} targets in "
            f"{labels[0]} and {b.targets_T[at]:,.0f} in {labels[1]}; these are not the same windows"
        )
    return a, b


def _compared(
    labels: tuple[str, str], a: Curve, b: Curve, changed: tuple[str, ...], cautions: tuple[str, ...]
) -> TrainingComparison:
    difference_T, count = b.loss_T - a.loss_T, len(a.loss_T)
    if count < LEAST:
        raise DataError(
            f"compare --training: {count} steps in common are too few: the error of their mean needs {LEAST}"
        )
    found = _mean(a, b, slice(None))
    # What windows add to the variance of a step where the two meet unlike ones; what is slow is the same in both.
    own, apart = step_variance(difference_T), step_variance(a.loss_T) + step_variance(b.loss_T)
    omega_unpaired = math.sqrt(_spread(found, a) ** 2 + max(0.0, apart - own))
    borders = np.linspace(0, count, min(LOOKS, count // 4) + 1).astype(np.int64)
    looks_K = np.unique(np.maximum(borders[1:], LEAST))
    band = _band(found, difference_T, a.targets_T, looks_K, a.step_T, omega_unpaired)
    whole = _change(a, b, slice(None), found)
    seen = whole.p < ALPHA and whole.nats != 0  # whatever twins say: how long until the two curves are told apart
    return TrainingComparison(
        a=labels[0],
        b=labels[1],
        whole=whole,
        quarters=tuple(_parts(a, b)),
        gain=apart / own if own > 0 else None,
        paired_from_step=_settled(band.step_K, band.mean_K, band.half_K),
        unpaired_from_step=_settled(band.step_K, band.mean_K, band.half_unpaired_K),
        paired_steps=_steps_needed(whole.nats, _spread(found, a), found.df) if seen else None,
        unpaired_steps=_steps_needed(whole.nats, omega_unpaired, found.df) if seen else None,
        band=band,
        last_step_C=a.step_T[borders[1:] - 1],
        loss_a_C=_block_means(a, borders),
        loss_b_C=_block_means(b, borders),
        changed=changed,
        cautions=cautions,
    )


def _mean(a: Curve, b: Curve, part: slice, level: float = 0.95) -> LongRunMean:
    weight_T = a.targets_T[part]
    return long_run_mean((b.loss_T[part] - a.loss_T[part]) * weight_T, weight_T, level)


def _spread(found: LongRunMean, a: Curve) -> float:
    """ω of one step in nats per target."""
    return found.omega / float(a.targets_T.mean())


def _parts(a: Curve, b: Curve) -> list[Change]:
    """The stretch in four parts, fewer where four would be too short, none where two would be; they share α."""
    count = min(QUARTERS, len(a.loss_T) // LEAST)
    if count < 2:
        return []
    borders = np.linspace(0, len(a.loss_T), count + 1).astype(int)
    out = []
    for start, end in pairwise(borders):
        part = slice(start, end)
        found = _change(a, b, part, _mean(a, b, part, 1 - ALPHA / count))
        out.append(replace(found, p=min(1.0, count * found.p) if not found.wanders else found.p))
    return out


def _block_means(curve: Curve, borders: Integers) -> Floats:
    """Means over each block, weighted by targets; [C]."""
    sums_C = np.add.reduceat(curve.loss_T * curve.targets_T, borders[:-1])
    return np.asarray(sums_C / np.add.reduceat(curve.targets_T, borders[:-1]), dtype=np.float64)


def _change(a: Curve, b: Curve, part: slice, found: LongRunMean) -> Change:
    """The difference over a part of the steps."""
    # A's mean over these very windows is known, not estimated, so it adds no error to the percentage.
    mean = float(np.average(a.loss_T[part], weights=a.targets_T[part]))
    percent = 100 / mean if mean > 0 else math.nan
    step_T = a.step_T[part]
    return Change(
        first_step=int(step_T[0]),
        last_step=int(step_T[-1]),
        loss_a=mean,
        loss_b=mean + found.value,
        nats=found.value,
        half95_nats=found.half95,
        percent=percent * found.value,
        half95_percent=percent * found.half95,
        t=found.t,
        p=found.p,
        wanders=found.wanders,
    )


def _band(
    found: LongRunMean, difference_T: Floats, targets_T: Floats, looks_K: Integers, step_T: Integers, unpaired: float
) -> Band:
    half_K = running_half(found, targets_T, looks_K, t_opt=len(difference_T), alpha=ALPHA)
    apart = replace(found, omega=unpaired * float(targets_T.mean()))
    unpaired_K = running_half(apart, targets_T, looks_K, t_opt=len(difference_T), alpha=ALPHA)
    mean_K = (np.cumsum(difference_T * targets_T) / np.cumsum(targets_T))[looks_K - 1]
    return Band(step_T[looks_K - 1], mean_K, half_K, unpaired_K)


def _settled(step_K: Integers, mean_K: Floats, half_K: Floats) -> int | None:
    """The first step from which the band leaves zero out, on the side where it ends, to the end."""
    outside_K = (np.abs(mean_K) > half_K) & (np.sign(mean_K) == np.sign(mean_K[-1]))
    if not outside_K[-1]:
        return None
    return int(step_K[len(outside_K) - int(np.argmin(outside_K[::-1])) if not outside_K.all() else 0])


def _steps_needed(nats: float, omega: float, df: int) -> int:
    """Steps after which a band tuned to that time leaves out zero: its width at t steps is ω·c/√t, whatever t."""
    c = float(mixture_width(1.0, mixture_rho(1.0, ALPHA), ALPHA))
    wider = t_quantile(1 - ALPHA, df) / t_quantile(1 - ALPHA, math.inf)
    return math.ceil(max(LEAST, (c * wider * omega / nats) ** 2))
