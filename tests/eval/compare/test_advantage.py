"""The advantage that a challenger needs over an incumbent, by the incumbent's age."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from configs.errors import ConfigError
from eval.compare.advantage import duration_words, enough_from_s, judge_advantage, needed_percent, parse_duration_s
from eval.compare.pair import Comparison, Side
from eval.statistics import paired_difference
from launcher.compare.advantage import say_advantage

DAY = 86_400


def comparison(change: float) -> Comparison:
    """B against A over 400 documents, lower by `change` of the loss, give or take .05 %."""
    rng = np.random.default_rng(0)
    a = rng.normal(2.2, 0.3, 400)
    found = paired_difference(a, a * (1 + change + rng.normal(0, 0.005, 400)), np.ones(400), np.arange(400))
    sides = [Side(name, e.value, e.se, 400, 400, 400) for name, e in (("old", found.a), ("new", found.b))]
    return Comparison(sides[0], sides[1], found, 0.05, "nats per token", "sample", "r" * 64)


def said(change: float, *rule: str, json_out: bool = False) -> tuple[int, str]:
    out = io.StringIO()
    code = say_advantage(comparison(change), *rule, json_out=json_out, console=Console(file=out, highlight=False))
    return code, out.getvalue()


def test_the_advantage_halves_with_every_half_life() -> None:
    assert needed_percent(0.4, 7 * DAY, 0) == 0.4
    assert needed_percent(0.4, 7 * DAY, 7 * DAY) == pytest.approx(0.2)
    assert needed_percent(0.4, 7 * DAY, 14 * DAY) == pytest.approx(0.1)
    assert needed_percent(0.4, 60, 1e12) == 0.0


def test_the_age_at_which_a_gain_is_enough_is_where_the_two_meet() -> None:
    age = enough_from_s(0.4, 7 * DAY, 0.13)
    assert age is not None
    assert needed_percent(0.4, 7 * DAY, age) == pytest.approx(0.13)
    assert enough_from_s(0.4, 7 * DAY, 0.5) == 0.0
    assert enough_from_s(0.4, 7 * DAY, 0.0) is None
    assert enough_from_s(0.0, 7 * DAY, 0.1) == 0.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("90m", 5400), ("36h", 129_600), ("7d", 7 * DAY), ("2w", 14 * DAY), ("1.5 d", 1.5 * DAY)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text, "--age") == seconds


def test_durations_are_said_in_a_unit_of_their_size() -> None:
    assert [duration_words(s) for s in (0, 5400, 129_600, 7 * DAY, 21 * DAY, 7000 * DAY)] == [
        "0 minutes",
        "1.5 hours",
        "1.5 days",
        "7 days",
        "3 weeks",
        "1,000 weeks",
    ]


def test_the_bound_of_the_interval_decides_and_not_the_estimate() -> None:
    found = judge_advantage((-0.30, -0.08), -0.19, "0.4%", "7d", "14d")
    assert found.needed_percent == pytest.approx(0.1)
    assert not found.holds
    assert judge_advantage((-0.30, -0.11), -0.19, "0.4 %", "7d", "14d").holds


def test_a_challenger_that_gains_enough_holds_with_exit_code_0() -> None:
    code, told = said(-0.01, "0.4%", "7d", "3d")
    assert code == 0
    assert "advantage holds: at an age of 3 days old asks for a gain of more than 0.297 %" in told
    assert "new gains" in told


def test_one_that_gains_too_little_yet_hears_when_it_would_do() -> None:
    code, told = said(-0.002, "0.4%", "7d", "0d")
    assert code == 3
    assert "does not hold" in told
    assert "that is enough once old is older than" in told


def test_one_that_is_not_better_hears_that_no_age_would_do() -> None:
    code, told = said(0.01, "0.4%", "7d", "520w")
    assert code == 3
    assert "new is not known to gain anything" in told
    assert "no age of old would make that enough" in told


def test_json_has_the_comparison_and_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(-0.002, "0.4%", "7d", "0d", json_out=True)[0] == 3
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert told["advantage"]["holds"] is False
    assert told["advantage"]["needed_percent"] == 0.4
    assert told["advantage"]["gain_lower95_percent"] == -told["difference"]["ci95_percent"][1]
    assert told["advantage"]["enough_from_age_s"] > 0
    assert "does not hold" in out.err


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (("lots", "7d", "1d"), "--advantage: 'lots' is not a percentage"),
        (("-1%", "7d", "1d"), "--advantage: '-1%' is not a percentage"),
        (("nan%", "7d", "1d"), "--advantage: 'nan%' is not a percentage"),
        (("1%", "7", "1d"), "--half-life: '7' is not a duration"),
        (("1%", "0h", "1d"), "--half-life: '0h' is no time at all"),
        (("1%", "7d", "-1d"), "--age: '-1d' is not a duration"),
        (("1%", "7d", "a while"), "--age: 'a while' is not a duration"),
    ],
)
def test_what_is_no_percentage_or_duration_is_refused_in_a_line(rule: tuple[str, str, str], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        said(-0.01, *rule)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
