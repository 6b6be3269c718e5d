"""What JSON files say of a prepared data set, a reference set and a run, held to its shape before it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.atomic import read_json
from configs.run.directory import RunDir

_REFERENCE: dict[str, type] = {
    "name": str,
    "fingerprints.text": str,
    "fingerprints.tokens": str,
    "tokenizer.fingerprint": str,
    "tokenizer.vocab_size": int,
    "sequence_length": int,
    "counts.documents": int,
    "counts.batches": int,
}
_DATASET: dict[str, type] = {"fingerprints.data": str, "vocab_size": int}
_RUN: dict[str, type] = {"data.data": str}


def read_reference_facts(directory: Path, *needed: str) -> dict[str, Any]:
    """What `reference.json` of a reference set says.

    Args:
        needed: what has to be there, such as `fingerprints.tokens`; without any, all that scoring needs.

    Raises:
        DataError: it is missing or damaged.
    """
    keys = {key: kind for key, kind in _REFERENCE.items() if not needed or key in needed}
    return _read(directory / "reference.json", keys, "make the reference set again, or take a good copy")


def read_dataset_facts(path: Path) -> dict[str, Any]:
    """What `dataset.json` of a prepared data set says. Raises DataError where it is missing or damaged."""
    return _read(path, _DATASET, "prepare the data again with --fresh")


def read_run_manifest(run: RunDir) -> dict[str, Any]:
    """What `manifest.json` of a run says made it. Raises DataError where it is missing or damaged."""
    return _read(run.manifest, _RUN, "take a good copy, or move it away: the run's next start writes it anew")


def _read(path: Path, keys: dict[str, type], then: str) -> dict[str, Any]:
    try:
        found = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; {then}") from None
    for key, kind in keys.items():
        value = found
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) is not kind:
            raise DataError(f"{path}: damaged: {key} is {value!r}; {then}")
    return dict(found)
