"""Recipes compared over their seeds: groups of runs, the seed being the unit, and the documents' error beside it.

What one run of each cannot tell: whether another seed would say the same. Prints nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np

from configs.errors import ConfigError, DataError, VernierError
from configs.load import is_named, leaves, load_config
from configs.run.directory import RunDir
from configs.schema import Config
from eval.compare.pair import ALPHA, Comparison, Verdict, compare_tables, finite
from eval.compare.sweep import mean_over_seeds, with_seeds
from eval.compare.targets import Scale, find_run, tables_of_run
from eval.curves.pairing import NOT_THE_EXPERIMENT, changed_between, data_of
from eval.statistics import samples_needed
from eval.tables import LossTable, mean_loss, read_table

MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Group:
    """Runs of one recipe. `losses`: nats per token by seed; `runs`: their folders, in the order of the seeds."""

    name: str
    runs: tuple[Path, ...]
    losses: dict[int, float]

    @property
    def loss(self) -> float:
        return math.fsum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation between seeds of one recipe, in percent of the loss, by so many degrees of freedom; of how
    many runs of how many recipes."""

    percent: float
    df: int
    runs: int
    recipes: int


@dataclass(frozen=True)
class RecipeComparison:
    """B − A in percent of A, over seeds. `documents`: the comparison of the groups' means, whose error is that of the
    documents alone. `se_seeds`: of that mean difference, in percent, with `df` degrees of freedom. `paired`: seeds that
    both have, 0 where they were not paired.
    """

    a: Group
    b: Group
    step: int | None
    documents: Comparison
    percent: float
    se_seeds: float
    df: float
    ci95_percent: tuple[float, float]
    p: float
    paired: int
    sd_seeds: float  # of one seed's difference; unpaired, of two runs
    changed: tuple[str, ...]
    cautions: tuple[str, ...]
    alpha: float = ALPHA

    @property
    def verdict(self) -> Verdict:
        if self.documents.difference.identical:
            return "identical"
        if self.p < self.alpha:
            return "better" if self.percent < 0 else "worse"
        return "no difference seen"

    @property
    def limited_by(self) -> Literal["seeds", "samples"] | None:
        """The larger of the two errors where no difference is seen: more of that is the cheaper way to see one."""
        if self.verdict != "no difference seen":
            return None
        return "seeds" if self.se_seeds >= self.documents.difference.se_percent else "samples"

    @property
    def seeds_needed(self) -> int | None:
        """Seeds of each with which a change of the size found would be seen with probability .8, were documents no
        error: n = ((z₁₋α/₂ + z.₈)·sd/δ)². None above ten thousand."""
        if self.percent == 0:
            return None
        wanted = samples_needed(self.sd_seeds, self.percent)
        return max(2, wanted) if wanted <= MOST_SEEDS else None

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A… --against B… --json` prints."""

        def group(one: Group) -> dict[str, Any]:
            losses = {str(seed): finite(loss) for seed, loss in one.losses.items()}
            return {"name": one.name, "runs": [str(r) for r in one.runs], "loss": one.loss, "loss_by_seed": losses}

        return {
            "question": "recipe",
            "a": group(self.a),
            "b": group(self.b),
            "step": self.step,
            "difference": {
                "percent": finite(self.percent),
                "ci95_percent": [finite(bound) for bound in self.ci95_percent],
                "p": finite(self.p),
                "alpha": self.alpha,
                "se_seeds_percent": finite(self.se_seeds),
                "se_documents_percent": finite(self.documents.difference.se_percent),
                "sd_seeds_percent": finite(self.sd_seeds),
                "degrees_of_freedom": finite(self.df),
                "paired_seeds": self.paired,
                "seeds_needed": self.seeds_needed,
            },
            "verdict": self.verdict,
            "limited_by": self.limited_by,
            "settings_changed": list(self.changed),
            "cautions": list(self.cautions),
        }


def compare_groups(
    a: Sequence[str], b: Sequence[str], *, seeds_from: Sequence[str] = (), alpha: float = ALPHA
) -> RecipeComparison:
    """Compares two recipes by the runs of each: folders, names under `runs/`, or patterns of them (`runs/a-*`).

    Args:
        seeds_from: earlier runs, several seeds of each recipe, whose variance between seeds is taken over: then one run
            of each is enough, and seeds are not paired.

    Raises:
        ConfigError: too few runs, a run in both groups, or two of one seed in a group.
        DataError: no run is where one was named, or they are not scored on one reference set at one step.
    """
    found = [_runs_of(texts) for texts in (a, b)]
    both = {run.resolve() for run in found[0]} & {run.resolve() for run in found[1]}
    if both:
        raise ConfigError(f"--against: {sorted(both)[0]} is in both groups")
    step, paths = _common_step([run for group in found for run in group])
    configs = [[load_config(RunDir(run).config) for run in group] for group in found]
    by_seed = [_by_seed(group, of) for group, of in zip(found, configs, strict=True)]
    tables = [{seed: read_table(paths[run]) for seed, run in group.items()} for group in by_seed]
    groups = [
        Group(_name(texts, group), tuple(of.values()), {seed: mean_loss(t) for seed, t in own.items()})
        for texts, group, of, own in zip((a, b), found, by_seed, tables, strict=True)
    ]
    own = [run for group in found for run in group]  # whose seeds count by themselves
    earlier = noise_of_seeds(seeds_from, without=own) if seeds_from else None
    made = compare_seeds(groups[0], groups[1], tables[0], tables[1], earlier=earlier, alpha=alpha)
    changed, cautions = _settings(found)
    return replace(made, step=step, changed=changed, cautions=(*made.cautions, *cautions))


def noise_of_seeds(texts: Sequence[str], *, without: Sequence[Path] = ()) -> SeedNoise:
    """What seeds of one recipe have differed by in earlier runs: those with equal settings but for the seed are one
    recipe, each taken at the last step that is scored in all its seeds; the variances are pooled.

    Args:
        without: runs that are left out.

    Raises:
        DataError: no run is where one was named, or no recipe has two seeds scored at one step.
    """
    recipes: dict[str, list[Path]] = {}
    left_out = {run.resolve() for run in without}
    for run in _runs_of(texts):
        if run.resolve() in left_out:
            continue
        settings = leaves(load_config(RunDir(run).config).model_dump(mode="json", by_alias=True))
        own = {key: value for key, value in settings if not is_named(key, (*NOT_THE_EXPERIMENT, "seed"))}
        same = json.dumps([own, data_of(run)], sort_keys=True)
        recipes.setdefault(same, []).append(run)
    squares, df, runs, count = 0.0, 0, 0, 0
    for group in recipes.values():
        if len(group) < 2:
            continue
        try:
            _, paths = _common_step(group)
        except DataError:
            continue
        losses = np.array([mean_loss(read_table(path)) for path in paths.values()])
        squares += (len(losses) - 1) * float(np.var(100 * losses / losses.mean(), ddof=1))
        df, runs, count = df + len(losses) - 1, runs + len(losses), count + 1
    if not df:
        raise DataError(
            "--seeds-from: no two of these runs are seeds of one recipe (equal settings but for the seed) that are "
            "scored at one step"
        )
    return SeedNoise(math.sqrt(squares / df), df, runs, count)


def compare_seeds(
    a: Group,
    b: Group,
    tables_a: Mapping[int, LossTable],
    tables_b: Mapping[int, LossTable],
    *,
    earlier: SeedNoise | None = None,
    alpha: float = ALPHA,
) -> RecipeComparison:
    """The comparison of two groups whose tables are read: paired by the seeds that both have, where these are two and
    more, else of unlike seeds (Welch, "The generalization of Student's problem", Biometrika 34, 1947).

    The two errors are put together as in a sweep (`with_seeds`).

    Args:
        earlier: the noise of seeds in other runs: not paired then, the variance pooled with that within the groups.

    Raises:
        ConfigError: fewer than two runs in a group.
        DataError: the tables cannot be subtracted.
    """
    for group in (a, b):
        if len(group.losses) < 2 and earlier is None:
            raise ConfigError(
                f"--against: {group.name} is one run; whether a recipe is better needs two seeds of each and more, or "
                "--seeds-from with earlier runs that tell what seeds do"
            )
    shared = sorted(tables_a.keys() & tables_b.keys())
    paired = len(shared) > 1 and earlier is None
    of_a, of_b = (shared, shared) if paired else (sorted(tables_a), sorted(tables_b))
    names = (a.name, b.name)
    documents = compare_tables(
        mean_over_seeds(tables_a, of_a), mean_over_seeds(tables_b, of_b), names=names, alpha=alpha
    )
    found, scale = documents.difference, 100 / documents.a.loss
    own = [scale * np.array(list(group.losses.values())) for group in (a, b)]
    if paired:
        d_S = scale * np.array([b.losses[seed] - a.losses[seed] for seed in shared])
        sd, df = float(np.std(d_S, ddof=1)), float(len(shared) - 1)
        se = sd / math.sqrt(len(shared))
    elif earlier is not None:
        within = [(len(x) - 1) * float(np.var(x, ddof=1)) for x in own if len(x) > 1]
        df = float(earlier.df + sum(len(x) - 1 for x in own))
        one = math.sqrt((earlier.df * earlier.percent**2 + sum(within)) / df)
        se, sd = one * math.sqrt(sum(1 / len(x) for x in own)), one * math.sqrt(2)
    else:
        parts = [float(np.var(x, ddof=1)) / len(x) for x in own]
        se, sd = math.sqrt(sum(parts)), math.sqrt(sum(float(np.var(x, ddof=1)) for x in own))
        df = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, own, strict=True)) if se else 1.0
    ci95, p = with_seeds(found, se, df)
    left = sorted((tables_a.keys() | tables_b.keys()) - set(shared)) if paired else []
    cautions = [f"seeds of one group alone are left out: {', '.join(map(str, left))}"] if left else []
    if earlier is not None:
        cautions.append(
            f"the noise of seeds is taken over from {earlier.runs} runs of {earlier.recipes} recipe(s) "
            f"({earlier.percent:.2g} %): it holds if these recipes vary as those did"
        )
    elif not paired:
        cautions.append("the groups have no two seeds in common: not paired, which may take several times as many")
    return RecipeComparison(
        a=a,
        b=b,
        step=None,
        documents=documents,
        percent=found.percent,
        se_seeds=se,
        df=df,
        ci95_percent=ci95,
        p=p,
        paired=len(shared) if paired else 0,
        sd_seeds=sd,
        changed=(),
        cautions=(*documents.cautions, *cautions),
        alpha=alpha,
    )


def _runs_of(texts: Sequence[str]) -> list[Path]:
    found: dict[Path, Path] = {}
    for text in texts:
        pattern = any(sign in text for sign in "*?[")
        runs = [run for path in (sorted(glob(text)) if pattern else [text]) if (run := find_run(path)) is not None]
        if not runs:
            raise DataError(f"{text}: no run {'is matched by it' if pattern else 'directory (or name under runs/)'}")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def _name(texts: Sequence[str], runs: Sequence[Path]) -> str:
    return texts[0] if len(texts) == 1 else f"{runs[0].name}, …"


def _common_step(runs: Sequence[Path]) -> tuple[int, dict[Path, Path]]:
    """(the last step that is scored in all runs in one way, its tables by run)."""
    scored = {run: tables_of_run(run) for run in runs}
    common: set[Scale] = set.intersection(*(set(by_scale) for by_scale in scored.values()))
    best: tuple[int, Scale] | None = None
    for scale in common:
        steps = set.intersection(*(set(by_scale[scale]) for by_scale in scored.values()))
        if steps and (best is None or max(steps) > best[0]):
            best = max(steps), scale
    if best is None:
        raise DataError(
            "compare --against: no step is scored in all of these runs on one reference set: "
            + "; ".join(f"{run.name}: {max(s for by in of.values() for s in by)}" for run, of in scored.items())
        )
    step, scale = best
    return step, {run: by_scale[scale][step] for run, by_scale in scored.items()}


def _by_seed(runs: Sequence[Path], configs: Sequence[Config]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for run, config in zip(runs, configs, strict=True):
        if config.seed in found:
            raise ConfigError(
                f"--against: {found[config.seed]} and {run} of one group have one seed, {config.seed}; "
                "a pattern goes in quotes ('runs/b-*'), and --against before each run of B"
            )
        found[config.seed] = run
    return dict(sorted(found.items()))


def _settings(groups: Sequence[Sequence[Path]]) -> tuple[tuple[str, ...], list[str]]:
    """(settings that differ between the groups, cautions about such within one)."""
    cautions = []
    for letter, group in zip("AB", groups, strict=True):
        inside = sorted({c for one in group[1:] for c in changed_between(group[0], one) if not c.startswith("seed:")})
        if inside:
            cautions.append(f"runs of {letter} differ in more than the seed: {', '.join(inside)}")
    try:
        between = [c for c in changed_between(groups[0][0], groups[1][0]) if not c.startswith("seed:")]
    except VernierError:
        between = []
    if not between:
        cautions.append("the two groups have the same settings but for the seed: one recipe")
    return tuple(between), cautions
