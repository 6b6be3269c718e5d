"""Loss tables on disk: what goes in comes out; what is not whole is refused, and overwrites nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs.errors import DataError
from eval.compare.pair import compare_tables
from eval.scoring.journal import Journal, folder_of, no_scores, scores_of_table
from eval.tables import LossTable, parse_table_name, read_table, table_name, write_table


def a_table(n: int = 40) -> LossTable:
    rng = np.random.default_rng(0)
    position_tokens = rng.integers(0, 5, (n, 16)).astype(np.int32)
    position_tokens[:, 0] += 1
    position_loss = position_tokens * rng.normal(2.2, 0.1, (n, 16))
    return LossTable(
        sample=np.arange(n),
        document=np.arange(n) // 2,
        tokens=position_tokens.sum(1).astype(np.int32),
        bytes=np.full(n, 300, np.int32),
        loss=position_loss.sum(1),
        correct=np.ones(n, np.int32),
        position_loss=position_loss,
        position_tokens=position_tokens,
        meta={"reference": "ab" * 32, "objective": "causal", "dtype": "fp32", "versions": {"torch": "2.6"}},
    )


COLUMNS = ("sample", "document", "tokens", "bytes", "loss", "correct", "position_loss", "position_tokens")


def test_what_is_written_is_read_to_the_last_bit(tmp_path: Path) -> None:
    table = a_table()
    write_table(tmp_path / "new" / "t.parquet", table)
    found = read_table(tmp_path / "new" / "t.parquet")
    for name in COLUMNS:
        written, read = getattr(table, name), getattr(found, name)
        assert np.array_equal(written, read), name
        assert written.dtype == read.dtype, name
    assert found.meta == table.meta


def test_two_writes_are_equal_byte_by_byte(tmp_path: Path) -> None:
    table = a_table()
    write_table(tmp_path / "a.parquet", table)
    write_table(tmp_path / "b.parquet", replace(table, meta=dict(reversed(table.meta.items()))))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_positions_are_lists_of_16_in_parquet(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", a_table())
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert schema.field("position_loss").type == pa.list_(pa.float64(), 16)
    assert schema.field("position_tokens").type == pa.list_(pa.int32(), 16)


def test_five_columns_and_metadata_are_enough(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", replace(a_table(), correct=None, position_loss=None, position_tokens=None))
    found = read_table(tmp_path / "t.parquet")
    assert found.correct is None
    assert found.position_loss is None
    assert len(found) == 40


def test_a_folder_named_like_a_setting_adds_no_column(tmp_path: Path) -> None:
    path = tmp_path / "lr=3e-4" / "t.parquet"
    write_table(path, a_table())
    assert len(read_table(path)) == 40


def spoiled(**at: Any) -> LossTable:
    table = a_table()
    for name, (index, value) in at.items():
        column = getattr(table, name).copy()
        column[index] = value
        table = replace(table, **{name: column})
    return table


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (spoiled(loss=(7, np.nan)), "sample 7 has a loss that is not finite"),
        (spoiled(loss=(9, np.inf)), "sample 9 has a loss that is not finite"),
        (spoiled(position_loss=((3, 4), np.nan)), "sample 3 has a loss by position"),
        (spoiled(tokens=(5, 0)), "sample 5 has no scored targets"),
        (spoiled(sample=(6, 5)), "sample 5 is there 2 times"),
        (spoiled(sample=(39, 41)), "sample 39 is missing"),
        (spoiled(sample=([2, 3], [3, 2])), "sample 3 is in the place of sample 2"),
        (replace(a_table(), loss=np.ones(39)), "column loss has shape"),
        (a_table(0), "no samples"),
        (replace(a_table(), tokens=np.full(40, 2**40)), "cannot be written"),
        (replace(a_table(), meta={"step": float("nan")}), "cannot be written"),
    ],
)
def test_a_table_that_is_not_right_is_refused_and_overwrites_nothing(
    tmp_path: Path, table: LossTable, said: str
) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, a_table())
    before = path.read_bytes()
    with pytest.raises(DataError, match=said) as caught:
        write_table(path, table)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def rewritten(path: Path, change: Any) -> Path:
    write_table(path, a_table())
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace_schema_metadata(None), "no metadata key 'vernier'"),
        (lambda t: t.replace_schema_metadata({"vernier": "[1"}), "not a JSON object"),
        (lambda t: t.drop_columns(["loss", "bytes"]), "no column bytes, loss"),
        (lambda t: t.set_column(4, "loss", pa.array(["x"] * 40)), "column loss is string"),
        (lambda t: t.set_column(4, "loss", pa.array([None, *[1.0] * 39])), "column loss has empty entries"),
        (lambda t: t.set_column(4, "loss", pa.array([np.nan, *[1.0] * 39])), "sample 0 has a loss"),
        (lambda t: t.slice(1), "sample 0 is missing"),
    ],
)
def test_a_file_that_is_no_loss_table_is_refused_by_name(tmp_path: Path, change: Any, said: str) -> None:
    path = rewritten(tmp_path / "t.parquet", change)
    with pytest.raises(DataError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="no such loss table"):
        read_table(path)
    write_table(path, a_table())
    for content in (path.read_bytes()[:-100], b"not parquet at all", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read_table(path)


def test_names_of_tables() -> None:
    name = table_name("step-00001000", "causal", "fp32")
    assert name == "step-00001000@causal.fp32.parquet"
    assert parse_table_name(name) == ("step-00001000", "causal", "fp32")
    assert parse_table_name("gpt2-v1.5@masked.bf16.parquet") == ("gpt2-v1.5", "masked", "bf16")
    for other in ("step-00001000@causal.fp32.partial.parquet", "step-00001000.parquet", "x.txt"):
        assert parse_table_name(other) is None
    with pytest.raises(DataError, match="file name"):
        table_name("a/b", "causal", "fp32")


def test_no_turned_bit_in_a_table_is_believed(tmp_path: Path) -> None:
    """Columns, footer, metadata: what is read is either what was written, or refused in a line."""
    path = tmp_path / "t.parquet"
    write_table(path, a_table())
    content, whole = path.read_bytes(), read_table(path)
    refused = 0
    for place in np.random.default_rng(7).choice(8 * len(content), 200, replace=False):
        turned = bytearray(content)
        turned[place // 8] ^= 1 << place % 8
        path.write_bytes(turned)
        try:
            found = read_table(path)
        except DataError:
            refused += 1
            continue
        assert all(np.array_equal(getattr(found, name), getattr(whole, name)) for name in COLUMNS)
        assert found.meta == whole.meta or found.undigested
    assert refused > 100


@pytest.mark.parametrize("key", ["reference", "dtype", "versions"])
def test_what_the_metadata_say_is_under_the_digest_too(tmp_path: Path, key: str) -> None:
    def other(content: pa.Table) -> pa.Table:
        meta = json.loads(content.schema.metadata[b"vernier"])
        return content.replace_schema_metadata({"vernier": json.dumps({**meta, key: "else"})})

    with pytest.raises(DataError, match="its digest does not fit"):
        read_table(rewritten(tmp_path / "t.parquet", other))


def test_a_table_of_an_older_vernier_is_compared_with_a_caution(tmp_path: Path) -> None:
    def older(content: pa.Table) -> pa.Table:
        meta = json.loads(content.schema.metadata[b"vernier"])
        del meta["digest"]
        return content.replace_schema_metadata({"vernier": json.dumps({**meta, "label": "old"})})

    found = read_table(rewritten(tmp_path / "t.parquet", older))
    assert found.undigested
    cautions = compare_tables(a_table(), found).cautions
    assert [caution for caution in cautions if "has no digest" in caution] == [
        "old: its table has no digest, so damage to it would not be seen"
    ]
    assert not any("digest" in caution for caution in compare_tables(a_table(), a_table()).cautions)


def test_a_turned_bit_in_what_a_killed_scoring_left_is_scored_again(tmp_path: Path) -> None:
    found, table = scores_of_table(a_table()), tmp_path / "t.parquet"
    assert found is not None
    sums, counts = found
    journal = Journal(table, a_table().meta, rank=0)
    for half in (torch.arange(20), torch.arange(20, 40)):
        journal.add(half, sums[half], counts[half])
        journal.flush()
    first = min(folder_of(table).iterdir())
    content = bytearray(first.read_bytes())
    content[-3] ^= 16  # in the numbers, which are behind the header
    first.write_bytes(content)
    into = no_scores(40)
    journal.read(into)
    assert into.has().tolist() == [False] * 20 + [True] * 20
    assert torch.equal(into.sums[20:], sums[20:])
