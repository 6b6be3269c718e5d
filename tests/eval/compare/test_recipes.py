"""Recipes over their seeds: paired or not, with both errors, and refused where one run of each is all there is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, vernier
from test_compare import a_table, write_run

from configs.errors import ConfigError, DataError
from eval.compare.recipes import Group, SeedNoise, compare_groups, compare_seeds
from eval.compare.sweep import seed_noise
from eval.tables import LossTable, mean_loss, read_table


def group(name: str, effects: dict[int, float]) -> tuple[Group, dict[int, LossTable]]:
    """Runs whose losses differ from the plain table by these parts of it."""
    tables = {seed: a_table(effect, seed=100 + seed) for seed, effect in effects.items()}
    losses = {seed: mean_loss(table) for seed, table in tables.items()}
    return Group(name, tuple(Path(f"{name}-{seed}") for seed in effects), losses), tables


def compared(a: dict[int, float], b: dict[int, float]):
    (one, own), (two, others) = group("a", a), group("b", b)
    return compare_seeds(one, two, own, others)


def test_what_each_pair_of_seeds_calls_better_is_no_difference_of_recipes() -> None:
    """As the audit's five seeds of two learning rates: four pairs better, one worse."""
    found = compared(
        {1: 0.02, 2: -0.01, 3: 0.0, 4: 0.03, 5: -0.02}, {1: -0.007, 2: -0.015, 3: 0.001, 4: 0.024, 5: -0.009}
    )
    assert found.verdict == "no difference seen"
    assert found.paired == 5
    assert found.limited_by == "seeds"
    assert found.se_seeds > 10 * found.documents.difference.se_percent
    assert found.seeds_needed is not None
    assert found.seeds_needed > 5


def test_a_difference_that_all_seeds_have_is_seen_paired_and_not_unpaired() -> None:
    wide = {1: 0.03, 2: -0.02, 3: 0.0, 4: -0.04}
    paired = compared(wide, {seed: effect - 0.01 for seed, effect in wide.items()})
    assert (paired.verdict, paired.paired, paired.limited_by) == ("better", 4, None)
    low, high = paired.ci95_percent
    assert -1.2 < low < high < -0.8
    apart = compared(wide, {10 + seed: effect - 0.01 for seed, effect in wide.items()})
    assert (apart.verdict, apart.paired) == ("no difference seen", 0)
    assert any("not paired" in caution for caution in apart.cautions)
    content = paired.to_json()
    assert content["question"] == "recipe"
    json.dumps(content, allow_nan=False)


def test_seeds_of_one_recipe_are_called_different_one_time_in_twenty() -> None:
    rng, wrong = np.random.default_rng(8), 0
    for _ in range(400):
        seeds = range(1, 5)
        found = compared(
            {seed: float(rng.normal(0, 0.01)) for seed in seeds}, {seed: float(rng.normal(0, 0.01)) for seed in seeds}
        )
        wrong += found.verdict != "no difference seen"
    assert wrong / 400 <= 0.075  # 5 % and two standard errors


def test_one_run_of_a_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="b is one run; whether a recipe is better needs two seeds of each"):
        compared({1: 0.0, 2: 0.0}, {1: 0.0})


def test_noise_of_seeds_is_pooled_over_values() -> None:
    rng = np.random.default_rng(2)
    draws = []
    for _ in range(300):
        losses = {str(v): {s: 2 + 0.1 * v + 0.2 * s + rng.normal(0, 0.01) for s in range(3)} for v in range(6)}
        found = seed_noise(losses)
        assert found is not None
        assert found[1] == 10  # (6 − 1)·(3 − 1)
        draws.append(found[0] ** 2)
    assert np.mean(draws) == pytest.approx(1e-4, rel=0.1)
    assert seed_noise({"a": {1: 2.0}, "b": {1: 2.1}}) is None
    assert seed_noise({"a": {1: 2.0, 2: 2.1}, "b": {1: 2.1}}) is None


