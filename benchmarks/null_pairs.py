"""Pairs of runs that differ in nothing anybody would call a change: how often they are called different, and as what.

Part of `python -m benchmarks.family`. What a sentence claims is counted, not what a reader may make of it: "these
weights are better" of two seeds is true; "the recipe is better", "beyond what twins differ by" would not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np

from configs.errors import ConfigError
from eval.compare.gate import Question, gate_holds, upper_bound
from eval.compare.recipes import compare_groups, noise_of_seeds
from eval.compare.twins import noise_of_run
from eval.curves.pairing import read_curve
from eval.curves.twins import twins_of
from eval.tables import mean_loss, read_table
from launcher.compare.options import Options
from launcher.compare.report import sentence
from launcher.compare.results import compare_pair, compare_targets

STEPS = (60, 120, 180, 240, 300, 360, 420, 480)
FROM = (1, 50, 100, 200)
AFTER = (1, 10, 50, 100, 200, 360, 480)


def null_pairs(folder: Path, twins: Sequence[tuple[str, str]]) -> None:
    """Prints, of seeds of one recipe and of runs that differ by a thousandth of a percent in their learning rate, what
    each path says."""
    seeds = [(f"{group}{i}", f"{group}{j}") for group in "sq" for i, j in combinations(range(1, 6), 2)]
    print("\nSeeds of one recipe (20 pairs), what the sentence claims:")
    _of_weights(folder, seeds)
    _of_recipes(folder)
    print("\nLearning rates within 0.002 % (10 pairs; 4 with s1, which has twins), what the sentence claims:")
    _of_weights(folder, twins)
    _beyond_twins(folder, [pair for pair in twins if "s1" in pair])
    _training(folder, twins)
    spread_of_twins(folder)


def _count(name: str, cases: Sequence[Any], claims: Callable[[Any], bool]) -> None:
    found = sum(map(claims, cases))
    print(f"  {name:<66}{found:>3} of {len(cases)}")


def _pair(folder: Path, pair: tuple[str, str], step: int = 480) -> Any:
    return compare_pair([f"{folder / name}@{step}" for name in pair], Options()).comparison


def _of_weights(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    found = [_pair(folder, pair) for pair in pairs]
    clear = list(filter(_is_clear, found))
    _count("compare: these weights differ (they do)", found, _is_clear)
    _count("… of these, without the words 'these weights' and a caution", clear, lambda one: not _said(one))
    _count("… as if nothing limited it (limited_by null)", clear, lambda one: one.limited_by is None)
    _count("gate --of recipe is not refused", found, lambda one: not _refused(one))


def _is_clear(one: Any) -> bool:
    return one.verdict in ("better", "worse")


def _said(one: Any) -> bool:
    return sentence(one).startswith("these weights") and any("recipe" in caution for caution in one.cautions)


def _refused(one: Any) -> bool:
    try:
        upper_bound(one, "recipe")
    except ConfigError:
        return True
    return False


def _of_recipes(folder: Path) -> None:
    halves = [
        ([f"{group}{i}" for i in a], [f"{group}{i}" for i in b])
        for group in "sq"
        for a in combinations(range(1, 6), 2)
        for b in combinations(set(range(1, 6)) - set(a), 2)
        if min(a) < min(b)
    ]
    groups = [[[str(folder / name) for name in half] for half in pair] for pair in halves]
    found = [compare_groups(a, b) for a, b in groups]
    _count("--against, two seeds and two others of one recipe", found, _is_clear)
    singles = [(f"{g}{i}", f"{g}{j}", "q" if g == "s" else "s") for g in "sq" for i, j in combinations(range(1, 6), 2)]
    carried = [
        compare_groups([str(folder / a)], [str(folder / b)], seeds_from=[f"{folder}/{other}*"])
        for a, b, other in singles
    ]
    _count("--against, one run of each, seeds' noise from the other rate", carried, _is_clear)
    board = compare_targets([str(folder / f"s{seed}") for seed in range(1, 6)], Options()).to_json()
    said = any("of one recipe" in caution for caution in board["cautions"])
    print(f"  leaderboard of s1–s5: says that they are of one recipe: {'yes' if said else 'no'}")
    noise = noise_of_seeds([f"{folder}/[sq]*"])
    print(f"  sd between seeds: {noise.percent:.2f} % ({noise.df} degrees of freedom)")


def _beyond_twins(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    found = [_pair(folder, pair, step) for pair in pairs for step in STEPS]
    _count(f"compare at {len(STEPS)} steps: these weights differ", found, _is_clear)
    _count("… and by more than chance in training does", found, lambda one: _is_clear(one) and not one.below_noise)
    both_ways = [*found, *(_pair(folder, (b, a), step) for a, b in pairs for step in STEPS)]
    for question in get_args(Question)[:2]:  # the third is refused
        _count(f"gate better --of {question}, both ways", both_ways, partial(_holds, question))


def _holds(question: Question, one: Any) -> bool:
    try:
        return gate_holds(one, "better", upper_percent=upper_bound(one, question))
    except ConfigError:  # refused, since the twins are a lower bound
        return False


def _training(folder: Path, pairs: Sequence[tuple[str, str]]) -> None:
    for first in FROM:
        options = Options(training=True, from_step=first)
        found = [(pair, compare_targets([str(folder / n) for n in pair], options).to_json()) for pair in pairs]
        told = lambda case: case[1]["verdict"] in ("lower", "higher")  # noqa: E731
        own = [case for case in found if "s1" in case[0]]
        _count(f"--training from step {first}, with s1's twins: more than twins do", own, told)
        others = [case for case in found if "s1" not in case[0]]
        _count("… without twins: these two runs on other windows", others, told)
        _count("… without twins: cannot be told", others, lambda case: case[1]["verdict"] == "cannot be told")
        silent = [case for case in others if not any("these two runs" in c for c in case[1]["cautions"])]
        if silent:
            print(f"    without a word that it is about two runs: {len(silent)}")


def spread_of_twins(folder: Path) -> None:
    """What s1 and its twins differ by, since each split: scores, and means of 20 steps of the training curve."""
    run = folder / "s1"
    noise = noise_of_run(run)
    print(f"\nTwins of s1: {noise.df} degrees of freedom, scores differ by {noise.percent:.2g} % (sd)")
    for at, twins in twins_of(run).items():
        scores = {row.since: row for row in noise.rows if row.at == at}
        told = ", ".join(f"{since}: {row.percent:.2g}" for since, row in scores.items())
        print(f"  from step {at}, {len(twins)} twins; sd of scores in % after so many steps: {told}")
        curves = [read_curve(one) for one in (run, *twins)]
        parts = []
        for since in AFTER:
            low, high = at + max(1, since - 10), at + since + 10
            means = [
                float(np.mean(c.loss_T[(c.step_T >= low) & (c.step_T < high)])) for c in curves if c.step_T[-1] >= high
            ]
            if len(means) > 1:
                parts.append(f"{since}: {100 * np.std(means, ddof=1) / np.mean(means):.2g}")
        print(f"    sd of the training loss (means of 20 steps) in %: {', '.join(parts)}")
        print(f"    cost: {len(twins)} × {int(curves[-1].step_T[-1]) - at} steps")
    seeds = [mean_loss(read_table(next((folder / f"s{s}").glob("losses/*/step-00000480@*")))) for s in range(1, 6)]
    wobble = compare_targets([str(run)], Options()).to_json()["wobble_percent"]
    near = list(combinations(["s1", "p2", "p3", "p4", "p5"], 2))
    last = [compare_pair([f"{folder / name}@last3" for name in pair], Options()).comparison for pair in near]
    alone, mean = (_sd([one.difference.percent for one in of]) for of in ([_pair(folder, p) for p in near], last))
    between = 100 * np.std(seeds, ddof=1) / np.mean(seeds)
    print(f"  beside it: wobble of s1 {wobble:.3f} %; sd of five seeds {between:.2f} %")
    print(f"  sd of one run among s1, p2–p5: at step 480 {alone:.4f} %, of the mean of the last three {mean:.4f} %")


def _sd(differences: Sequence[float]) -> float:
    """Standard deviation of one from the differences of all pairs."""
    return float(np.sqrt(np.mean(np.square(differences)) / 2))
