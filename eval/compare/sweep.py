"""The values of a sweep on one reference set: means over seeds, ranked, and how sure the first place is.

Prints nothing and reads no files. Two errors are kept apart: which documents were drawn, and which seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.compare.pair import ALPHA, Comparison, Side, compare_tables, finite, side_of
from eval.statistics import PairedDifference, clustered_ratio, holm
from eval.statistics.paired import t_quantile, two_sided_p
from eval.tables import NATS, LossTable, mean_loss, mean_table, unit_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Behind:
    """How far a value lies behind the best one, over the seeds that both have; all in percent of the best's loss.

    `comparison`: of the means over those seeds, with the error of the documents alone. `se_seeds`: the standard error
    between seeds of the difference, its variance pooled over all values, None with one seed. `p_holm`: adjusted for the
    search for the best.
    """

    comparison: Comparison
    by_seed: dict[int, float]
    se_seeds: float | None
    ci95: tuple[float, float]
    p: float
    p_holm: float

    @property
    def percent(self) -> float:
        return self.comparison.difference.percent

    @property
    def se_documents(self) -> float:
        return self.comparison.difference.se_percent

    @property
    def told_apart(self) -> bool | None:
        """Whether the settings are; None with one seed, where only these weights can be."""
        return None if self.se_seeds is None else self.weights_apart

    @property
    def weights_apart(self) -> bool:
        """Whether the weights are, whatever another seed would give."""
        return self.p_holm < self.comparison.alpha and not self.comparison.difference.identical

    def to_json(self) -> dict[str, Any]:
        found = self.comparison.difference
        return {
            "percent": finite(self.percent),
            "ci95_percent": [finite(bound) for bound in self.ci95],
            "se_documents_percent": finite(self.se_documents),
            "se_seeds_percent": finite(self.se_seeds),
            "percent_by_seed": {str(seed): finite(value) for seed, value in self.by_seed.items()},
            "win_rate": finite(found.win_rate),
            "method": found.method,
            "p": finite(self.p),
            "p_holm": finite(self.p_holm),
            "question": "weights" if self.se_seeds is None else "recipe",
            "told_apart": self.told_apart,
            "weights_told_apart": self.weights_apart,
            "identical": found.identical,
        }


@dataclass(frozen=True)
class Place:
    """A value of the sweep. `loss`: nats per token, the mean over seeds; where some are missing, see `_levels`.

    `se_seeds`: the standard error between seeds of that mean, None with one seed. `behind`: None for the best, and for
    a value that shares no seed with it.
    """

    name: str
    loss: float
    se_documents: float
    losses: dict[int, float]
    se_seeds: float | None
    side: Side
    behind: Behind | None


@dataclass(frozen=True)
class Ranking:
    """Values by ascending loss. `pairs`: how many p-values share α."""

    places: tuple[Place, ...]
    reference: str
    alpha: float
    pairs: int
    cautions: tuple[str, ...]
    unit: str = NATS


def rank(scored: Mapping[str, Mapping[int, LossTable]], *, alpha: float = ALPHA) -> Ranking:
    """Ranks the values of a sweep, and holds each against the best: paired by sample and by seed.

    The best was chosen by the losses it is then compared with, out of V(V − 1)/2 pairs of V values. So Holm's factors
    begin with that number of pairs, not with the V − 1 comparisons to the best: with six equal values those alone
    would name a winner about twice as often as α allows.

    Args:
        scored: loss tables by value and seed, each value with one at least.

    Raises:
        DataError: nothing to rank, or tables of different reference sets; names the value and seed.
    """
    if not scored:
        raise DataError("sweep: nothing is scored, so nothing can be ranked")
    _check_same(scored)
    losses = {name: {s: mean_loss(t) for s, t in tables.items()} for name, tables in scored.items()}
    level, noise = _levels(losses), seed_noise(losses)
    order = sorted(scored, key=lambda name: (level[name], name))
    best, pairs = order[0], len(order) * (len(order) - 1) // 2
    found = {name: _behind(best, name, scored, noise, alpha, pairs) for name in order[1:]}
    compared = {name: behind for name, behind in found.items() if behind is not None}
    adjusted = _holm_among([behind.p for behind in compared.values()], pairs)
    for name, p_holm in zip(compared, adjusted, strict=True):
        behind = compared[name]
        compared[name] = replace(behind, p_holm=p_holm)
    first = next(iter(scored[best].values()))
    return Ranking(
        places=tuple(_place(name, scored[name], level[name], compared.get(name)) for name in order),
        reference=str(first.meta.get("reference")),
        alpha=alpha,
        pairs=pairs,
        cautions=tuple(_cautions(scored, best, order, compared)),
        unit=unit_of(first),
    )


def _check_same(scored: Mapping[str, Mapping[int, LossTable]]) -> None:
    cells = [(f"{name}, seed {seed}", table) for name, tables in scored.items() for seed, table in tables.items()]
    first_name, first = cells[0]
    for name, table in cells[1:]:
        for key in ("reference", "objective"):
            if table.meta.get(key) != first.meta.get(key):
                told, known = (str(one.meta.get(key) or "unknown")[:8] for one in (table, first))
                raise DataError(
                    f"sweep: {name} was scored on another {key} ({told}) than {first_name} ({known}); "
                    f"score all on one with: vernier eval MODEL --reference REF"
                )
        if len(table) != len(first) or not np.array_equal(table.document, first.document):
            raise DataError(f"sweep: {name} has other samples than {first_name}, though of one reference set")


def _design(losses: Mapping[str, Mapping[int, float]]) -> tuple[Floats, Floats]:
    """(a row [V + S] for each value and seed that is there, with a one for each of the two; the losses)."""
    names, seeds = list(losses), sorted({seed for by_seed in losses.values() for seed in by_seed})
    cells = [(at, seeds.index(seed), loss) for at, name in enumerate(names) for seed, loss in losses[name].items()]
    rows = np.zeros((len(cells), len(names) + len(seeds)))
    for row, (at, seed, _) in zip(rows, cells, strict=True):
        row[at] = row[len(names) + seed] = 1.0
    return rows, np.array([loss for *_, loss in cells])


def _levels(losses: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The mean loss of each value over all seeds: loss = value + seed by least squares, at the mean seed.

    With no member missing these are the plain means. A value that lacks the seed all do badly on gains nothing by it.
    """
    rows, loss = _design(losses)
    seeds = rows.shape[1] - len(losses)
    if len(rows) == len(losses) * seeds:  # exact where it can be
        return {name: math.fsum(by_seed.values()) / seeds for name, by_seed in losses.items()}
    found = np.linalg.lstsq(rows, loss, rcond=None)[0]
    return {name: float(found[at] + found[len(losses) :].mean()) for at, name in enumerate(losses)}


