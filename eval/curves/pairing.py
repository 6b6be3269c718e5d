"""Whether two runs met the same windows at the same positions, their training curves, and what else differs.

Legend: `_T` one entry a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.files.json_lines import read_lines
from configs.load import differences, is_named, load_config
from configs.run.directory import RunDir, open_run
from configs.run.facts import read_run_manifest
from configs.schema import Config
from configs.yaml.text import as_written

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Settings that say where and how a run goes, not what it computes.
NOT_THE_EXPERIMENT = (
    "baseline",
    "callbacks",
    "callbacks_may_fail",
    "checkpoint.",
    "data.",
    "eval.",
    "launch.",
    "name",
    "nproc",
    "peak_flops",
    "reference.",
    "run.",
    "snapshot.",
    "threads_per_rank",
    "twins.",
)


_GOOD_COPY = "put a good copy of the file in its place"


@dataclass(frozen=True)
class Pairing:
    """What decides whether two runs' steps can be paired. `data` is the fingerprint of the training tokens."""

    where: str
    data: str | None
    seed: int
    sequence_length: int
    batch: int


@dataclass(frozen=True)
class Curve:
    """A run's training losses in nats per target, in the order of its steps; `targets_T` are those of each batch."""

    step_T: Integers
    position_T: Integers
    loss_T: Floats
    targets_T: Floats
    ranks_T: Integers
    micro_T: Integers

    def part(self, chosen_T: NDArray[np.bool_]) -> Curve:
        return Curve(*(column[chosen_T] for column in self.__dict__.values()))


def pairing_of(config: Config, data: str | None, where: str) -> Pairing:
    """What a run with these settings, on data of this fingerprint, can be paired by."""
    return Pairing(where, data, config.seed, config.sequence_length, config.batch.global_)


def pairing_of_run(run: Path) -> Pairing:
    """As `pairing_of`, of what is written in a run directory.

    Raises:
        DataError: it is none, or has not begun yet.
    """
    opened = open_run(run)
    if not opened.manifest.is_file():
        raise DataError(f"{run}: has no manifest.json yet, and so does not say what data it trains on; start it first")
    return pairing_of(load_config(opened.config), read_run_manifest(opened)["data"]["data"], str(run))


def pairing_problems(a: Pairing, b: Pairing) -> list[str]:
    """Why steps of the two cannot be paired, in a few words each; empty where they can."""
    out = []
    if a.data is None or a.data != b.data:
        names = [str(p.data)[:12] if p.data else "unknown" for p in (a, b)]
        out.append(f"other data (fingerprints {names[0]} and {names[1]})")
    for key, first, second in (
        ("seed", a.seed, b.seed),
        ("sequence_length", a.sequence_length, b.sequence_length),
        ("batch.global", a.batch, b.batch),
    ):
        if first != second:
            out.append(f"{key} {first} and {second}")
    return out


