"""Loss tables: what scoring one model on a reference set leaves behind, a row a sample, as a Parquet file.

A table is checked when it is written and when it is read: a hole or a NaN never becomes a wrong mean, nor does a bit
that a disk has turned: a digest of the columns and of what the metadata says goes with them.
Legend: `_N` one entry a sample.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import DataError
from configs.files.atomic import write_atomic
from configs.files.opening import open_to_read

METADATA_KEY = b"vernier"
DIGEST = "digest"  # its key in the metadata
POSITION_BINS = 16
NATS = "nats per token"  # what a loss is, unless its table's metadata says `unit`
_NAME = re.compile(r"(?P<label>.+)@(?P<objective>[^@./]+)\.(?P<dtype>[^@./]+)\.parquet")

REQUIRED = {
    "sample": pa.int64(),
    "document": pa.int64(),
    "tokens": pa.int32(),
    "bytes": pa.int32(),
    "loss": pa.float64(),
}
OPTIONAL = {
    "correct": pa.int32(),
    "position_loss": pa.list_(pa.float64(), POSITION_BINS),
    "position_tokens": pa.list_(pa.int32(), POSITION_BINS),
    "family": pa.int64(),
}


@dataclass(frozen=True, eq=False)
class LossTable:
    """Losses of one model on one reference set, in the set's order.

    `loss` is the sum of negative log likelihood over the sample's scored targets, in nats. `meta` says what
    was scored and how; every key may be absent: reference, reference_text, reference_name, model, source,
    label, step, dtype, objective, unit, weights, attention, hardware, threads, versions; partial (blocks, of, samples)
    where the table is a prefix of the set's blocks, until_verdict where scoring was asked to stop at one.
    `family`: number of the first document that shares long passages with a sample's; None: each is by itself.
    `undigested`: it was read from a file without a digest, of an older Vernier or another program.
    """

    sample: NDArray[np.int64]
    document: NDArray[np.int64]
    tokens: NDArray[np.int32]
    bytes: NDArray[np.int32]
    loss: NDArray[np.float64]
    correct: NDArray[np.int32] | None = None
    position_loss: NDArray[np.float64] | None = None  # [n, 16]
    position_tokens: NDArray[np.int32] | None = None  # [n, 16]
    family: NDArray[np.int64] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    undigested: bool = False

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def cluster(self) -> NDArray[np.int64]:
        """What errors are clustered by, int64 [n]: families of documents, where they are known."""
        return self.document if self.family is None else self.family


def table_name(label: str, objective: str, dtype: str) -> str:
    """File name of a table, such as `step-00001000@causal.fp32.parquet`.

    Raises:
        DataError: a part of it is no part of a file's name.
    """
    name = f"{label}@{objective}.{dtype}.parquet"
    if "/" in label or parse_table_name(name) != (label, objective, dtype):
        raise DataError(f"loss table: {label!r}, {objective!r}, {dtype!r} do not make a file name")
    return name


def partial_path(table: Path) -> Path:
    """Where the part of a table lies whose scoring was stopped early."""
    return table.with_name(table.name.removesuffix(".parquet") + ".partial.parquet")


def parse_table_name(name: str) -> tuple[str, str, str] | None:
    """(label, objective, dtype) of a table's file name; None for any other (`.partial.parquet`, say)."""
    match = _NAME.fullmatch(name)
    return (match["label"], match["objective"], match["dtype"]) if match else None


def write_table(path: Path, table: LossTable) -> None:
    """Writes a table whole or not at all; what was at `path` stays until the new one is on the disk.

    Equal content gives equal bytes, so tables of two scorings can be compared with `cmp`.

    Raises:
        DataError: a loss is not finite, a sample is missing, doubled, or has no target. Nothing is written.
    """
    check_table(table, path)
    columns = {}
    try:
        for name, kind in {**REQUIRED, **OPTIONAL}.items():
            values = getattr(table, name)
            if values is not None:
                columns[name] = _column(values, kind)
        meta = {**table.meta, DIGEST: table_digest(table)}
        metadata = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be written as a loss table: {error}") from None
    content = pa.table(columns).replace_schema_metadata({METADATA_KEY: metadata})
    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, compression="zstd", write_page_checksum=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, sink.getvalue().to_pybytes(), durable=True)


def _column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(_column(values.reshape(-1), kind.value_type), kind.list_size)
    return pa.array(values).cast(kind)  # a safe cast: refuses what does not fit