def seed_noise(losses: Mapping[str, Mapping[int, float]]) -> tuple[float, int] | None:
    """(standard deviation of a run's loss around value + seed, its degrees of freedom), over all values together.

    The residual of a two-way layout, with (V − 1)(S − 1) degrees of freedom where no member is missing (Scheffé, The
    Analysis of Variance, 1959, section 4.1): one pair of values alone has but S − 1. It takes the noise for equal at
    all values. None where nothing is left to tell it from, as with one seed.
    """
    rows, loss = _design(losses)
    freedom = len(rows) - int(np.linalg.matrix_rank(rows))
    if freedom < 1:
        return None
    left = loss - rows @ np.linalg.lstsq(rows, loss, rcond=None)[0]
    sd = math.sqrt(float(left @ left) / freedom)
    return (sd if sd > 1e-12 * float(np.abs(loss).max()) else 0.0), freedom  # below it is rounding


def mean_over_seeds(tables: Mapping[int, LossTable], seeds: Sequence[int]) -> LossTable:
    """Each sample's mean loss over seeds."""
    return mean_table([tables[seed] for seed in seeds])


def _behind(
    best: str,
    other: str,
    scored: Mapping[str, Mapping[int, LossTable]],
    noise: tuple[float, int] | None,
    alpha: float,
    pairs: int,
) -> Behind | None:
    seeds = sorted(scored[best].keys() & scored[other].keys())
    if not seeds:
        return None
    a, b = mean_over_seeds(scored[best], seeds), mean_over_seeds(scored[other], seeds)
    comparison = compare_tables(a, b, alpha=alpha, names=(best, other), pairs=pairs)
    found, scale = comparison.difference, 100 / comparison.a.loss
    by_seed = {seed: scale * (mean_loss(scored[other][seed]) - mean_loss(scored[best][seed])) for seed in seeds}
    if noise is None:
        return Behind(comparison, by_seed, None, found.ci95_percent, found.p, found.p)
    se_seeds = scale * noise[0] * math.sqrt(2 / len(seeds))
    ci95, p = with_seeds(found, se_seeds, noise[1])
    return Behind(comparison, by_seed, se_seeds, ci95, p, p)


