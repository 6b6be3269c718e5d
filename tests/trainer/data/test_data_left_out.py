"""Whatever is in a source and is not read is counted and named, on the terminal and in `dataset.json`."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import DataSettings
from trainer.data.read_report import ReadReport, left_out
from trainer.data.sources import read_documents

GOOD = '{"text": "good"}\n'


def told(source: Path) -> tuple[list[str], ReadReport]:
    documents, report = read_documents(DataSettings(source=str(source)), 0)
    assert [d.text for d in documents] == ["good"]
    return list(left_out(json.loads(json.dumps(report.as_dict())), "text")), report


def test_files_of_kinds_that_are_not_read_are_named_then_counted(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    (source / "val.jsonl").write_text(GOOD)
    for n in range(2):
        with gzip.open(source / f"a{n}.jsonl.gz", "wt") as file:
            file.write(GOOD)
    lines, _ = told(source)
    assert lines == [
        "2 files of kinds that are not read",
        "not read: shards/a0.jsonl.gz, shards/a1.jsonl.gz",
    ]
    for n in range(30):
        (source / f"b{n:02}.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (source / "README").write_text("no suffix")
    lines, report = told(source)
    assert lines[0] == "33 files of kinds that are not read"
    assert lines[1].endswith("a1.jsonl.gz, shards/b00.jsonl.zst and 29 more")
    found = report.as_dict()
    assert found["files_of_other_kinds"] == 33
    assert len(found["other_kinds"]) == 20
    assert found["other_suffixes"] == {".zst": 30, ".gz": 2, "": 1}


def test_hidden_files_and_linked_folders_are_counted(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for folder in (source, elsewhere, source / ".git", source / "__pycache__"):
        folder.mkdir()
        (folder / "rows.jsonl").write_text(GOOD)
    (source / ".hidden.txt").write_text("hidden")
    (source / "linked").symlink_to(elsewhere)
    lines, report = told(source)
    assert lines == [
        "1 linked folders, 3 hidden files and folders",
        "links, not followed: source/linked",
    ]
    assert report.as_dict()["hidden"] == 3


def test_files_without_rows_are_fine_and_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.jsonl").write_text(GOOD)
    (source / "empty.jsonl").write_text("")
    (source / "blank.jsonl").write_text("\n \n")
    (source / "list.json").write_text("[]\n")
    (source / "header.csv").write_text("text\n")
    (source / "other-header.tsv").write_text("a\tb\n")
    none = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(none, source / "none.parquet")
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), source / "none-of-others.parquet")
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(source / name), "wb") as file, new(file, none.schema):
            pass
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(source / "saved"))
    some, nothing = datasets.Dataset.from_dict({"text": ["good"]}), datasets.Dataset.from_dict({"text": []})
    datasets.DatasetDict({"train": some, "test": nothing}).save_to_disk(str(tmp_path / "splits"))
    assert told(tmp_path / "splits")[0] == ["nothing"]
    lines, report = told(source)
    assert sorted(Path(name).name for name in report.without_rows) == sorted(
        p.name for p in source.iterdir() if p.name != "good.jsonl"
    )
    assert lines[0] == "10 files with no rows in them"
    assert lines[1].startswith("no rows in: source/blank.jsonl, ")
    assert lines[1].endswith(" and 6 more")


def test_an_empty_shard_among_full_ones_takes_nothing_from_them(tmp_path: Path) -> None:
    texts = ["a", "b", "c"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "part-0.parquet")
    with pq.ParquetWriter(tmp_path / "part-1.parquet", pa.schema({"text": pa.string()})) as out:
        out.write_table(pa.table({"text": pa.array([], pa.string())}))
        out.write_table(pa.table({"text": ["d"]}))
    documents, report = read_documents(DataSettings(source=str(tmp_path)), 0)
    assert sorted(d.text for d in documents) == [*texts, "d"]
    assert report.without_rows == []


def test_a_source_with_nothing_to_read_names_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of other kinds; the first: .*/a.jsonl.gz"):
        read_documents(DataSettings(source=str(tmp_path)), 0)
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"2 documents, 1 of them empty, 1 without 'text'"):
        read_documents(DataSettings(source=str(tmp_path)), 0)


def test_a_broken_json_file_in_a_folder_is_not_said_to_lack_a_column(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "tsconfig.json").write_text("{ // a comment\n}")
    lines, _ = told(tmp_path)
    assert lines == ["1 files not readable", f"{tmp_path.name}/tsconfig.json: not JSON"]
    with pytest.raises(ConfigError, match=r"tsconfig.json, line 1, cannot be read"):
        read_documents(DataSettings(source=str(tmp_path / "tsconfig.json")), 0)


def test_missing_and_empty_are_told_apart_and_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + '{"text": null}\n{"n": 1}\n{"text": ""}\n')
    lines, _ = told(tmp_path)
    assert lines == ["2 without 'text' (null or not there), 1 empty"]
    for n in range(25):
        (tmp_path / f"{n}.txt").write_bytes(b"\xff")
    lines, _ = told(tmp_path)
    assert len(lines) == 22
    assert lines[-1] == "and 5 more that are not readable"


def test_nothing_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    assert told(tmp_path)[0] == ["nothing"]
