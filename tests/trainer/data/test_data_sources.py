"""Every kind of source is read; what cannot be read is named; content decides the order."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import DataSettings
from trainer.data.sources import read_documents

TEXTS = [f"Text {n}, with an é and\r\nlines." for n in range(5)]


def read(source: object, seed: int = 0, **settings: object) -> list[str]:
    documents, _ = read_documents(DataSettings(source=source, **settings), seed)
    return [d.text for d in documents]


def write(kind: str, folder: Path) -> Path:
    path = folder / f"rows [1].{kind}"
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        path.write_bytes(b"n,text\r\n" + "".join(f'{r["n"]},"{r["text"]}"\r\n' for r in rows).encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_stream(file, pa.Table.from_pylist(rows).schema) as out,
        ):
            out.write_table(pa.Table.from_pylist(rows))
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    elif kind == "splits":
        parts = {"train": datasets.Dataset.from_list(rows[:3]), "test": datasets.Dataset.from_list(rows[3:])}
        datasets.DatasetDict(parts).save_to_disk(str(path))
    else:
        path = folder / "folder"
        for n, text in enumerate(TEXTS):
            (path / str(n)).mkdir(parents=True)
            (path / str(n) / "a.txt").write_bytes(text.encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "saved", "splits", "txt"])
def test_each_kind_gives_the_same_documents_in_the_same_order(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    plain = read(str(write("txt", tmp_path / "plain")))
    assert sorted(plain) == TEXTS
    assert read(str(path)) == plain


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow", "saved"])
def test_a_missing_column_names_those_there_are(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'body'; its columns are: n, text"):
        read(str(write(kind, tmp_path)), text_field="body")


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'n' of .* holds int, not text"):
        read(str(write("jsonl", tmp_path)), text_field="n")


def test_unreadable_files_are_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "again.txt").write_text("good")
    (tmp_path / "blank.md").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "package.json").write_text('{"name": "somebody"}')
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    documents, report = read_documents(DataSettings(source=str(tmp_path)), 0)
    assert [d.text for d in documents] == ["good"]
    found = report.as_dict()
    assert (found["documents_empty"], found["documents_duplicate"], found["files_of_other_kinds"]) == (
        1,
        1,
        1,
    )
    assert found["files_skipped"] == 3
    for name, why in [
        ("latin.txt", "not UTF-8"),
        ("broken.txt", "No such file"),
        ("package.json", "no rows"),
    ]:
        assert any(name in line and why in line for line in found["skipped"])


def test_a_broken_file_a_missing_path_and_an_empty_corpus_each_say_so(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read"):
        read(str(tmp_path / "rows.parquet"))
    with pytest.raises(ConfigError, match=r"data.source: .*nowhere does not exist"):
        read(str(tmp_path / "nowhere"))
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="none of the kinds"):
        read(str(tmp_path / "a.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no text in .*looked at 0 files"):
        read(str(tmp_path / "empty"))


def test_max_bytes_takes_documents_by_content_and_seed(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"{n:04d}" * 25)
    chosen = read(str(tmp_path), max_bytes=1050)
    assert len(chosen) == 10
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / f"z{path.name[::-1][4:]}-{path.stem}.txt")
    assert read(str(tmp_path), max_bytes=1050) == chosen
    assert set(read(str(tmp_path), seed=1, max_bytes=1050)) != set(chosen)


def test_the_standard_library_is_read_by_name() -> None:
    documents, _ = read_documents(DataSettings(source="python-stdlib", max_bytes=100_000), 0)
    assert all(d.source.startswith("python-stdlib/") and d.source.endswith(".py") for d in documents)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow", "saved"])
def test_prompts_come_with_their_texts_and_make_another_document(kind: str, tmp_path: Path) -> None:
    rows = [{"text": "yes", "ask": "a?"}, {"text": "yes", "ask": "b?"}, {"text": "yes", "ask": "a?"}]
    rows += [{"text": "", "ask": "c?"}, {"text": "no", "ask": None}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("text,ask\n" + "".join(f"{row['text']},{row['ask'] or ''}\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    settings = DataSettings(source=str(path), prompt_field="ask")
    documents, report = read_documents(settings, 0)
    assert sorted((d.prompt, d.text) for d in documents) == [("", "no"), ("a?", "yes"), ("b?", "yes")]
    found = report.as_dict()
    assert (found["documents_empty"], found["documents_duplicate"], found["bytes"]) == (1, 1, 12)
    with pytest.raises(ConfigError, match=r"data.prompt_field: .* no column 'body'; its columns are: ask, text"):
        read(str(path), prompt_field="body")


def test_a_prompt_field_that_gives_no_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"data.prompt_field: none of 1 documents has a prompt in 'ask'"):
        read(str(tmp_path), prompt_field="ask")
    with pytest.raises(ConfigError, match=r"data.prompt_field: 'text' is data.text_field as well"):
        read(str(tmp_path), prompt_field="text")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a", "ask": [{"role": "user"}]}) + "\n")
    with pytest.raises(ConfigError, match=r"data.prompt_field: 'ask' of .* holds list, not text"):
        read(str(rows), prompt_field="ask")