def written(folder: Path, name: str, seed: int, lr: float, effect: float) -> Path:
    run = write_run(folder / name, {0: a_table(seed=seed), 10: a_table(effect, seed=50 + seed)})
    settings = yaml.safe_load((ROOT / TINY).read_text())
    settings |= {"seed": seed, "optimizer": {"lr": lr}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_groups_are_named_by_patterns_and_gates_say_what_they_are_of(tmp_path: Path) -> None:
    for seed, effect in ((1, 0.02), (2, -0.01), (3, 0.0)):
        written(tmp_path, f"a-{seed}", seed, 1e-3, effect)
        written(tmp_path, f"b-{seed}", seed, 2e-3, effect - 0.05)
    groups = ["compare", f"{tmp_path}/a-*", "--against", f"{tmp_path}/b-*"]
    said = vernier(*groups, "--gate", "better").stdout
    assert "over 3 paired seeds" in said
    assert "optimizer.lr: 0.001 → 0.002" in said
    assert "gate better, of recipes" in said
    assert "holds" in said
    content = json.loads(vernier(*groups, "--json").stdout)
    assert (content["question"], content["verdict"], content["step"]) == ("recipe", "better", 10)
    assert content["settings_changed"] == ["optimizer.lr: 0.001 → 0.002"]

    pair = ["compare", tmp_path / "a-1", tmp_path / "b-1"]
    said = vernier(*pair).stdout
    assert said.startswith("these weights: b-1@10 is better than a-1@10")
    assert "caution: one run of each: these weights are compared" in said
    content = json.loads(vernier(*pair, "--json").stdout)
    assert (content["question"], content["limited_by"]) == ("weights", "seeds unknown")
    assert content["origin"] == {"of": "two runs", "settings_changed": ["optimizer.lr: 0.001 → 0.002"]}
    refused = vernier(*pair, "--gate", "better", "--of", "recipe", code=2)
    assert refused.stdout == ""
    assert "one run of each cannot tell whether a recipe is better" in refused.stderr
    assert "--of run: needs the noise of training" in vernier(*pair, "--gate", "better", "--of", "run", code=2).stderr
    assert "of these weights" in vernier(*pair, "--gate", "better").stdout
    seeds = vernier("compare", tmp_path / "a-1", tmp_path / "a-2").stdout
    assert "they differ in the seed alone (seed: 1 → 2)" in seeds


def test_bad_groups_are_refused_in_a_line(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a-1", 1, 1e-3, 0.0), written(tmp_path, "b-1", 1, 1e-3, 0.0)
    same = written(tmp_path, "b-2", 1, 1e-3, 0.0)
    with pytest.raises(ConfigError, match="one seed, 1; a pattern goes in quotes"):
        compare_groups([str(a)], [str(b), str(same)])
    with pytest.raises(ConfigError, match="is in both groups"):
        compare_groups([str(a)], [str(a)])
    assert "no run is matched" in vernier("compare", a, "--against", f"{tmp_path}/none-*", code=2).stderr
    told = vernier("compare", a, "--against", b, "--by", "length", code=2).stderr
    assert "--against: compares groups of runs; it does not go with --by" in told
    told = vernier("compare", a, "--against", b, "--gate", "better", "--of", "weights", code=2).stderr
    assert "--of weights: --against compares recipes" in told
    assert (
        "is no question; use weights, run or recipe"
        in vernier("compare", a, b, "--gate", "better", "--of", "x", code=2).stderr
    )


def test_the_noise_of_seeds_may_be_taken_over_from_earlier_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for seed in range(1, 9):
        written(tmp_path, f"old-{seed}", seed, 5e-4 if seed < 5 else 6e-4, float(rng.normal(0, 0.01)))
    a, b = written(tmp_path, "a", 1, 1e-3, 0.0), written(tmp_path, "b", 1, 2e-3, -0.008)
    assert "--seeds-from with earlier runs" in vernier("compare", a, "--against", b, code=2).stderr
    found = compare_groups([str(a)], [str(b)], seeds_from=[f"{tmp_path}/*"])  # their own do not count twice
    assert (found.verdict, found.paired, found.df) == ("no difference seen", 0, 6)
    losses = [
        [mean_loss(read_table(next(tmp_path.glob(f"old-{s}/losses/*/step-00000010@*")))) for s in seeds]
        for seeds in (range(1, 5), range(5, 9))
    ]
    by_hand = np.sqrt(np.mean([np.var(100 * np.array(of) / np.mean(of), ddof=1) for of in losses]))
    assert found.se_seeds == pytest.approx(by_hand * np.sqrt(2), rel=1e-9)
    assert "taken over from 8 runs of 2 recipe(s)" in " ".join(found.cautions)
    clear = written(tmp_path, "c", 1, 2e-3, -0.2)
    said = vernier("compare", a, "--against", clear, "--seeds-from", f"{tmp_path}/old-*").stdout
    assert said.startswith(f"the recipe {clear} is better than {a}")
    lone = vernier("compare", a, "--against", b, "--seeds-from", str(a), code=2).stderr
    assert "no two of these runs are seeds of one recipe" in lone
    assert "give --against too" in vernier("compare", a, b, "--seeds-from", str(a), code=2).stderr


def test_with_earlier_noise_one_run_of_each_errs_one_time_in_twenty() -> None:
    rng, wrong = np.random.default_rng(9), 0
    for _ in range(400):
        old = 100 * rng.normal(0, 0.01, 6)
        earlier = SeedNoise(float(np.std(old, ddof=1)), 5, 6, 1)
        (one, own), (two, others) = (group(name, {1: float(rng.normal(0, 0.01))}) for name in "ab")
        wrong += compare_seeds(one, two, own, others, earlier=earlier).verdict != "no difference seen"
    assert wrong / 400 <= 0.075


def test_runs_on_other_data_are_not_of_one_recipe(tmp_path: Path) -> None:
    for name, seed, data in (("a-1", 1, "aa"), ("a-2", 2, "aa"), ("b-1", 1, "bb"), ("b-2", 2, "bb")):
        run = written(tmp_path, name, seed, 1e-3, (0.01 if data == "aa" else 0.02) * seed)
        (run / "manifest.json").write_text(json.dumps({"data": {"data": 32 * data}}))
    found = compare_groups([f"{tmp_path}/a-*"], [f"{tmp_path}/b-*"])
    assert found.changed == ("data: aaaaaaaa → bbbbbbbb (fingerprints)",)
    assert not any("one recipe" in caution for caution in found.cautions)
    said = vernier("compare", tmp_path / "a-1", tmp_path / "b-1").stdout
    assert "settings that differ: data: aaaaaaaa → bbbbbbbb (fingerprints)" in said
    assert "of one recipe" not in said
    with pytest.raises(DataError, match="no two of these runs are seeds of one recipe"):
        compare_groups([str(tmp_path / "a-1")], [str(tmp_path / "b-1")], seeds_from=[f"{tmp_path}/*-2"])
