"""Which steps of a run are scored, by the loss tables that are there."""

from __future__ import annotations

from pathlib import Path

from configs.errors import DataError, VernierError
from configs.load import load_config
from configs.run.directory import RunDir, step_name, step_of, tables_folder
from configs.run.facts import read_reference_facts
from configs.schema import Config


def loss_tables(run: RunDir, reference: Path | None, dtype: str | None) -> dict[int, Path]:
    """The whole loss tables of a run, by step; a part of one counts for nothing.

    Args:
        reference: the folder of the reference set; None: any set's tables.
        dtype: that of scoring; None: any.

    Raises:
        DataError: the reference set cannot be read.
    """
    folder = "*" if reference is None else _folder(reference)
    found = {}
    for path in run.losses.glob(f"{folder}/step-*@*.{dtype or '*'}.parquet"):
        step = step_of(path.name)
        if step is not None and path.name.partition("@")[0] == step_name(step) and ".partial." not in path.name:
            found[step] = path
    return found


def unscored(run: RunDir, config: Config) -> int:
    """How many snapshots have no loss table on the run's reference set.

    Raises:
        DataError: that set cannot be read.
    """
    scored = loss_tables(run, config.reference_dir, config.eval.dtype)
    return sum(step not in scored for step in run.whole_steps(run.snapshots))


def why_unscored(run: RunDir, config: Config) -> list[str]:
    """As `unscored`, a line for each: its step, and why the evaluator has passed over it where it has said so."""
    scored = loss_tables(run, config.reference_dir, config.eval.dtype)
    said = {event.get("step"): event.get("message") for event in run.read_events() if event.get("kind") == "not scored"}
    steps = [step for step in run.whole_steps(run.snapshots) if step not in scored]
    return [f"step {step}: {said.get(step) or 'the evaluator ended before it'}" for step in steps]


def can_be_scored(run: RunDir, config: Config) -> bool:
    """Whether a snapshot waits for its loss table, and the reference set can be read."""
    try:
        return unscored(run, config) > 0
    except DataError:
        return False


def planned_comparisons(run: RunDir, scored: int) -> tuple[int, bool]:
    """(how many scored steps a run will have been held against the one before, once all are; whether all are).

    Args:
        scored: steps that have their table.
    """
    try:
        config = load_config(run.config)
    except (VernierError, OSError):
        return max(1, scored - 1), True
    steps = {*range(0, config.steps + 1, config.snapshot.every), *config.snapshot.at, config.steps}
    over = run.is_finished(config) and scored >= len(run.whole_steps(run.snapshots))
    return max(1, scored - 1, 0 if over else len(steps) - 1), over


def _folder(reference: Path) -> str:
    facts = read_reference_facts(reference, "name", "fingerprints.tokens")
    return tables_folder(facts["name"], facts["fingerprints"]["tokens"])
