"""A comparison taken apart: by source, by length of document, by place in the window."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_compare import a_table

from configs.errors import DataError
from eval.compare.breakdown import breakdown, group_sources
from eval.statistics import holm, paired_difference
from eval.tables import LossTable
from launcher.compare.breakdown import print_breakdown

DOCUMENTS = 120
SOURCES = ["lib/test/a.py"] * 60 + ["lib/xml/a.py"] * 50 + [f"lib/{i}.py" for i in range(10)]


def a_pair(**meta: Any) -> tuple[LossTable, LossTable]:
    """Documents of 1, 2 or 3 windows of 64; B is 2 % better on `lib/test`, and on late targets besides."""
    rng = np.random.default_rng(3)
    document = np.repeat(np.arange(DOCUMENTS), 1 + np.arange(DOCUMENTS) % 3)
    count = len(document)
    position_tokens = np.full((count, 16), 4, np.int32)
    position_loss = 4 * rng.normal(2.5, 0.3, (count, 16))
    better = np.where(document < 60, 0.98, 1.0)[:, None] * np.where(np.arange(16) >= 12, 0.99, 1.0)
    other = position_loss * better * rng.normal(1, 0.002, (count, 16))
    made = [
        LossTable(
            sample=np.arange(count),
            document=document,
            tokens=np.full(count, 64, np.int32),
            bytes=np.full(count, 200, np.int32),
            loss=losses.sum(1),
            position_loss=losses,
            position_tokens=position_tokens,
            meta={"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32", **meta},
        )
        for losses in (position_loss, other)
    ]
    return made[0], replace(made[1], meta={**made[1].meta, "label": "after"})


def test_the_source_that_changed_is_found_and_small_ones_are_joined() -> None:
    a, b = a_pair()
    found = breakdown(a, b, "source", sources=SOURCES, sequence_length=64)
    assert [(row.label, row.documents) for row in found.rows] == [("lib/test", 60), ("lib/xml", 50), ("others", 10)]
    test, xml, others = found.rows
    assert test.percent == pytest.approx(-2.25, abs=0.05)
    assert xml.percent == pytest.approx(-0.25, abs=0.05)
    assert test.p_holm < 1e-12
    assert test.ci95[1] < xml.ci95[0]
    assert sum(row.samples for row in found.rows) == len(a)
    assert sum(row.tokens for row in found.rows) == a.tokens.sum()
    assert [row.p_holm for row in found.rows] == pytest.approx(holm([test.p, xml.p, others.p]))


def test_a_row_is_the_clustered_paired_difference_of_its_samples() -> None:
    a, b = a_pair()
    row = breakdown(a, b, "source", sources=SOURCES, sequence_length=64).rows[0]
    mine = a.document < 60
    alone = paired_difference(a.loss[mine], b.loss[mine], a.tokens[mine], a.document[mine])
    assert (row.loss_a, row.loss_b) == (alone.a.value, alone.b.value)
    assert (row.percent, row.se_percent) == (alone.percent, alone.se_percent)
    assert row.ci95[0] < alone.ci95_percent[0] < alone.ci95_percent[1] < row.ci95[1]  # all rows together
    assert (row.p, row.win_rate) == (alone.p, alone.win_rate)


def test_by_length_each_document_is_in_one_bin_of_its_own_scored_tokens() -> None:
    a, b = a_pair()
    found = breakdown(a, b, "length", sources=None, sequence_length=None)
    assert [row.label for row in found.rows] == ["64 tokens", "128 tokens", "192 tokens"]
    assert [row.documents for row in found.rows] == [40, 40, 40]
    assert [row.samples for row in found.rows] == [40, 80, 120]
    assert "whole document" in found.notes[0]


def test_by_position_bins_are_named_by_the_tokens_that_they_span() -> None:
    a, b = a_pair()
    found = breakdown(a, b, "position", sources=None, sequence_length=64)
    assert [row.label for row in found.rows[:2]] == ["tokens 1–4", "tokens 5–8"]
    assert found.rows[-1].label == "tokens 61–64"
    assert {row.documents for row in found.rows} == {DOCUMENTS}
    early, late = (np.mean([row.percent for row in rows]) for rows in (found.rows[:12], found.rows[12:]))
    assert late == pytest.approx(early - 1, abs=0.1)
    uneven = breakdown(a, b, "position", sources=None, sequence_length=40)
    assert [row.label for row in uneven.rows[:3]] == ["tokens 1–3", "tokens 4–5", "tokens 6–8"]
    assert breakdown(a, b, "position", sources=None, sequence_length=None).rows[0].label == "bin 1 of 16"


@pytest.mark.parametrize(
    ("by", "change", "sources", "said"),
    [
        ("colour", {}, None, "'colour' is none of source, length, position"),
        ("source", {}, None, "needs the sources"),
        ("source", {}, ["one"], "1 sources for 120 documents"),
        ("position", {"position_loss": None}, None, "has no losses by position"),
        ("length", {"meta": {"reference": "other", "reference_text": "t", "objective": "causal"}}, None, "tokenizers"),
    ],
)
def test_what_cannot_be_told_is_refused_in_a_line(by: str, change: dict, sources: list[str] | None, said: str) -> None:
    a, b = a_pair()
    with pytest.raises(DataError, match=said) as caught:
        breakdown(a, replace(b, **change), by, sources=sources, sequence_length=64)
    assert "\n" not in str(caught.value)


def test_few_documents_have_an_interval_without_end_and_json_says_null() -> None:
    a, b = a_pair()
    sources = ["few/x"] * 3 + ["many/y"] * (DOCUMENTS - 3)
    found = breakdown(a, b, "source", sources=sources, sequence_length=64)
    assert {row.label: row.documents for row in found.rows} == {"many/y": DOCUMENTS - 3, "others": 3}
    assert found.rows[-1].to_json()["ci95"] == [None, None]
    keep = a.document < 5
    few = [
        replace(
            t,
            **{n: getattr(t, n)[keep] for n in ("sample", "document", "tokens", "bytes", "loss")},
            position_loss=None,
            position_tokens=None,
        )
        for t in (a, b)
    ]
    content = breakdown(*few, "length", sources=None, sequence_length=None).to_json()
    assert content["rows"][0]["ci95"] == [None, None]
    json.dumps(content, allow_nan=False)


def test_sources_are_grouped_by_folder_whatever_they_look_like() -> None:
    assert group_sources([f"corpus.jsonl#{i}" for i in range(9)]) == ["corpus.jsonl"] * 9
    books = [f"books/{i}.txt" for i in range(8)] + [f"web/{'ab'[i > 6]}/{i}" for i in range(14)] + ["web/c", "x"]
    books += [f"web/{i}" for i in range(9)]
    # One document alone has no error bar, so the smallest group joins it.
    assert Counter(group_sources(books)) == {"books": 8, "web/a": 7, "others": 8, "web (rest)": 10}
    urls = [f"https://a.org/x/{i}" for i in range(6)] + [f"https://b.org/y/{i}" for i in range(6)]
    assert group_sources(urls) == ["a.org/x"] * 6 + ["b.org/y"] * 6
    far = [f"/data/all/code/{'abc'[i % 3]}/{i}.py" for i in range(60)]
    assert set(group_sources(far)) == {"code/a", "code/b", "code/c"}
    many = group_sources([f"x/{i % 40}/f" for i in range(400)])
    assert len(set(many)) == 12
    assert many.count("others") == 400 - 11 * 10


def test_the_table_names_parts_changes_and_notes() -> None:
    a, b = a_pair()
    console = Console(width=60, record=True)
    print_breakdown(breakdown(a, b, "source", sources=SOURCES, sequence_length=64), console)
    text = console.export_text()
    assert "by source, after against A" in text
    assert "lib/xml" in text
    assert "adjusted for the 3 rows" in text
    assert "−2.2" in text


def test_rows_that_can_show_nothing_and_groups_beyond_twelve_are_said() -> None:
    a, b = a_table(documents=96, seed=1), a_table(-0.1, documents=96, seed=2)
    sources = [f"corpus/{at // 6:02d}/x.txt" for at in range(96)]
    notes = breakdown(a, b, "source", sources=sources, sequence_length=None).notes
    assert "16 groups: all but the 11 with most documents are joined as others" in notes
    assert not any("fewer than 6" in note for note in notes)
    assert any(note.startswith("too few documents for any change to be significant among 12 rows: ") for note in notes)
