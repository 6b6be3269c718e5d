"""The files of a reference set: its documents and its samples, as Parquet with checksums.

Legend: `_D` one entry a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.reference.windows import Samples


def read_documents(directory: Path) -> tuple[list[str], list[str], list[str]]:
    """(sources, texts, prompts) of a reference set's documents, in its order; a prompt is "" where there is none.

    Raises:
        DataError: they are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "documents.parquet"
    try:
        there = pq.read_schema(path).names
        asked = ["source", "text", *(["prompt"] if "prompt" in there else [])]
        table = pq.read_table(path, columns=asked, page_checksum_verification=True)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as a reference set's documents ({said})") from None
    texts = table["text"].to_pylist()
    prompts = table["prompt"].to_pylist() if "prompt" in there else [""] * len(texts)
    return table["source"].to_pylist(), texts, prompts


def read_families(directory: Path) -> NDArray[np.int64] | None:
    """The family of each document, called by the number of its first, int64 [D]; None where the set does not say.

    Raises:
        DataError: the documents are missing or damaged.
    """
    found = _column(directory, "family", there=False)
    return None if found is None else np.asarray(found, dtype=np.int64)


def _column(directory: Path, name: str, *, there: bool = True) -> Any:
    """A column of the documents. `there`: it must be; else None where it is not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "documents.parquet"
    try:
        if not there and name not in pq.read_schema(path).names:
            return None
        return pq.read_table(path, columns=[name])[name].to_pylist()
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as a reference set's documents ({said})") from None


def read_labels(directory: Path) -> list[str]:
    """The label of each document, as it is written down, in order.

    Raises:
        DataError: they are missing or damaged.
    """
    return [str(label) for label in _column(directory, "label")]


def write_documents(
    path: Path, sources: Sequence[str], texts: Sequence[str], sha256s: Sequence[str], own: dict[str, Sequence[Any]]
) -> None:
    """Writes a row a document. `own`: columns that not every set has, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number_D = pa.array(np.arange(len(texts), dtype=np.int64))
    # large_string: the 32-bit offsets of plain strings end at 2 GiB of text.
    columns = {
        "document": number_D,
        "sha256": pa.array(sha256s, pa.string()),
        "source": pa.array(sources, pa.string()),
        "text": pa.array(texts, pa.large_string()),
        "order": number_D,
    }
    kinds = {"prompt": pa.large_string(), "label": pa.large_string(), "family": pa.int64()}
    columns |= {name: pa.array(values, kinds[name]) for name, values in own.items()}
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def write_samples(path: Path, samples: Samples) -> None:
    """Writes a row a sample."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.array(samples.offsets)
    ids = pa.LargeListArray.from_arrays(offsets, pa.array(samples.input_ids))
    scored = samples.scored
    own = {} if scored is None else {"scored": pa.LargeListArray.from_arrays(offsets, pa.array(scored))}
    table = pa.table(
        {
            "sample": pa.array(np.arange(len(samples.document), dtype=np.int64)),
            "document": pa.array(samples.document),
            "block": pa.array(samples.block),
            "batch": pa.array(samples.batch),
            "input_ids": ids,
            "labels_from": pa.array(samples.labels_from),
            "tokens": pa.array(samples.tokens),
            "bytes": pa.array(samples.bytes),
            **own,
        }
    )
    pq.write_table(table, path, write_page_checksum=True)


def read_samples(path: Path) -> Samples:
    """The samples of a set.

    Raises:
        DataError: they are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        ids = table["input_ids"]
        lengths = np.asarray(pa.compute.list_value_length(ids), dtype=np.int64)
        columns = {
            name: np.asarray(table[name]) for name in ("document", "block", "batch", "labels_from", "tokens", "bytes")
        }
        if "scored" in table.column_names:
            columns["scored"] = np.asarray(pa.compute.list_flatten(table["scored"]))
        flat = np.asarray(pa.compute.list_flatten(ids))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a reference set's samples ({error})") from None
    return Samples(input_ids=flat, offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)
