"""Several models on one reference set: every pair of them compared, and which are not told apart. Prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from configs.errors import DataError
from eval.compare.pair import ALPHA, Comparison, compare_tables, finite
from eval.statistics import benjamini_hochberg, holm, holm_shares
from eval.tables import LossTable


@dataclass(frozen=True)
class Entry:
    """One model. `group`: letters; two models that share one are not told apart."""

    name: str
    loss: float
    se: float
    samples: int
    documents: int
    tokens: int
    group: str
    not_told_from: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": finite(self.loss),
            "se": finite(self.se),
            "samples": self.samples,
            "documents": self.documents,
            "tokens": self.tokens,
            "group": self.group,
            "not_told_apart_from": list(self.not_told_from),
        }


@dataclass(frozen=True)
class Pair:
    """Two of the models, the one with the lower loss as A; p adjusted for all pairs, by Holm and by Benjamini–Hochberg.

    The pair counts as told apart where `p_holm` is below α, and the comparison's own verdict follows it.
    """

    comparison: Comparison
    p_holm: float
    p_bh: float

    @property
    def told_apart(self) -> bool:
        return self.comparison.verdict in ("better", "worse")

    def to_json(self) -> dict[str, Any]:
        content = self.comparison.to_json()
        content["difference"] |= {"p_holm": finite(self.p_holm), "p_bh": finite(self.p_bh)}
        content["told_apart"] = self.told_apart
        return content


@dataclass(frozen=True)
class Leaderboard:
    """Models by ascending loss, and all their pairs in that order: (1, 2), (1, 3), … (2, 3), …"""

    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    unit: str
    reference: str
    alpha: float
    cautions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B C … --json` prints."""
        return {
            "reference": self.reference,
            "unit": self.unit,
            "alpha": self.alpha,
            "entries": [entry.to_json() for entry in self.entries],
            "pairs": [pair.to_json() for pair in self.pairs],
            "cautions": list(self.cautions),
        }


def leaderboard(
    tables: Sequence[LossTable],
    names: Sequence[str],
    *,
    alpha: float = ALPHA,
    finish: Callable[[Comparison, int, int], Comparison] = lambda comparison, a, b: comparison,
) -> Leaderboard:
    """Compares every two of the tables, paired and clustered, and adjusts for how many pairs there are.

    In nats per token where all were scored on the same samples; in bits per byte by document where all were scored on
    the same texts, under whatever tokenizers.

    Args:
        names: what to call each; no two alike.
        finish: adds to a comparison what only the caller knows, given the indices of its two tables.

    Raises:
        DataError: a table does not fit the others (names it), or two names are alike.
    """
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise DataError(f"compare: {doubled[0]} is given twice")
    in_bits = _must_be_in_bits(tables, names)
    order = sorted(range(len(tables)), key=lambda i: _level(tables[i], in_bits))
    chosen = list(combinations(order, 2))
    comparisons = [
        finish(
            compare_tables(
                tables[a],
                tables[b],
                alpha=alpha,
                names=(names[a], names[b]),
                in_bits=in_bits,
                pairs=len(chosen),
            ),
            a,
            b,
        )
        for a, b in chosen
    ]
    p = [comparison.difference.p for comparison in comparisons]
    pairs = tuple(
        Pair(replace(comparison, shares=float(share)), float(strict), float(loose))
        for comparison, share, strict, loose in zip(
            comparisons, holm_shares(p), holm(p), benjamini_hochberg(p), strict=True
        )
    )
    apart = {frozenset((pair.comparison.a.name, pair.comparison.b.name)): pair.told_apart for pair in pairs}
    ordered = [names[i] for i in order]
    groups = letters(ordered, lambda a, b: not apart[frozenset((a, b))])
    sides = {side.name: side for c in comparisons for side in (c.a, c.b)}
    entries = tuple(
        Entry(
            name=name,
            loss=sides[name].loss,
            se=sides[name].se,
            samples=sides[name].samples,
            documents=sides[name].documents,
            tokens=sides[name].tokens,
            group=groups[name],
            not_told_from=tuple(other for other in ordered if other != name and not apart[frozenset((name, other))]),
        )
        for name in ordered
    )
    return Leaderboard(
        entries=entries,
        pairs=pairs,
        unit=comparisons[0].unit,
        reference=comparisons[0].reference,
        alpha=alpha,
        cautions=tuple(_cautions(comparisons)),
    )