def with_seeds(found: PairedDifference, se_seeds: float, df: float) -> tuple[tuple[float, float], float]:
    """(95 % interval of a change in percent, its p) with the error between seeds put to that of the documents.

    The half-widths' squares are added; p is as `p_of_both` has it, or the documents' own where that is the larger, as
    it may be by flipped signs.
    """
    half, centre = t_quantile(0.95, df) * se_seeds, found.percent
    low, high = found.ci95_percent
    both = p_of_both(centre, (found.se_percent, found.clusters - 1), (se_seeds, df))
    return (centre - math.hypot(centre - low, half), centre + math.hypot(high - centre, half)), max(found.p, both)


def p_of_both(value: float, first: tuple[float, float], second: tuple[float, float]) -> float:
    """The p at which the interval of a value with two independent errors, each (standard error, df), just has zero.

    Howe, "Approximate confidence limits on the mean of X + Y where X and Y are two tabled independent random
    variables", J. Amer. Statist. Assoc. 69, 1974: the half-widths' squares are added, each with its own t. It stays
    at or below its level, where Satterthwaite's degrees of freedom reach 12 % for 5 % with two seeds. What a document
    and a seed do together is in both errors, which is on the safe side.
    """
    if value == 0:
        return 1.0
    spread = [(se, df) for se, df in (first, second) if se > 0]
    if len(spread) < 2:
        return two_sided_p(value / spread[0][0], spread[0][1]) if spread else 0.0
    # p as the two errors' own t-values see it: |value|² = (t₁(p)·se₁)² + (t₂(p)·se₂)², and t falls with p.
    low, high = -690.0, 0.0  # of ln p
    for _ in range(80):
        middle = (low + high) / 2
        half = math.hypot(*(se * _t_of(math.exp(middle), df) for se, df in spread))
        low, high = (middle, high) if half > abs(value) else (low, middle)
    return math.exp(high)


def _t_of(p: float, df: float) -> float:
    """The |t| that both tails together leave p beyond; from the lower tail, which keeps digits that 1 − p loses."""
    from scipy.special import stdtrit

    return -float(stdtrit(df, p / 2))


def _standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _holm_among(p: Sequence[float], pairs: int) -> list[float]:
    """Holm's p-values of some of `pairs` comparisons, as if the others had the largest p: their p is 1."""
    if not p:
        return []
    return [float(value) for value in holm([*p, *[1.0] * (pairs - len(p))])[: len(p)]]


def _place(name: str, tables: Mapping[int, LossTable], level: float, behind: Behind | None) -> Place:
    seeds = sorted(tables)
    table = mean_over_seeds(tables, seeds)
    own = clustered_ratio(table.loss, table.tokens, table.cluster)
    losses = {seed: mean_loss(tables[seed]) for seed in seeds}
    return Place(
        name=name,
        loss=level,
        se_documents=own.se,
        losses=losses,
        se_seeds=_standard_error(list(losses.values())),
        side=side_of(table, name, own),
        behind=behind,
    )


def _cautions(
    scored: Mapping[str, Mapping[int, LossTable]], best: str, order: Sequence[str], compared: Mapping[str, Behind]
) -> list[str]:
    out: list[str] = []
    alone = [name for name in order if name != best and name not in compared]
    if alone:
        out.append(f"no seed is scored for both {best} and {', '.join(alone)}: their difference holds seed noise too")
    cells = [table for tables in scored.values() for table in tables.values()]
    for key, tail in (("dtype", "part may be rounding"), ("hardware", "last digits differ by that alone")):
        kinds = sorted({str(table.meta[key]) for table in cells if table.meta.get(key) is not None})
        if len(kinds) > 1:
            out.append(f"members were scored on unequal {key} ({', '.join(kinds)}): {tail}")
    told = [c for behind in compared.values() for c in behind.comparison.cautions]
    known = ("unequal dtype", "scored on other hardware")  # said for all members above
    return [*out, *dict.fromkeys(caution for caution in told if not caution.startswith(known))]
