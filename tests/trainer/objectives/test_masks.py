"""What a masked LM is asked: how much, what stands there instead, and that windows alone decide it."""

import math
from pathlib import Path

import numpy as np
import pytest

from eval.scoring.losses import IGNORED
from eval.scoring.masked import SpecialIds
from trainer.objectives.masked import asked_for, mask_rows

SPECIAL = SpecialIds(cls=0, sep=2, mask=3, pad=1, ordinary=np.arange(10, 510))
TOKENS, ROWS = 500, 2100


def rows(seed: int = 0, count: int = ROWS, tokens: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 510, (count, tokens + 1))


def masked(given: np.ndarray, **settings) -> tuple[np.ndarray, np.ndarray]:
    can = settings.pop("can", np.ones((len(given), given.shape[1] - 1), bool))
    seeds = settings.pop("seeds", np.arange(len(given), dtype=np.uint64))
    return mask_rows(given, can, seeds, SPECIAL, settings.pop("ratio", 0.15), **settings)


def within(found: float, wanted: float, tries: int) -> bool:
    return abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / tries)


def test_of_a_million_tokens_15_percent_are_asked_for_and_80_10_10_are_as_bert_has_them() -> None:
    given = rows()
    ids, target = masked(given)
    asked, was = target[:, 1:-1] != IGNORED, given[:, 1:]
    assert given[:, 1:].size > 1e6
    assert within(asked.mean(), 0.15, asked.size)
    assert (target[:, 1:-1][asked] == was[asked]).all()
    shown, before = ids[:, 1:-1][asked], was[asked]
    mask, same = shown == SPECIAL.mask, shown == before
    assert within(mask.mean(), 0.8, asked.sum())
    random = 1 / len(SPECIAL.ordinary)  # a random token may be the one that was there
    assert within(same.mean(), 0.1 + 0.1 * random, asked.sum())
    assert within((~mask & ~same).mean(), 0.1 * (1 - random), asked.sum())
    assert (ids[:, 1:-1][~asked] == was[~asked]).all()
    # Every place and every token is asked for alike.
    assert asked.mean(0).std() < 1.3 * math.sqrt(0.15 * 0.85 / ROWS)
    assert np.bincount(shown[~mask & ~same], minlength=510)[10:].min() > 0
    assert (ids[:, 0] == SPECIAL.cls).all()
    assert (ids[:, -1] == SPECIAL.sep).all()


def test_a_windows_mask_is_its_own_in_any_company_and_another_each_time() -> None:
    given = rows(count=8)
    whole = masked(given)
    for row in range(8):
        alone = masked(given[row : row + 1], seeds=np.array([row], np.uint64))
        assert (alone[0] == whole[0][row]).all()
        assert (alone[1] == whole[1][row]).all()
    again = masked(given, seeds=np.arange(8, 16, dtype=np.uint64))
    assert ((again[1] != IGNORED) != (whole[1] != IGNORED)).any(1).all()


def test_special_tokens_are_never_asked_for_and_a_window_of_them_has_no_target() -> None:
    given = rows(count=50, tokens=40)
    given[:, 5::7] = SPECIAL.sep
    given[-1] = SPECIAL.sep
    can = given[:, 1:] >= 10
    ids, target = masked(given, can=can)
    assert not (target[:, 1:-1][~can] != IGNORED).any()
    assert ((target != IGNORED).sum(1) == asked_for(can.sum(1), 0.15)).all()
    assert (target[-1] == IGNORED).all()
    assert (ids[:, 1:-1][~can] == given[:, 1:][~can]).all()


def test_whole_words_are_asked_for_whole() -> None:
    given = rows(count=300, tokens=120)
    starts = np.random.default_rng(1).random((300, 120)) < 0.5
    _, target = masked(given, starts_BT=starts)
    asked = target[:, 1:-1] != IGNORED
    inner = ~starts
    inner[:, 0] = False
    assert (asked[:, 1:] == asked[:, :-1])[inner[:, 1:]].all()
    assert 0.11 < asked.mean() <= 0.15
    assert asked.any(1).all()


@pytest.mark.parametrize(("tokens", "wanted"), [(0, 0), (1, 1), (3, 1), (10, 2), (64, 10), (510, 77)])
def test_how_many_are_asked_for(tokens: int, wanted: int) -> None:
    assert asked_for(np.array([tokens]), 0.15).tolist() == [wanted]


def test_words_begin_where_the_tokenizer_marks_a_blank(tmp_path: Path) -> None:
    from trainer.data.tokenizer import make_tokenizer
    from trainer.objectives.masked import word_starts

    made = make_tokenizer(tmp_path / "t", ["one two three two one\nthree"] * 40, given=None, vocab_size=280, masks=True)
    starts = word_starts(tmp_path / "t")
    (ids,) = made.encode([" two three"])
    assert starts[ids].sum() == 2
    assert starts[ids[0]]
    assert made.special["cls_token"] == made.special["bos_token"] == 0
    assert made.special["mask_token"] == 3
