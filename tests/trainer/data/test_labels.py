"""Labels are part of what data and reference sets are: other labels of the same texts are another set."""

import json
from pathlib import Path

from conftest import vernier
from made_rows import write_jsonl

from configs.run.facts import read_dataset_facts

SMALL = ["objective.name=classify", "sequence_length=32", "data.vocab_size=300", "reference.documents=10"]
MODEL = "model={type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 40}"


def prepared(folder: Path, labels: str) -> dict:
    rows = [{"text": f"text number {at} of {at * 7}", "label": labels[at % len(labels)]} for at in range(60)]
    source = write_jsonl(folder / f"{labels}.jsonl", rows)
    data = folder / labels
    vernier("prepare", "tests/tiny.yaml", *SMALL, MODEL, f"data.source={source}", f"data.dir={data}")
    return read_dataset_facts(data / "dataset.json")


def test_other_labels_make_other_fingerprints_and_are_counted(tmp_path: Path) -> None:
    one, other = prepared(tmp_path, "ab"), prepared(tmp_path, "ba")
    assert one["labels"]["names"] == ["a", "b"]
    assert sum(one["labels"]["counts"]) == one["train"]["documents"]
    for name in ("data", "reference_text", "reference_tokens"):
        assert one["fingerprints"][name] != other["fingerprints"][name]
    assert one["fingerprints"]["tokenizer"] == other["fingerprints"]["tokenizer"]


def test_one_text_with_two_labels_is_told(tmp_path: Path) -> None:
    rows = [{"text": f"text {at // 2}", "label": "ab"[(at + at // 2) % 2]} for at in range(80)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    where = [f"data.source={source}", f"data.dir={tmp_path / 'data'}", "objective.labels=[a, b]"]
    said = vernier("prepare", "tests/tiny.yaml", *SMALL, MODEL, *where).stdout
    assert "40 of these with another label than the one that stays" in said
    facts = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert facts["read"]["duplicates_with_another_label"] == 40
