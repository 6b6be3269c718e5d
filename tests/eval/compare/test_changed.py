"""What changed most: the right samples and documents, with the text that was scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from configs.errors import DataError
from eval.compare.most_changed import most_changed
from eval.reference.set import build_reference, load_reference, read_documents
from eval.reference.tokenizer import open_tokenizer
from eval.tables import LossTable
from launcher.compare.breakdown import print_changed

TEXTS = [
    f"Number {i}:\n\tthe naïve façade of house {i} is 🙂 and " + "blue, " * (3 * i) + f"\x1b[31m end {i}"
    for i in range(12)
]


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("changed") / "reference"
    tokenizer = open_tokenizer(tiny_data / "reference" / "tokenizer", "tokenizer")
    sources = [f"houses/{i}.txt" for i in range(len(TEXTS))]
    build_reference(
        directory,
        sources,
        TEXTS,
        tokenizer,
        name="houses",
        sequence_length=32,
        batch=4,
        block_samples=8,
        max_windows=None,
    )
    return directory


def a_pair(reference: Path) -> tuple[LossTable, LossTable]:
    """B is as A, but sample 0 fell by 0.5 a token, and all of the last document rose by 0.25."""
    found = load_reference(reference)
    loss = found.tokens * 3.0
    a = LossTable(
        found.sample,
        found.document,
        found.tokens,
        found.bytes,
        loss,
        meta={"reference": found.tokens_fingerprint, "objective": "causal", "dtype": "fp32", "label": "before"},
    )
    change = np.where(found.sample == 0, -0.5, np.where(found.document == found.document[-1], 0.25, 0.0))
    return a, replace(a, loss=loss + change * found.tokens, meta={**a.meta, "label": "after"})


def test_those_that_changed_are_listed_and_those_that_did_not_are_not(reference: Path) -> None:
    a, b = a_pair(reference)
    found = most_changed(a, b, reference, 50)
    last = np.flatnonzero(a.document == a.document[-1])
    assert [one.sample for one in found.samples_fell] == [0]
    assert sorted(one.sample for one in found.samples_rose) == last.tolist()
    (rose,) = found.documents_rose
    assert (rose.sample, rose.document, rose.source) == (None, 11, "houses/11.txt")
    assert (rose.loss_a, rose.loss_b, rose.change) == pytest.approx((3.0, 3.25, 0.25))
    assert rose.tokens == a.tokens[last].sum()
    assert len(most_changed(a, b, reference, 1).samples_rose) == 1


def test_the_text_of_a_sample_is_what_its_window_scored(reference: Path) -> None:
    a, b = a_pair(reference)
    found = most_changed(a, b, reference, 50)
    texts = read_documents(reference)[1]
    in_order = sorted(found.samples_rose, key=lambda one: one.sample or 0)
    assert len(in_order) > 2
    assert "".join(one.text for one in in_order) == texts[11]
    assert texts[0].startswith(found.samples_fell[0].text)
    assert len(found.documents_rose[0].text) <= 300
    json.dumps(found.to_json(), allow_nan=False)


def test_on_the_terminal_a_text_is_one_line_and_steers_nothing(reference: Path) -> None:
    a, b = a_pair(reference)
    console = Console(width=80, record=True)
    print_changed(most_changed(a, b, reference, 5), console)
    text = console.export_text(styles=True)
    assert "Number 0:\\n\\tthe naïve façade" in text
    assert "\x1b[31m end" not in text
    assert "documents whose loss rose most, before → after" in text
    print_changed(most_changed(a, a, reference, 5), console)
    assert "no samples whose loss fell" in console.export_text()


def test_another_reference_set_is_refused_in_a_line(reference: Path, tiny_data: Path, tmp_path: Path) -> None:
    a, b = a_pair(reference)
    with pytest.raises(DataError, match="scored on reference set") as caught:
        most_changed(a, b, tiny_data / "reference", 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="missing"):
        most_changed(a, b, tmp_path, 3)
    with pytest.raises(DataError, match="0 is not a number"):
        most_changed(a, b, reference, 0)
