"""Paired training curves: the training losses of two runs on the same windows, step by step. Prints nothing.

Runs with the same data, seed, sequence length and global batch meet the same windows at the same positions, so what
makes a batch hard drops out of the difference. It is a difference of *training* losses, never of scores.

Legend: `_T` one entry a step, `_C` one a block of consecutive steps, `_K` one a look at the running mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.load import load_config
from configs.run.directory import RunDir
from eval.compare.curve_pairing import (
    Curve,
    pairing_cautions,
    pairing_of_run,
    pairing_problems,
    read_curve,
    settings_changed,
)
from eval.statistics import (
    block_ends,
    block_length,
    block_means,
    block_sums,
    confidence_sequence,
    detrended,
    mean_over_blocks,
    mixture_rho,
    mixture_width,
    sign_flip_blocks,
)
from eval.statistics.blocks import LEAST_BLOCKS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Verdict = Literal["lower", "higher", "no difference seen", "identical"]

ALPHA = 0.05
FIRST_LOOK_BLOCKS = 12  # before these the band's own spread is too uncertain; then it errs in .025–.045 of runs


@dataclass(frozen=True)
class Change:
    """B − A over a stretch of steps: nats per target, and percent of A's mean loss there, with half 95 % intervals."""

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
    blocks: int


@dataclass(frozen=True)
class Band:
    """At the end of each block: the mean difference so far, and the half widths that hold at all of them together.

    `half_K` is of the paired difference, `half_unpaired_K` what it would be had the runs met other windows.
    """

    step_K: Integers
    mean_K: Floats
    half_K: Floats
    half_unpaired_K: Floats