def read_table(path: Path) -> LossTable:
    """The table in a Parquet file; only the first five columns and the metadata have to be there.

    Raises:
        DataError: missing, not Parquet, not a loss table, or one that `write_table` would refuse.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such loss table")
    try:
        # A handle, not the path: pyarrow's dataset reader would make columns of folders named key=value.
        with open_to_read(path) as file:
            content = pq.ParquetFile(file, page_checksum_verification=True).read()
        content.validate(full=True)
    except Exception as error:  # of a damaged file pyarrow may say anything: no memory, no UTF-8, an overflow
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be read as Parquet ({said})") from None
    meta = _metadata(path, content.schema.metadata or {})
    missing = [name for name in REQUIRED if name not in content.column_names]
    if missing:
        raise DataError(f"{path}: not a loss table: it has no column {', '.join(missing)}")
    columns = {
        n: _values(path, content, n, k) for n, k in {**REQUIRED, **OPTIONAL}.items() if n in content.column_names
    }
    told = meta.pop(DIGEST, None)
    table = LossTable(**columns, meta=meta, undigested=told is None)
    check_table(table, path)  # first, since it can say what is wrong
    if told is not None and told != table_digest(table):
        raise DataError(f"{path}: changed since it was written (its digest does not fit); score it again with --force")
    return table


def table_digest(table: LossTable) -> str:
    """SHA-256 of a table: of its metadata, and of each column's name, kind and values, whatever file they are in."""
    meta = {key: value for key, value in table.meta.items() if key != DIGEST}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, kind in {**REQUIRED, **OPTIONAL}.items():
        values = getattr(table, name)
        if values is not None:
            number = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
            # Little-endian on any machine, as Parquet has them.
            plain = np.ascontiguousarray(values, dtype=np.dtype(number.to_pandas_dtype()).newbyteorder("<"))
            digest.update(f"\n{name} {kind} {plain.shape}\n".encode())
            digest.update(plain.data)
    return digest.hexdigest()


def read_mean_loss(path: Path) -> tuple[float, dict[str, Any]]:
    """(mean loss in nats per token, metadata) of a table.

    Raises:
        DataError: as `read_table`: all of it is read, since only all of it can be checked.
    """
    table = read_table(path)
    return mean_loss(table), table.meta


def mean_table(tables: Sequence[LossTable]) -> LossTable:
    """Each sample's mean loss over tables of one set; of one table, that table."""
    first = tables[0]
    if len(tables) == 1:
        return first
    loss_N = np.mean([table.loss for table in tables], axis=0)
    meta = {key: value for key, value in first.meta.items() if key not in ("model", "source", "label", "step")}
    return replace(first, loss=loss_N, meta=meta, correct=None, position_loss=None, position_tokens=None)


def unit_of(table: LossTable) -> str:
    """What a table's losses are, such as nats per token."""
    return str(table.meta.get("unit", NATS))


def mean_loss(table: LossTable) -> float:
    """In nats per token."""
    return float(table.loss.sum() / table.tokens.sum(dtype=np.float64))


def _metadata(path: Path, metadata: dict[bytes, bytes]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise DataError(f"{path}: not a loss table: its schema has no metadata key {METADATA_KEY.decode()!r}")
    try:
        meta = json.loads(metadata[METADATA_KEY])
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise DataError(f"{path}: its metadata key {METADATA_KEY.decode()!r} is not a JSON object")
    return meta


def _values(path: Path, content: pa.Table, name: str, kind: pa.DataType) -> NDArray[Any]:
    try:
        column = content.column(name).cast(kind).combine_chunks()
    except KeyError:
        raise DataError(f"{path}: column {name} is there more than once") from None
    except pa.ArrowException:
        raise DataError(f"{path}: column {name} is {content.schema.field(name).type}, expected {kind}") from None
    values = column.flatten() if pa.types.is_fixed_size_list(kind) else column
    if column.null_count or values.null_count:
        raise DataError(f"{path}: column {name} has empty entries")
    numbers = values.to_numpy(zero_copy_only=False)
    return numbers.reshape(len(column), kind.list_size) if pa.types.is_fixed_size_list(kind) else numbers


def check_table(table: LossTable, where: Path | str) -> None:
    """Refuses a table that has a hole, a sample twice, or a loss that is no number; `where` begins the error.

    Raises:
        DataError: one line that names the first sample at fault.
    """
    count = len(table.sample)
    if count == 0:
        raise DataError(f"{where}: the loss table has no samples")
    for name in (*REQUIRED, *OPTIONAL):
        values = getattr(table, name)
        shape = (count, POSITION_BINS) if name.startswith("position_") else (count,)
        if values is not None and np.shape(values) != shape:
            raise DataError(f"{where}: column {name} has shape {np.shape(values)}, expected {shape}")
    _check_samples(np.asarray(table.sample), where)
    faults: dict[str, Any] = {
        "has a loss that is not finite": ~np.isfinite(table.loss),
        "has no scored targets": np.asarray(table.tokens) <= 0,
        "has a negative number of bytes": np.asarray(table.bytes) < 0,
    }
    if table.position_loss is not None:
        faults["has a loss by position that is not finite"] = ~np.isfinite(table.position_loss).all(axis=1)
    for fault, wrong_N in faults.items():
        if wrong_N.any():
            first = int(np.argmax(wrong_N))
            more = int(wrong_N.sum()) - 1
            raise DataError(f"{where}: sample {first} {fault}" + (f", and {more} more" if more else ""))


def _check_samples(sample_N: NDArray[Any], where: Path | str) -> None:
    count = len(sample_N)
    wanted = np.arange(count)
    if np.array_equal(sample_N, wanted):
        return
    ids, times = np.unique(sample_N, return_counts=True)
    if (times > 1).any():
        doubled = int(np.argmax(times > 1))
        raise DataError(f"{where}: sample {ids[doubled]} is there {times[doubled]} times; each must be there once")
    missing = np.setdiff1d(wanted, ids)
    if len(missing):
        raise DataError(f"{where}: sample {missing[0]} is missing; samples must be 0 to n − 1, each once")
    first = int(np.argmax(sample_N != wanted))
    raise DataError(
        f"{where}: sample {sample_N[first]} is in the place of sample {first}; keep the reference set's order"
    )
