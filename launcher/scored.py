"""Which steps of a run are scored, by the loss tables that are there."""

from __future__ import annotations

from pathlib import Path

from configs.errors import DataError
from configs.rundir import RunDir, step_name, step_of, tables_folder
from configs.schema import Config
from configs.whole import read_json


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


def can_be_scored(run: RunDir, config: Config) -> bool:
    """Whether a snapshot waits for its loss table, and the reference set can be read."""
    try:
        return unscored(run, config) > 0
    except DataError:
        return False


def _folder(reference: Path) -> str:
    facts = read_json(reference / "reference.json")
    try:
        return tables_folder(facts["name"], facts["fingerprints"]["tokens"])
    except (KeyError, TypeError):
        raise DataError(f"{reference / 'reference.json'}: it names no reference set") from None
