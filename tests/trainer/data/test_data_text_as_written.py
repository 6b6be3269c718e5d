"""A text is what is written in its file, whatever it looks like; a broken row is named by the line it is on."""

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import DataSettings, ObjectiveSettings
from trainer.data.rows.columns import rows_of_file, rows_of_saved
from trainer.data.rows.fields import fields_of
from trainer.data.sources import read_documents

TYPED = ["parquet", "arrow", "arrow-file", "saved", "splits"]
FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", *TYPED]
LOOK_LIKE_MISSING = ["NA", "N/A", "None", "null", "NULL", "nan", "NaN", "<NA>", "#N/A", "n/a", "-nan"]
LOOK_LIKE_NUMBERS = ["00001", "1", "1.0", "1e5", "-0", "0x1F", "1_000", "inf", "12345678901234567890123"]
LOOK_LIKE_OTHERS = ["true", "False", "2021-03-01 10:00:00", "2021-03-01", "2021-03-01T10:00:00Z", "10:00", "[1]", "{}"]
AS_WRITTEN = [" padded ", 'quoted "twice"', "a,b\tc", "line\nline\r\nline", "é\u2028z", "#x", "\\N", "=1+1"]
VALUES = LOOK_LIKE_MISSING + LOOK_LIKE_NUMBERS + LOOK_LIKE_OTHERS + AS_WRITTEN

TEXT = fields_of(DataSettings(), ObjectiveSettings())


def write(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind.removesuffix('-file')}"
    if kind in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            out.writeheader()
            out.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("arrow", "arrow-file"):
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as out:
            out.write_table(table)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        half = len(rows) // 2 or 1
        parts = {"a": datasets.Dataset.from_list(rows[:half]), "b": datasets.Dataset.from_list(rows[half:])}
        datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


def texts(path: Path) -> list[tuple[str | None, str]]:
    read = rows_of_saved if path.is_dir() else rows_of_file
    asked = fields_of(DataSettings(prompt_field="ask"), ObjectiveSettings())
    return [(row.text, row.prompt) for row in read(path, asked)]


@pytest.mark.parametrize("kind", FORMATS)
def test_each_value_is_read_as_it_is_written(kind: str, tmp_path: Path) -> None:
    rows = [{"text": value, "ask": value} for value in VALUES]
    assert texts(write(kind, tmp_path, rows)) == [(value, value) for value in VALUES]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "values", [["NA"] * 3, ["007", "008"], ["2021-03-01 10:00:00"] * 2, ["true", "false"], ["1.5"]]
)
def test_a_column_of_nothing_else_is_text_as_well(kind: str, values: list[str], tmp_path: Path) -> None:
    rows = [{"text": value, "ask": value} for value in [*values, *values]]
    assert texts(write(kind, tmp_path, rows)) == [(value, value) for value in [*values, *values]]


@pytest.mark.parametrize("kind", ["jsonl", "json", *TYPED])
def test_empty_and_missing_are_counted_apart(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"text": " "}, {"text": None}, {"text": "NA"}, {"text": None}]
    documents, report = read_documents(DataSettings(source=str(write(kind, tmp_path, rows))), 0)
    assert sorted(d.text for d in documents) == ["NA", "a"]
    found = report.as_dict()
    counted = [found[f"documents_{what}"] for what in ("found", "missing", "empty")]
    assert counted == [7, 3, 2]


def test_a_key_that_is_not_there_is_missing_and_so_is_a_field_of_a_row_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n\n{"text": "a"}\n{"n": 2}\n{"text": ""}\n')
    assert list(rows_of_file(tmp_path / "rows.jsonl", TEXT)) == [(t, "", "") for t in (None, "a", None, "")]
    (tmp_path / "rows.csv").write_text('n,text\n1,a\n\n2\n3,\n4,""\n5,NA')
    assert list(rows_of_file(tmp_path / "rows.csv", TEXT)) == [(t, "", "") for t in ("a", None, "", "", "NA")]


@pytest.mark.parametrize("kind", TYPED)
@pytest.mark.parametrize(
    ("value", "name"), [(7, "int"), (1.5, "float"), (True, "bool"), (datetime(2021, 3, 1), "datetime"), (b"x", "bytes")]
)
def test_a_typed_column_that_is_not_text_stays_refused(kind: str, value: object, name: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path, [{"text": value, "ask": "a"}] * 2)
    with pytest.raises(ConfigError, match=rf"^data.text_field: 'text' of .*, row 1.* holds {name}, not text; name a"):
        texts(path)


def test_a_json_value_that_is_not_text_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for value, name in ((7, "int"), ([], "list"), ({}, "dict"), (False, "bool")):
        path.write_text('{"text": "a"}\n' * 1500 + json.dumps({"text": value}) + "\n")
        with pytest.raises(ConfigError, match=rf"rows.jsonl, line 1501, holds {name}, not text"):
            list(rows_of_file(path, TEXT))


