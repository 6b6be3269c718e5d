"""Which checkpoints and snapshots of a run stay. The others go all at once, and not before a newer one is whole.

Rank 0 only. Nothing here looks at weights.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

from configs.errors import DataError
from configs.files.atomic import read_manifest
from configs.run.directory import RunDir, step_name, tables_folder
from configs.run.facts import read_reference_facts
from configs.schema import CheckpointSettings, Config
from eval.tables import mean_loss, read_table, table_name


def thin_checkpoints(run: RunDir, settings: CheckpointSettings, split_by: int | None = None) -> None:
    """Leaves the newest `keep` checkpoints and those at multiples of `keep_every`; and the newest at or before the step
    `split_by`, from which twins start."""
    steps = run.whole_steps(run.checkpoints)
    stay = set(steps[-settings.keep :]) | _multiples(steps, settings.keep_every)
    if split_by is not None:
        stay.update(sorted(step for step in steps if step <= split_by)[-1:])
    if _newest_is_readable(run.checkpoints, steps):
        _remove(run.checkpoints, [step for step in steps if step not in stay])


def thin_snapshots(run: RunDir, config: Config) -> None:
    """Leaves the newest `keep` snapshots, those at multiples of `keep_every`, the best, and all that are not scored.

    A snapshot's moving average goes with it. Scored is what has its table on `eval.reference` in `eval.dtype`; the
    best is the one with the lowest mean loss there, the earliest of equals.
    """
    settings = config.snapshot
    steps = run.whole_steps(run.snapshots)
    if settings.keep is None or not _newest_is_readable(run.snapshots, steps):
        return
    loss = _losses(run, config, steps)
    stay = set(steps[-settings.keep :]) | _multiples(steps, settings.keep_every)
    if loss:
        stay.add(min(loss, key=lambda step: (loss[step], step)))
    going = [step for step in steps if step in loss and step not in stay]
    averages = run.whole_steps(run.ema)
    _remove(run.ema, [step for step in going if step in averages])
    _remove(run.snapshots, going)


def _multiples(steps: list[int], every: int | None) -> set[int]:
    return {step for step in steps if every is not None and step % every == 0}


def _newest_is_readable(folder: Path, steps: list[int]) -> bool:
    try:
        return bool(steps) and bool(read_manifest(folder / step_name(steps[-1])))
    except DataError:
        return False


def _remove(folder: Path, steps: list[int]) -> None:
    """Takes each directory away under another name first, so that none ever looks whole when half of it is gone."""
    if not folder.is_dir():
        return
    for step in steps:
        (folder / step_name(step)).rename(folder / f".{step_name(step)}.gone")
    for gone in folder.glob(".step-*.gone"):  # those that an earlier process could not finish too
        if gone.is_symlink():
            gone.unlink()
        else:
            shutil.rmtree(gone)


def _losses(run: RunDir, config: Config, steps: list[int]) -> dict[int, float]:
    """Mean loss (nats per token) of each snapshot that is scored as the run's evaluator does it, with these weights."""
    try:
        facts = read_reference_facts(config.reference_dir, "name", "fingerprints.tokens")
    except DataError:
        return {}
    folder = run.losses / tables_folder(facts["name"], facts["fingerprints"]["tokens"])
    found = {}
    for step in steps:
        table = folder / table_name(step_name(step), facts.get("objective", "causal"), config.eval.dtype or "fp32")
        try:
            loss, source = _mean_loss(table, table.stat().st_mtime_ns)
            if source == read_manifest(run.snapshots / step_name(step), "snapshot").get("weights"):
                found[step] = loss
        except (OSError, DataError):  # no table, or no good one: not scored
            continue
    return found


@lru_cache(maxsize=4096)
def _mean_loss(table: Path, _written: int) -> tuple[float, str | None]:
    """(mean loss, fingerprint of the weights) from a table; read once as long as it is the same file.

    Raises:
        DataError: it is damaged, or has no digest to tell: what would be deleted by it cannot be had again.
    """
    found = read_table(table)
    if found.undigested:
        raise DataError(f"{table}: has no digest")
    return mean_loss(found), found.meta.get("source")
