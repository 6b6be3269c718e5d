"""Families against brute force on small random documents."""

import numpy as np
import pytest

from trainer.data.families import families, joined, sharing


def brute_force(documents: list[np.ndarray], run: int) -> list[int]:
    runs = [{tuple(d[i : i + run]) for i in range(len(d) - run + 1)} for d in documents]
    label = list(range(len(documents)))
    for a in range(len(documents)):
        for b in range(a):
            if runs[a] & runs[b]:
                old, new = max(label[a], label[b]), min(label[a], label[b])
                label = [new if x == old else x for x in label]
    return label


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("run", [1, 2, 3, 5, 6])
def test_families_are_those_of_brute_force(seed: int, run: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 25, 12)
    documents = [draw.integers(0, 3 + 4 * (seed % 3), n).astype(np.uint32) for n in lengths]
    assert families(*joined(documents), run).tolist() == brute_force(documents, run)
    a, b = documents[:6], documents[6:]
    label = [
        any(tuple(x[i : i + run]) == tuple(y[j : j + run]) for y in b for j in range(len(y) - run + 1)
            for i in range(len(x) - run + 1))
        for x in a
    ]  # fmt: skip
    assert sharing(*joined(a), *joined(b), run).tolist() == label


def test_a_run_of_fifty_links_and_one_of_forty_nine_does_not() -> None:
    draw = np.random.default_rng(0)
    a, b, c = (draw.integers(0, 5000, 300).astype(np.uint32) for _ in range(3))
    b[100:150] = a[7:57]
    c[100:149] = a[107:156]
    assert families(*joined([a, c, b]), 50).tolist() == [0, 1, 0]