def _cautions(comparisons: Sequence[Comparison]) -> list[str]:
    """Those of the pairs; of what one run of each does not say, one for all."""
    said = dict.fromkeys(caution for c in comparisons for caution in c.cautions if caution != c.origin.caution())
    between = [c.origin for c in comparisons if c.origin.of == "two runs"]
    if not between:
        return list(said)
    what = (
        "they are of one recipe, so this is what chance in training does"
        if all(o.seed_alone for o in between)
        else ("whether a recipe is better cannot be told from one run of each: compare A… --against B…")
    )
    return [*said, f"these weights are ranked; {what}"]


def _level(table: LossTable, in_bits: bool) -> float:
    return float(table.loss.sum()) / float((table.bytes if in_bits else table.tokens).sum() or 1)


def _must_be_in_bits(tables: Sequence[LossTable], names: Sequence[str]) -> bool:
    """Whether only the texts are the same.

    Raises:
        DataError: not even those; names the first that does not fit what most were scored on.
    """
    for key, in_bits in (("reference", False), ("reference_text", True)):
        values = [table.meta.get(key) for table in tables]
        if None not in values and len(set(values)) == 1:
            return in_bits
    texts = [table.meta.get("reference_text") or table.meta.get("reference") for table in tables]
    most = Counter(texts).most_common(1)[0][0]
    odd = next((i for i, text in enumerate(texts) if text != most), 0)
    name, digits = tables[odd].meta.get("reference_name"), str(tables[odd].meta.get("reference"))[:8]
    raise DataError(
        f"compare: {names[odd]} does not fit the others: it was scored on another reference set "
        f"({name or 'without a name'} {digits}); score it on theirs with: vernier eval MODEL --reference REF"
    )


def letters(names: Sequence[str], alike: Callable[[str, str], bool]) -> dict[str, str]:
    """A compact letter display: two names share a letter exactly where they are `alike` (not told apart).

    Piepho, "An algorithm for a letter-based representation of all-pairwise comparisons", J. Comput. Graph. Stat. 13,
    2004. Each letter is a set of names all alike to each other, found greedily (a clique cover, as in Gramm et al.,
    J. Comput. Graph. Stat. 16, 2007): few letters, though not always the fewest.

    Args:
        names: no two the same; letters are given from the first on.
    """
    cliques = _cliques(names, alike)
    plain = len(cliques) <= 26
    words = [_letter(i) for i in range(len(cliques))]
    return {
        name: ("" if plain else " ").join(word for word, clique in zip(words, cliques, strict=True) if name in clique)
        for name in names
    }


def _cliques(names: Sequence[str], alike: Callable[[str, str], bool]) -> list[list[str]]:
    """Sets of names that are all alike to each other; every pair that is alike is in one, and every name."""
    cliques: list[list[str]] = []
    for at, name in enumerate(names):
        partners = [other for other in names[at + 1 :] if alike(name, other)]
        open_ones = [other for other in partners if not any(name in c and other in c for c in cliques)]
        if not open_ones and any(name in clique for clique in cliques):
            continue
        while True:
            clique = [name, *open_ones[:1]]
            for other in names:
                if other not in clique and all(alike(other, member) for member in clique):
                    clique.append(other)
            cliques.append(clique)
            open_ones = [other for other in open_ones if other not in clique]
            if not open_ones:
                break
    return cliques


def _letter(index: int) -> str:
    """a … z, aa, ab, …"""
    word = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        word = chr(ord("a") + rest) + word
    return word
