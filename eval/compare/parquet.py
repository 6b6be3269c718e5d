"""Comparisons as flat rows of one Parquet table, for whoever reads many of them: pair, run or leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.atomic import write_atomic
from eval.compare.along_run import RunComparison
from eval.compare.leaderboard import Leaderboard
from eval.compare.pair import Comparison

METADATA_KEY = b"vernier-compare"
_TEXT = ("limited_by", "cautions")  # a column without any value would have no type of its own
_NOT_FLAT = ("a", "b", "difference", "cautions")


def comparison_row(comparison: Comparison, **more: Any) -> dict[str, Any]:
    """One row: the keys of its JSON, sides prefixed `a_` and `b_`, the interval as `low_percent` and `high_percent`."""
    content = comparison.to_json()
    difference = dict(content["difference"])
    difference["low_percent"], difference["high_percent"] = difference.pop("ci95_percent")
    difference.setdefault("bits_per_byte", None)
    return {
        **more,
        **{f"{side}_{key}": value for side in ("a", "b") for key, value in content[side].items()},
        **difference,
        **{key: value for key, value in content.items() if key not in _NOT_FLAT},
        "cautions": "; ".join(content["cautions"]) or None,
    }


def run_rows(run: RunComparison) -> list[dict[str, Any]]:
    """A row for each checkpoint against the one before, and one against the first (`versus` says which)."""
    rows = []
    for point in run.checkpoints:
        for versus, comparison in (("previous", point.versus_previous), ("first", point.versus_first)):
            if comparison is not None:
                rows.append(comparison_row(comparison, run=run.run, step=point.step, versus=versus))
    return rows


def leaderboard_rows(board: Leaderboard) -> list[dict[str, Any]]:
    """A row for each pair, with the adjusted p-values and the two models' groups."""
    groups = {entry.name: entry.group for entry in board.entries}
    return [
        comparison_row(
            pair.comparison,
            p_holm=pair.p_holm,
            p_bh=pair.p_bh,
            told_apart=pair.told_apart,
            a_group=groups[pair.comparison.a.name],
            b_group=groups[pair.comparison.b.name],
        )
        for pair in board.pairs
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Writes rows as a Parquet table, whole or not at all; gives whether an older result was replaced.

    Raises:
        DataError: there are no rows, or the file exists and is not such a table (a loss table, say): it stays.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise DataError(f"--parquet: {path}: there is nothing to write; a comparison needs two tables")
    there = path.exists()
    if there and not _is_ours(path):
        raise DataError(f"--parquet: {path} exists and is not a result of vernier compare; it is left as it is")
    content = pa.Table.from_pylist(rows)
    types = [
        field.with_type(pa.string() if field.name in _TEXT else pa.float64()) if pa.types.is_null(field.type) else field
        for field in content.schema
    ]
    content = content.cast(pa.schema(types, metadata={METADATA_KEY: b"1"}))
    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, compression="zstd")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sink.getvalue().to_pybytes())
    except OSError as error:
        raise DataError(f"--parquet: {path}: cannot be written ({error.strerror})") from None
    return there


def _is_ours(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return path.is_file() and METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False
