"""What may change when a run goes on, and what a change breaks for whoever insists on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from configs.load import differences, is_named, load_config
from configs.run.directory import RunDir
from configs.run.facts import read_run_manifest
from configs.schema import Config
from configs.yaml.text import as_written
from eval.curves.pairing import NOT_THE_EXPERIMENT
from trainer.data.prepare import load_dataset_facts

# Everything else is the experiment itself. Where the data lies may change; what it holds is checked by its fingerprint.
MAY_CHANGE = (
    *NOT_THE_EXPERIMENT,
    "batch.micro",
    "deepspeed.zero_optimization.",  # how state is cut and moved, not what is computed
    "deterministic",
    "ema.",  # watches training, does not change it
    "gradient_checkpointing",
    "guards.",
    "max_time",
    "stop_when.",
    "zero.",
)

# What follows from a change, by key or section; the first that fits counts. {old} and {new} are the values.
_CONSEQUENCES = (
    (
        "batch.global",
        "a step is of another number of windows from here on: in this epoch some are left out or seen again, and "
        "losses are no longer paired with those of runs with {old}",
    ),
    (
        "sequence_length",
        "the data is cut into other windows: in this epoch some text is left out or seen again, and losses "
        "before and after are not of the same windows",
    ),
    (
        "seed",
        "data order and dropout are others from here on: in this epoch some windows are left out or seen again, and "
        "losses are no longer paired with those of runs with seed {old}",
    ),
    (
        "precision",
        "weights and gradients are rounded otherwise from here on; expect a small jump, and no bits as before",
    ),
    ("clip_grad_norm", "gradients are clipped at another norm from here on"),
    (
        "optimizer.lr",
        "the learning rate of every step from here on is that of the new peak, and jumps where the run goes on",
    ),
    ("optimizer.", "updates are made by another rule from here on, with the moments gathered by the old one"),
    ("schedule.", "the learning rate is drawn by the new schedule from here on, and jumps where the run goes on"),
    ("steps", "the schedule is drawn anew over {new} steps, so the learning rate jumps where the run goes on"),
    (
        "model.",
        "the same weights are used in another model from here on; weights of another shape do not fit, and are refused "
        "still",
    ),
    ("deepspeed.", "what DeepSpeed computes may be something else from here on"),
)
_WAYS = "--force-resume goes on all the same, --fresh starts anew"
_ANY = "what is trained is something else from here on, under the same name"


@dataclass(frozen=True)
class Change:
    """A setting that may not change when a run goes on, and has."""

    key: str
    refusal: str  # the line for whoever does not insist
    consequence: str  # the line for whoever does


def forbidden_changes(before: Config, now: Config, *, extend: bool) -> list[Change]:
    """What differs between a run's settings and those it is asked to go on with, and may not."""
    allowed = MAY_CHANGE + (("steps",) if extend else ())
    out = []
    for key, (old, new) in differences(before, now).items():
        if is_named(key, allowed):
            continue
        was = f"{key}: the run was started with {as_written(old)}, not {as_written(new)}; "
        if key == "steps":
            refusal = (
                f"{was}--extend goes on to {new}" if new > old else f"{was}--force-resume insists, --fresh is anew"
            )
        else:
            refusal = f"{was}--force-resume goes on all the same, --fresh starts anew; or use another run.dir"
        breaks = next((text for name, text in _CONSEQUENCES if is_named(key, (name,))), _ANY)
        names = {"old": as_written(old, quoted=False), "new": as_written(new, quoted=False)}
        out.append(Change(key, refusal, f"{key}: {names['old']} → {names['new']}: {breaks.format(**names)}"))
    if extend and now.steps < before.steps:
        refusal = f"steps: --extend needs more than the run's {before.steps}, not {now.steps}"
        out.append(Change("steps", refusal, f"steps: {before.steps} → {now.steps}: the run ends earlier than it said"))
    return out


def has_begun(run: RunDir) -> bool:
    """Whether there is anything in a run that its settings have made: a step, or a checkpoint (damaged ones count)."""
    made = run.metrics.is_file() and run.metrics.stat().st_size > 0
    if made or any(run.checkpoints.glob("step-*")) or any(run.quarantine.glob("step-*")):
        return True
    if any(step > 0 for step in run.whole_steps(run.snapshots)):
        return True
    return any(event.get("kind") == "checkpoint" for event in run.read_events())


def clear_unbegun(run: RunDir, config: Config, tell: Callable[[str], Any]) -> None:
    """Starts a run anew that never made a step, where the settings are others by now; says so in a line.

    What a start leaves before its first step goes: the settings, and step 0's weights and score, which are of other
    settings. Events, logs and jobs stay. For whoever keeps trainers out of the run.
    """
    if not run.config.is_file() or has_begun(run):
        return
    try:
        keys = [change.key for change in _changes(run, config, extend=False)]
    except ConfigError:  # settings that this version does not read, or half of a manifest
        keys = ["settings that cannot be read"]
    if not keys:
        return
    for folder in (run.snapshots, run.ema, run.losses, *run.train_board.parent.glob("*")):
        for left in folder.iterdir() if folder.is_dir() else ():  # the folder itself may be a link to another disk
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()
    for file in (run.manifest, run.path / "adapted.json", run.config):  # the last says that there is something to do
        file.unlink(missing_ok=True)
    told = f"{run.path.name} never made a step, so it starts anew; changed: {', '.join(keys)}"
    run.add_event("started anew", told, rank=0, keys=keys)
    tell(told)


def check_changes(config: Config, *, extend: bool, force: bool) -> list[Change]:
    """Holds the settings against those that the run at `config.run_dir` was started with, and the data too.

    A run that never made a step is held to nothing: see `clear_unbegun`.

    Args:
        force: forbidden changes are given instead of refused.

    Raises:
        ConfigError: what may not change and has, a line each.
    """
    run = RunDir(config.run_dir)
    if not run.config.is_file() or not has_begun(run):
        return []
    changes = _changes(run, config, extend=extend)
    if changes and not force:
        raise ConfigError(*(change.refusal for change in changes))
    return changes


def _changes(run: RunDir, config: Config, *, extend: bool) -> list[Change]:
    changes = forbidden_changes(load_config(run.config), config, extend=extend)
    before = read_run_manifest(run)["data"]["data"] if run.manifest.is_file() else None
    now = load_dataset_facts(config.data_dir)["fingerprints"]["data"]
    if before is not None and before != now:
        changes.append(
            Change(
                "data.dir",
                f"data.dir: {config.data_dir} does not hold the data that the run was started with (fingerprint "
                f"{now[:8]}, not {before[:8]}); {_WAYS}",
                f"data: {before[:8]} → {now[:8]}: other texts in another order from here on; some may be seen again, "
                "and losses are no longer paired with those on the earlier data",
            )
        )
    return changes


def tell_forced(run: RunDir, changes: list[Change], tell: Callable[[str], Any]) -> None:
    """Says what was insisted on, a line each; and in the run's events, for whoever reads its losses later."""
    if not changes:
        return
    for change in changes:
        tell(f"forced: {change.consequence}")
    told = "; ".join(change.consequence for change in changes)
    run.add_event("forced", told, rank=0, keys=[change.key for change in changes])