@pytest.mark.parametrize("encoded", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_every_string_type_of_arrow_is_text(encoded: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["NA", None, "007"], pa.string()).cast(encoded)})
    path = tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    assert [row.text for row in rows_of_file(path, TEXT)] == ["NA", None, "007"]
    if encoded != pa.string_view():
        pq.write_table(table, tmp_path / "rows.parquet")
        assert [row.text for row in rows_of_file(tmp_path / "rows.parquet", TEXT)] == ["NA", None, "007"]


@pytest.mark.parametrize("saved_as", ["numpy", "pandas", "arrow"])
def test_a_saved_data_set_is_read_the_same_whatever_format_it_was_left_in(saved_as: str, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": t} for t in ("NA", None, "", "007")])
    rows.with_format(saved_as).save_to_disk(str(tmp_path / "saved"))
    assert [row.text for row in rows_of_saved(tmp_path / "saved", TEXT)] == ["NA", None, "", "007"]


def test_rows_of_json_are_objects_of_a_list_of_a_sequence_or_strings_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for written in (
        '[{"text": "2021-03-01"}, {"text": "NA"}]',
        '{"text": "2021-03-01"}\n{"text": "NA"}\n',
        '{\n "text": "2021-03-01"\n}\n{\n "text": "NA"\n}\n',
        '\ufeff["2021-03-01",\n "NA"]',
    ):
        path.write_text(written, encoding="utf-8")
        assert [row.text for row in rows_of_file(path, TEXT)] == ["2021-03-01", "NA"], written


def test_a_csv_file_may_end_its_lines_in_any_way_and_hold_very_long_fields(tmp_path: Path) -> None:
    path, long = tmp_path / "rows.csv", "x" * 300_000
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(b"\xef\xbb\xbf" + end.join(["text,n", "NA,1", f"{long},", '"a\r\nb",2,', "é,3"]).encode())
        assert [row.text for row in rows_of_file(path, TEXT)] == ["NA", long, "a\r\nb", "é"]


GOOD = json.dumps({"text": "x" * 400}).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "broken\n', "Invalid control character at column 17"),
        (b'{"text": "cut"\n', "Expecting"),
        (b'["text"]\n', "a list where an object is expected"),
        (b"null\n", "null where an object is expected"),
        (b'{"text": "half \\ud83d"}\n', "half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    ],
)
def test_a_broken_row_of_jsonl_is_named_by_its_line_however_far_in_it_is(line: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 30_000 + b"\n" + line + GOOD * 10)  # over 10 MB: what was read at once before
    with pytest.raises(DataError, match=rf"rows.jsonl.* line 30002\b.*{why}"):
        list(rows_of_file(path, TEXT))


def test_a_first_line_that_is_broken_is_named_as_well(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\n{"text": "broken\n' + GOOD)
    with pytest.raises(DataError, match=r"line 2, cannot be read"):
        list(rows_of_file(tmp_path / "rows.jsonl", TEXT))
    (tmp_path / "rows.json").write_text('[\n{"text": "a"},\n{"text": b}\n]')
    with pytest.raises(DataError, match=r"line 3, cannot be read: Expecting value at column 10"):
        list(rows_of_file(tmp_path / "rows.json", TEXT))


def test_a_broken_row_of_csv_is_named_by_the_line_it_starts_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("n,text\n" + '1,"two\nlines"\n' * 3 + "2,a,b\n3,c\n")
    with pytest.raises(DataError, match=r"rows.csv, line 8, cannot be read: 3 fields, the first row names 2 columns"):
        list(rows_of_file(path, TEXT))
    path.write_text("n,text\n" + '1,"two\nlines"\n' * 3 + '2,"never closed\n' + "3,c\n" * 5)
    with pytest.raises(DataError, match=r"rows.csv, line 8, cannot be read: a quote that opens here is never closed"):
        list(rows_of_file(path, TEXT))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_file_that_is_not_utf8_is_left_out_whole_and_its_line_named(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path, [{"text": f"text {n}"} for n in range(3000)])
    raw = path.read_bytes()
    line = raw[: raw.index(b"text 2499")].count(b"\n") + 1
    path.write_bytes(raw.replace(b"text 2499", b"caf\xe9"))
    (tmp_path / "good.txt").write_text("good")
    documents, report = read_documents(DataSettings(source=str(tmp_path)), 0)
    assert [d.text for d in documents] == ["good"]
    (skipped,) = report.skipped
    assert f"rows.{kind}: not UTF-8 (line {line}: " in skipped


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_text_of_a_typed_file_that_is_not_utf8_leaves_the_file_out_as_well(kind: str, tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"a", b"caf\xe9"], pa.binary()).view(pa.string())})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    else:
        datasets.Dataset(table).save_to_disk(str(path))
    (tmp_path / "good.txt").write_text("good")
    documents, report = read_documents(DataSettings(source=str(tmp_path)), 0)
    assert [d.text for d in documents] == ["good"]
    assert report.skipped == [f"{tmp_path.name}/rows.{kind}: not UTF-8 (unexpected end of data)"]
