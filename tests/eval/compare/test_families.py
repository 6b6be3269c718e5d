"""Families of documents are the clusters, from `prepare` to a verdict; sets without them are as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, table_of, vernier

from eval.compare.breakdown import breakdown
from eval.compare.pair import compare_tables
from eval.reference.set import load_reference, read_families, retokenize
from eval.statistics import clustered_ratio
from eval.tables import LossTable, read_table, write_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 texts, of which each third is the one before with another first line."""
    folder = tmp_path_factory.mktemp("families")
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(400)]
    texts: list[str] = []
    for at in range(120):
        again = at % 3 == 2
        body = texts[-1].partition("\n")[2] if again else " ".join(rng.choice(words, 120))
        texts.append(f"title {at}\n{body}")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = [f"data.source={folder / 'texts.jsonl'}", "reference.documents=60", "reference.max_fraction=0.6"]
    vernier("prepare", TINY, f"data.dir={folder / 'data'}", *settings)
    return folder / "data"


def test_prepare_keeps_the_families_and_scoring_hands_them_on(data: Path, tmp_path: Path) -> None:
    family_D = read_families(data / "reference")
    assert family_D is not None
    assert np.all(family_D <= np.arange(len(family_D)))
    assert 20 < len(np.unique(family_D)) < len(family_D)
    assert np.max(np.bincount(family_D)) == 2
    run = tmp_path / "run"
    vernier("train", TINY, f"data.dir={data}", f"run.dir={run}", "steps=4", "snapshot.every=2")
    table = read_table(table_of(run, 4))
    assert table.family is not None
    assert np.array_equal(table.family, family_D[table.document])
    own = clustered_ratio(table.loss, table.tokens, table.family)
    by_document = clustered_ratio(table.loss, table.tokens, table.document)
    content = json.loads(vernier("compare", run, "--json").stdout)["checkpoints"][-1]
    assert content["se"] == pytest.approx(own.se, rel=1e-12)
    assert content["se"] != pytest.approx(by_document.se, rel=1e-3)
    found = content["versus_previous"]
    assert found["a"]["documents"] == len(family_D)
    assert found["difference"]["clusters"] == len(np.unique(family_D))
    said = vernier("compare", f"{run}@2", f"{run}@4").stdout
    assert f"clustered by family: {len(np.unique(family_D))} of {len(family_D)} documents" in said
    assert f"families of {len(family_D)} documents" not in said


def test_another_tokenizer_leaves_the_families(data: Path, tmp_path: Path) -> None:
    made = retokenize(data / "reference", data / "tokenizer", tmp_path / "again", sequence_length=32)
    again = read_families(tmp_path / "again")
    assert again is not None
    assert np.array_equal(again, read_families(data / "reference"))
    assert made.family is not None
    assert np.array_equal(made.family, again[made.document])


def test_a_set_without_families_is_read_as_before(tiny_data: Path) -> None:
    reference = load_reference(tiny_data / "reference")
    family_D = read_families(tiny_data / "reference")
    assert (reference.family is None) == (family_D is None)


def tables() -> tuple[LossTable, LossTable, np.ndarray]:
    rng = np.random.default_rng(1)
    document = np.repeat(np.arange(90), 3)
    family = document - document % 2
    tokens = rng.integers(50, 60, 270).astype(np.int32)
    a = rng.gamma(4, 30, 270)
    b = a * 0.99 + rng.normal(0, 2, 45)[family // 2]
    meta = {"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32"}
    sample = np.arange(270)
    both = [LossTable(sample, document, tokens, 4 * tokens, loss, meta=meta) for loss in (a, b)]
    return both[0], both[1], family


def test_one_table_that_knows_them_is_enough(tmp_path: Path) -> None:
    a, b, family = tables()
    plain = compare_tables(a, b)
    assert plain.difference.clusters == 90
    for pair in ((replace(a, family=family), b), (a, replace(b, family=family))):
        found = compare_tables(*pair)
        assert (found.difference.clusters, found.a.documents) == (45, 90)
        assert found.difference.se_percent > 1.2 * plain.difference.se_percent
        in_bits = compare_tables(*pair, in_bits=True)
        assert in_bits.difference.clusters == 45
        assert in_bits.difference.t == pytest.approx(found.difference.t, rel=0.1)
    rows = breakdown(replace(a, family=family), b, "length", sources=None, sequence_length=None).rows
    assert sum(row.documents for row in rows) == 90
    write_table(tmp_path / "a.parquet", replace(a, family=family))
    assert np.array_equal(read_table(tmp_path / "a.parquet").cluster, family)
