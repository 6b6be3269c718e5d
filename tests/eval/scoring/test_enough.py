"""When a run may end by its scores: soon where nothing is gained, never where something is, on any look of the run."""

from collections.abc import Iterator

import numpy as np

from configs.schema import StopSettings
from eval.scoring.enough import enough, level_of
from eval.tables import LossTable, mean_loss

DOCUMENTS, SEQUENCES, LOOKS = 400, 200, 20
TOKENS = 100
SETTINGS = StopSettings(gain_below="0.1%", looks=3)


def scores(seed: int, gain_percent: float, wobble_percent: float = 0.0, looks: int = LOOKS) -> list[LossTable]:
    """Tables of a run whose loss falls by so much a look, of which 0.02 % is the error of a paired difference."""
    rng = np.random.default_rng(seed)
    text_D = 4 + 0.6 * rng.standard_normal(DOCUMENTS)  # what makes a text hard drops out of differences
    out = []
    for look in range(looks):
        level = (1 - gain_percent / 100) ** look * (1 + wobble_percent / 100 * rng.standard_normal())
        loss_D = text_D * level + 0.0113 * rng.standard_normal(DOCUMENTS)
        number = np.arange(DOCUMENTS)
        tokens = np.full(DOCUMENTS, TOKENS, np.int32)
        meta = {"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32", "label": f"{look}"}
        out.append(LossTable(number, number, tokens, tokens, TOKENS * loss_D, meta=meta))
    return out


def stops(tables: list[LossTable], settings: StopSettings) -> int | None:
    """The score at which a run ends; None where it does not."""
    means = [mean_loss(table) for table in tables]
    for last in range(len(tables)):
        seen = tables[: last + 1]
        if enough(range(100, 100 * last + 200, 100), means[: last + 1], seen.__getitem__, settings):
            return last
    return None


def ends(gain: float, settings: StopSettings, wobble: float = 0.0) -> Iterator[int | None]:
    return (stops(scores(seed, gain, wobble), settings) for seed in range(SEQUENCES))


def test_without_a_gain_it_stops_at_the_first_possible_look() -> None:
    found = [stops(scores(seed, 0.0, looks=6), SETTINGS) for seed in range(SEQUENCES)]
    assert np.mean([end == SETTINGS.looks for end in found]) >= 0.95


def test_with_a_gain_it_never_stops_and_patience_does_where_scores_are_noisy() -> None:
    assert not any(ends(0.05, SETTINGS))
    patient = StopSettings(patience=3)
    assert not any(ends(0.05, patient))
    # The same gain in a run whose checkpoints wobble by 0.1 %: the means err in most of them.
    assert np.mean([end is not None for end in ends(0.05, patient, wobble=0.1)]) > 0.6
    assert np.mean([end is not None for end in ends(0.05, SETTINGS, wobble=0.1)]) < 0.2


def test_the_share_of_each_look_is_spent_once() -> None:
    assert sum(level_of(look) for look in range(1, 100_000)) <= 0.05
    assert level_of(1) > 0.03


def test_patience_says_what_it_does_not_know() -> None:
    tables = scores(0, 0.0, looks=8)
    means = [mean_loss(table) for table in tables]
    means[2] = min(means) - 0.1
    said = enough(range(8), means, tables.__getitem__, StopSettings(patience=3))
    assert said is not None
    assert "which is all that patience knows" in said