@dataclass(frozen=True)
class TrainingComparison:
    """Training losses of B against those of A. `changed`: settings that differ, both values in words.

    `gain`: variance of a block's difference without pairing ÷ with it, None where the paired one is zero.
    `*_from_step`: from there to the end the band leaves out zero. `*_steps`: about how many steps that takes for a
    constant difference of this size; None where none is seen.
    """

    a: str
    b: str
    whole: Change
    quarters: tuple[Change, ...]
    p_sign_flip: float
    block_steps: float
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

    @property
    def verdict(self) -> Verdict:
        if not np.any(self.loss_a_C - self.loss_b_C) and self.whole.nats == 0:
            return "identical"
        if self.whole.p < ALPHA:
            return "lower" if self.whole.nats < 0 else "higher"
        return "no difference seen"

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B --training --json` prints; null where a number is infinite."""
        return {
            "of": "training loss",
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "difference": {**_change_json(self.whole), "p_sign_flip": self.p_sign_flip, "alpha": ALPHA},
            "quarters": [_change_json(quarter) for quarter in self.quarters],
            "block_steps": self.block_steps,
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
    cautions.append(
        "this is about these two runs on other windows, not about their settings: another seed, or the last bit of one "
        "weight, can move a curve as far"
    )
    return _compared(labels, curve_a, curve_b, tuple(settings_changed(config_a, config_b)), tuple(cautions))


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
    length = block_length(difference_T)
    if count // length < LEAST_BLOCKS:
        raise DataError(
            f"compare --training: {count} steps in common are too few: their differences call for blocks of {length} "
            f"steps, and the error of the mean for {LEAST_BLOCKS} of these, which is {LEAST_BLOCKS * length} steps"
        )
    borders = block_ends(count, length)
    weight_C, last_step_C = block_sums(a.targets_T, borders), a.step_T[borders[1:] - 1]
    total_C = block_sums(difference_T * a.targets_T, borders)
    curves_C = block_means(np.stack([a.loss_T, b.loss_T]), borders, a.targets_T)

    paired, unpaired = _spread(a, b, borders)
    band = _band(total_C, weight_C, last_step_C, unpaired**2 - paired**2)
    whole = _change(a, b, borders)
    seen = whole.p < ALPHA and whole.nats != 0
    parts = np.linspace(0, len(weight_C), 5).astype(int)
    return TrainingComparison(
        a=labels[0],
        b=labels[1],
        whole=whole,
        quarters=tuple(_change(a, b, borders[i : j + 1]) for i, j in pairwise(parts)),
        p_sign_flip=sign_flip_blocks(difference_T, length, a.targets_T).p,
        block_steps=count / len(weight_C),
        gain=unpaired**2 / paired**2 if paired > 0 else None,
        paired_from_step=_settled(band.step_K, band.mean_K, band.half_K),
        unpaired_from_step=_settled(band.step_K, band.mean_K, band.half_unpaired_K),
        paired_steps=_steps_needed(whole.nats, paired, count / len(weight_C)) if seen else None,
        unpaired_steps=_steps_needed(whole.nats, unpaired, count / len(weight_C)) if seen else None,
        band=band,
        last_step_C=last_step_C,
        loss_a_C=curves_C[0],
        loss_b_C=curves_C[1],
        changed=changed,
        cautions=cautions,
    )


def _change(a: Curve, b: Curve, borders: Integers) -> Change:
    """The difference over the blocks between the first border and the last."""
    here, inner = slice(borders[0], borders[-1]), borders - borders[0]
    weight_T, loss_T = a.targets_T[here], a.loss_T[here]
    found = mean_over_blocks(block_sums((b.loss_T[here] - loss_T) * weight_T, inner), block_sums(weight_T, inner))
    # A's mean over these very windows is known, not estimated, so it adds no error to the percentage.
    mean = float(np.average(loss_T, weights=weight_T))
    percent = 100 / mean if mean > 0 else math.nan
    return Change(
        first_step=int(a.step_T[borders[0]]),
        last_step=int(a.step_T[borders[-1] - 1]),
        loss_a=mean,
        loss_b=mean + found.value,
        nats=found.value,
        half95_nats=found.half95,
        percent=percent * found.value,
        half95_percent=percent * found.half95,
        t=found.t,
        p=found.p,
        blocks=found.blocks,
    )


def _spread(a: Curve, b: Curve, borders: Integers) -> tuple[float, float]:
    """Standard deviations of a block's difference in nats, about its slow trend: (paired, unpaired).

    Unpaired: sqrt(var_a + var_b), as of two runs whose windows have nothing to do with each other.
    """
    means_2C = block_means(detrended(np.stack([a.loss_T, b.loss_T])), borders, a.targets_T)
    paired = float(np.std(block_means(detrended(b.loss_T - a.loss_T), borders, a.targets_T)))
    return paired, float(np.sqrt(np.var(means_2C, axis=-1).sum()))


def _band(total_C: Floats, weight_C: Floats, last_step_C: Integers, more_variance: float) -> Band:
    """`more_variance`: what a block's difference varies more without pairing; its drift is the same in both."""
    looks_K = np.arange(FIRST_LOOK_BLOCKS, len(total_C) + 1)
    found = confidence_sequence(total_C, weight_C, looks_K, t_opt=len(total_C), alpha=ALPHA)
    width_K = mixture_width(looks_K, mixture_rho(len(total_C), ALPHA), ALPHA)
    unpaired_K = width_K * np.sqrt(np.maximum((found.half_K / width_K) ** 2 + more_variance, 0.0))
    return Band(last_step_C[looks_K - 1], found.value_K, found.half_K, unpaired_K)


def _settled(step_K: Integers, mean_K: Floats, half_K: Floats) -> int | None:
    """The first step from which the band leaves zero out, on the side where it ends, to the end."""
    outside_K = (np.abs(mean_K) > half_K) & (np.sign(mean_K) == np.sign(mean_K[-1]))
    if not outside_K[-1]:
        return None
    return int(step_K[len(outside_K) - int(np.argmin(outside_K[::-1])) if not outside_K.all() else 0])


def _steps_needed(nats: float, sd: float, block_steps: float) -> int:
    """Steps after which a band tuned to that time leaves out zero: its width at t blocks is sd·c/√t, whatever t."""
    c = float(mixture_width(1.0, mixture_rho(1.0, ALPHA), ALPHA))
    return math.ceil(block_steps * max(FIRST_LOOK_BLOCKS, (c * sd / nats) ** 2))