def read_curve(run: Path) -> Curve:
    """The lines of a run's `metrics.jsonl`.

    A line says its `targets`. One of an earlier version has only `tokens`, a running total in which a skipped batch
    counts too: there they are the growth since the line before, divided by the positions that it spans.

    Raises:
        DataError: there are none, or they are not in order.
    """
    path = RunDir(run).metrics
    lines, wrong = read_lines(path)
    if wrong:
        raise DataError(f"{wrong[0]}: the curve has a hole; {_GOOD_COPY}")
    if not lines:
        raise DataError(f"{path}: no step is written yet")
    try:
        columns = [[line[key] for line in lines] for key in ("step", "position", "tokens")]
        step_T, position_T, tokens_T = (np.array(column, dtype=np.int64) for column in columns)
        loss_T = np.array([line["loss"] for line in lines], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: a line lacks its step, position, tokens or loss; not written by vernier?") from None
    spanned_T = np.diff(position_T, prepend=-1)
    if np.any(spanned_T <= 0) or np.any(np.diff(step_T) <= 0):
        raise DataError(f"{path}: its steps and positions do not ascend; it is damaged")
    wanted_T = np.arange(1, len(step_T) + 1)
    if np.any(step_T != wanted_T):
        at = int(np.argmax(step_T != wanted_T))
        raise DataError(
            f"{path}: line {at + 1} is of step {step_T[at]}, where step {wanted_T[at]} belongs: the curve has a hole; "
            f"{_GOOD_COPY}"
        )
    grown_T = np.diff(tokens_T, prepend=0) / spanned_T
    return Curve(
        step_T,
        position_T,
        loss_T,
        np.array([line.get("targets", grown) for line, grown in zip(lines, grown_T, strict=True)], dtype=np.float64),
        np.array([line.get("ranks", 0) for line in lines], dtype=np.int64),
        np.array([line.get("micro", 0) for line in lines], dtype=np.int64),
    )


def settings_changed(a: Config, b: Config) -> list[str]:
    """Settings of the experiment that differ, as `key: A's → B's`."""
    found = differences(a, b)
    other_start = "model.path" in found  # the fields of a model that comes from a directory are no settings
    return [
        f"{key}: {as_written(before, quoted=False)} → {as_written(after, quoted=False)}"
        for key, (before, after) in found.items()
        if not is_named(key, NOT_THE_EXPERIMENT)
        and not (other_start and key.startswith("model.") and key != "model.path")
    ]


def changed_between(a: Path, b: Path) -> list[str]:
    """As `settings_changed`, of two runs, with the data where they have trained on other data.

    Raises:
        ConfigError, DataError: their settings cannot be read.
    """
    found = settings_changed(load_config(RunDir(a).config), load_config(RunDir(b).config))
    data = [data_of(run) for run in (a, b)]
    if None not in data and data[0] != data[1]:
        found.append(f"data: {str(data[0])[:8]} → {str(data[1])[:8]} (fingerprints)")
    return found


def data_of(run: Path) -> str | None:
    """The fingerprint of the tokens that a run has trained on; None where it does not say."""
    opened = RunDir(run)
    try:
        return str(read_run_manifest(opened)["data"]["data"]) if opened.manifest.is_file() else None
    except (DataError, KeyError, TypeError):
        return None


def _hardware(run: Path) -> str:
    manifest = read_run_manifest(RunDir(run))
    hardware = manifest.get("hardware", {})
    own = ", ".join(sorted(set(hardware.get("gpus") or []))) or f"a CPU with {hardware.get('cpu_capability') or '?'}"
    return f"{own}, torch {manifest.get('versions', {}).get('torch') or '?'}"


def pairing_cautions(
    labels: tuple[str, str], runs: tuple[Path, Path], configs: tuple[Config, Config], curves: tuple[Curve, Curve]
) -> list[str]:
    """What moves training losses without being the experiment."""
    out = []
    moved = []
    for key in ("ranks", "micro"):
        both = [np.unique(getattr(curve, f"{key}_T")).tolist() for curve in curves]
        if both[0] != both[1] or len(both[0]) > 1:
            words = [" then ".join(map(str, _in_order(getattr(curve, f"{key}_T")))) for curve in curves]
            moved.append(f"{key} ({words[0]} in {labels[0]}, {words[1]} in {labels[1]})")
    stages = [config.zero.stage for config in configs]
    if stages[0] != stages[1]:
        moved.append(f"ZeRO stage ({stages[0]} and {stages[1]})")
    if moved:
        half = any(config.precision in ("bf16", "fp16") for config in configs)
        size = "up to 0.0025 % in bf16" if half else "in the last digits in fp32"
        out.append(f"not cut the same way: {', '.join(moved)}; that alone moves losses, {size}")
    precisions = [config.precision for config in configs]
    if precisions[0] != precisions[1]:
        two = " and ".join(as_written(precision, quoted=False) for precision in precisions)
        out.append(f"unequal precision ({two}): part of this is rounding")
    hardware = [_hardware(run) for run in runs]
    if hardware[0] != hardware[1]:
        out.append(f"other hardware or software ({hardware[0]}; {hardware[1]}): last digits differ by that alone")
    return out


def _in_order(values_T: Integers) -> list[int]:
    """The values without repetitions next to each other."""
    kept_T = np.concatenate([[True], np.diff(values_T) != 0])
    return [int(value) for value in values_T[kept_T][:8]]
