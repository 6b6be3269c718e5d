"""What settings asked for and sources did not give is said when the data is prepared, and where training is checked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import dump_config
from configs.schema import Config
from eval.reference.set import retokenize
from trainer.check import check_run
from trainer.data.prepare import load_dataset_facts, prepare
from trainer.data.split import fewest_windows


def config(tmp_path: Path, documents: int, **changes: Any) -> Config:
    source = tmp_path / "corpus.jsonl"
    draw = np.random.default_rng(0)
    rows = [" ".join(f"w{k}" for k in draw.integers(0, 3000, 60)) for _ in range(documents)]
    source.write_text(
        "".join(json.dumps({"text": row, "ask": "?" if n else None}) + "\n" for n, row in enumerate(rows))
    )
    return Config.model_validate(
        {
            "name": "t",
            "steps": 1,
            "sequence_length": 32,
            "model": {"type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            "batch": {"global": 2},
            "data": {"source": str(source), "dir": tmp_path / "out", "vocab_size": 300, **changes.pop("data", {})},
            "reference": {"documents": 50, "max_fraction": 0.5, "max_windows": 8, **changes.pop("reference", {})},
            "run": {"dir": tmp_path / "run"},
            **changes,
        }
    )


def unmet(asked: Config) -> list[str]:
    facts = prepare(asked, say=lambda _: None)
    assert load_dataset_facts(asked.data_dir)["unmet"] == facts["unmet"]
    return list(facts["unmet"])


def test_what_is_given_as_asked_for_needs_no_word(tmp_path: Path) -> None:
    assert unmet(config(tmp_path, 200)) == []


def test_fewer_reference_documents_than_asked_for_are_said(tmp_path: Path) -> None:
    (line,) = unmet(config(tmp_path, 200, reference={"documents": 20_480, "max_fraction": 0.3}))
    start, _, rest = line.partition(" taken, with ")
    assert start.startswith("reference.documents: 20,480 asked for, 60")
    assert rest.endswith("(reference.max_fraction allows 30 %); give more documents, or raise reference.max_fraction")


def test_families_too_large_to_take_are_named_as_the_cause(tmp_path: Path) -> None:
    asked = config(tmp_path, 200, reference={"documents": 90, "max_fraction": 0.5})
    shared = " ".join(f"x{k}" for k in range(60))
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    for row in rows[50:]:
        row["text"] += f" {shared}"
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line,) = unmet(asked)
    assert "90 asked for, 50 taken" in line
    assert "raise reference.min_shared_run: the families that are left are too large" in line


def test_fewer_than_forty_documents_are_said_to_be_few(tmp_path: Path) -> None:
    (line,) = unmet(config(tmp_path, 200, reference={"documents": 39}))
    assert line.startswith("reference: 39 documents, fewer than 40: verdicts will be weak, by sign flips")
    assert line.endswith("raise reference.documents, or lower reference.max_windows")


def test_a_smaller_vocabulary_and_rows_without_a_prompt_are_said(tmp_path: Path) -> None:
    vocabulary, prompt = unmet(config(tmp_path, 200, data={"vocab_size": 60_000, "prompt_field": "ask"}))
    assert vocabulary.startswith("data.vocab_size: 60,000 asked for, ")
    assert prompt.startswith("data.prompt_field: 1 documents have no prompt in 'ask'")


def test_prepare_prints_them_and_does_so_again_where_the_data_is_there(tmp_path: Path) -> None:
    (tmp_path / "vernier.yaml").write_text(dump_config(config(tmp_path, 200, reference={"documents": 30})))
    (tmp_path / "old.jsonl.gz").write_bytes(b"")
    sources = f"data.source=[{tmp_path / 'corpus.jsonl'},{tmp_path / 'more'}]"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "old.jsonl.zst").write_bytes(b"")
    command = [sys.executable, "-m", "launcher.cli", "prepare", str(tmp_path / "vernier.yaml"), sources]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "\ncaution    reference: 30 documents, fewer than 40" in done.stdout
        assert (
            "\nleft out   1 files of kinds that are not read\n           not read: more/old.jsonl.zst\n" in done.stdout
        )


@pytest.mark.parametrize("length", [16, 32, 64])
def test_training_in_other_windows_than_the_reference_set_is_told_and_not_refused(length: int, tmp_path: Path) -> None:
    asked = config(tmp_path, 200)
    prepare(asked, say=lambda _: None)
    said: list[str] = []
    check_run(asked.model_copy(update={"sequence_length": length}), tell=said.append)
    if length == 32:
        assert said == []
        return
    (line,) = said
    assert line.startswith(f"caution: sequence_length: training has {length}, the windows of the reference set ")
    assert "have 32: scores are of another length of context than training's" in line
    assert line.endswith(f"--sequence-length {length} --out NEW_DIR")
    retokenize(tmp_path / "out" / "reference", tmp_path / "out" / "tokenizer", tmp_path / "new", sequence_length=length)
    other = asked.eval.model_copy(update={"reference": tmp_path / "new"})
    said.clear()
    check_run(asked.model_copy(update={"sequence_length": length, "eval": other}), tell=said.append)
    assert said == []


def test_windows_left_open_are_as_few_as_make_the_samples_aimed_at() -> None:
    long = np.full(30_000, 1000)
    assert fewest_windows(long, 128) == 1
    assert fewest_windows(long[:7000], 128) == 3
    assert fewest_windows(long[:100], 128) == 16
    assert fewest_windows(np.full(7000, 100), 128) == 16  # no document has more than one
