"""The paired verdict between two loss tables. Prints nothing; along a run see `eval.compare.along_run`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from eval.statistics import (
    Estimate,
    PairedDifference,
    Power,
    adjusted_p,
    by_cluster,
    detectable,
    power_for,
    spent_alpha,
)
from eval.statistics.paired import FEW_DOCUMENTS, paired_difference
from eval.tables import LossTable

Verdict = Literal["better", "worse", "no difference seen", "identical"]
Limit = Literal["samples", "training noise"]
Gate = Literal["better", "not-worse"]
PairedBy = Literal["sample", "document"]
ALPHA = 0.05
NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Side:
    """One of the two: its loss and clustered error in the comparison's unit, and what they rest on."""

    name: str
    loss: float
    se: float
    samples: int
    documents: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "loss": self.loss,
            "se": self.se,
            "samples": self.samples,
            "documents": self.documents,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Comparison:
    """B − A on the same reference set. Better: B's loss is lower.

    `wobble_percent`: checkpoint-to-checkpoint noise of the runs that the two are of, the larger; None where it cannot
    be told. `one_step`: the two are one optimizer step of one run apart. `same_weights`: one model scored twice, in two
    dtypes say. `pairs`: how many comparisons share α, and `p_holm` the p adjusted for them.
    """

    a: Side
    b: Side
    difference: PairedDifference
    look: int | None
    alpha: float
    unit: str
    paired_by: PairedBy
    reference: str
    cautions: tuple[str, ...] = ()
    wobble_percent: float | None = None
    one_step: bool = False
    same_weights: bool = False
    pairs: int = 1
    p_holm: float | None = None

    @property
    def p_adjusted(self) -> float:
        return adjusted_p(self.difference.p, self.look) if self.p_holm is None else self.p_holm

    @property
    def can_show(self) -> bool:
        """Whether any change could be significant: signs of few documents can be flipped in few ways."""
        return self.pairs * adjusted_p(self.difference.smallest_p, self.look) < self.alpha

    @property
    def detectable_percent(self) -> float:
        """Smallest change seen with probability .8, at the error rate that this look may spend.

        Infinite where no change could be.
        """
        if not self.can_show:
            return math.inf
        return detectable(self.difference.se_percent, spent_alpha(self.alpha, self.look))

    @property
    def half_width_percent(self) -> float:
        """Half the 95 % interval of the change."""
        low, high = self.difference.ci95_percent
        return (high - low) / 2

    @property
    def verdict(self) -> Verdict:
        if self.difference.identical:
            return "identical"
        if self.p_adjusted < self.alpha:
            return "better" if self.difference.value < 0 else "worse"
        return "no difference seen"

    @property
    def wobble_bound_percent(self) -> float | None:
        """What two checkpoints of such a run differ by anyway, at most: 2·√2·wobble."""
        return None if self.wobble_percent is None else 2 * math.sqrt(2) * self.wobble_percent

    @property
    def below_wobble(self) -> bool:
        """Whether the change is within `wobble_bound_percent`."""
        bound = self.wobble_bound_percent
        if self.same_weights:  # no other checkpoint is in question
            return False
        return bound is not None and abs(self.difference.percent) < bound

    @property
    def limited_by(self) -> Limit | None:
        """What keeps a verdict from saying more.

        A clear difference below the wobble is limited by training noise, save between weights one optimizer step
        apart: there no more is asked than which of two given sets of weights is better. Where no difference is seen,
        the larger counts of the wobble of a difference, √2·wobble, and its standard error; the samples do
        where they could not show any change.
        """
        verdict = self.verdict
        if verdict == "identical":
            return None
        if verdict != "no difference seen":
            return "training noise" if self.below_wobble and not self.one_step else None
        if not self.can_show:
            return "samples"
        noise = math.sqrt(2) * (self.wobble_percent or 0.0)
        given = self.one_step or self.same_weights
        return "training noise" if noise > self.difference.se_percent and not given else "samples"

    def power(self, wanted_percent: float) -> Power | None:
        """What seeing a change of `wanted_percent` (above zero) needs; None for a pair without any spread."""
        if not self.difference.se_percent > 0:
            return None
        power = power_for(
            wanted_percent,
            self.difference.se_percent,
            100 * math.hypot(self.a.se, self.b.se) / self.a.loss,
            documents=self.a.documents,
            samples=self.a.samples,
            tokens=self.a.tokens,
            alpha=spent_alpha(self.alpha, self.look),
            least_documents=math.ceil(FEW_DOCUMENTS * self.a.documents / self.difference.effective_clusters - 1e-9),
        )
        return replace(power, detectable_percent=self.detectable_percent)

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B --json` prints (docs/design.md, section 2); null where a number is infinite.

        In bits per byte `nats` is null and `bits_per_byte` has the difference.
        """
        found = self.difference
        in_nats = self.unit == NATS
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "difference": {
                "nats": finite(found.value) if in_nats else None,
                **({} if in_nats else {"bits_per_byte": finite(found.value)}),
                "percent": finite(found.percent),
                "se_percent": finite(found.se_percent),
                "ci95_percent": [finite(bound) for bound in found.ci95_percent],
                "p": finite(found.p),
                "p_adjusted": finite(self.p_adjusted),
                "alpha": self.alpha,
                "win_rate": finite(found.win_rate),
                "detectable_percent": finite(self.detectable_percent),
                "pairing_gain": finite(found.pairing_gain),
                "t": finite(found.t),
                "t_unpaired": finite(found.t_unpaired),
                "method": found.method,
            },
            "verdict": self.verdict,
            "limited_by": self.limited_by,
            "wobble_percent": finite(self.wobble_percent),
            "unit": self.unit,
            "paired_by": self.paired_by,
            "reference": self.reference,
            "cautions": list(self.cautions),
        }


def finite(value: float | None) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return float(value) if value is not None and math.isfinite(value) else None


def compare_tables(
    a: LossTable,
    b: LossTable,
    *,
    look: int | None = None,
    alpha: float = ALPHA,
    names: tuple[str, str] | None = None,
    in_bits: bool = False,
    pairs: int = 1,
) -> Comparison:
    """The paired comparison of two tables, `b` against `a`.

    Tables of the same reference set are paired by sample, in nats per token. Tables of the same texts
    under two tokenizers are paired by document, in bits per byte.

    Args:
        look: None for a comparison that stands by itself; 1, 2, … along a run, where α·6/(π²k²) may be spent.
        names: what to call the two; default their labels.
        in_bits: bits per byte by document also where the tokens are the same ones.
        pairs: how many comparisons share α, so that a p by flipped signs can be small enough.

    Raises:
        DataError: they have nothing in common to pair by, other objectives, other parts of the set, or fewer than
            two documents.
    """
    level = spent_alpha(alpha, look) / pairs
    objectives = a.meta.get("objective"), b.meta.get("objective")
    if objectives[0] != objectives[1]:
        raise DataError(f"compare: the objectives differ ({objectives[0]} and {objectives[1]}); nothing can be paired")
    _check_parts(a, b)
    if _same(a, b, "reference") and not (in_bits and _same(a, b, "reference_text")):
        reference, paired_by, unit = str(a.meta["reference"]), "sample", NATS
        found = _by_sample(a, b, level)
    elif _same(a, b, "reference_text"):
        reference, paired_by, unit = str(a.meta["reference_text"]), "document", BITS
        found = _by_document(a, b, level)
    else:
        raise DataError(
            f"compare: scored on different reference sets ({_reference_words(a)} and {_reference_words(b)}); "
            "score both on one with: vernier eval MODEL --reference REF"
        )
    labels = names or (str(a.meta.get("label") or "A"), str(b.meta.get("label") or "B"))
    comparison = Comparison(
        a=side_of(a, labels[0], found.a),
        b=side_of(b, labels[1], found.b),
        difference=found,
        look=look,
        alpha=alpha,
        unit=unit,
        paired_by="sample" if paired_by == "sample" else "document",
        reference=reference,
        cautions=tuple(_cautions(a, b, found, unit)),
        same_weights=_same(a, b, "source"),
        pairs=pairs,
    )
    return replace(comparison, cautions=(*_nothing_can_be_shown(comparison), *comparison.cautions))


def _same(a: LossTable, b: LossTable, key: str) -> bool:
    return a.meta.get(key) is not None and a.meta.get(key) == b.meta.get(key)


def _reference_words(table: LossTable) -> str:
    name, fingerprint = table.meta.get("reference_name"), table.meta.get("reference")
    return " ".join(str(w)[:16] for w in (name, fingerprint) if w) or "one without a fingerprint"


def side_of(table: LossTable, name: str, loss: Estimate) -> Side:
    """What a table amounts to, its loss told already."""
    return Side(name, loss.value, loss.se, len(table), loss.clusters, int(np.sum(table.tokens, dtype=np.int64)))


def part_of(table: LossTable) -> dict[str, Any] | None:
    """{"blocks": k, "of": K, "samples": n} where a table has the first blocks of its set only; None for a whole one."""
    part = table.meta.get("partial")
    return part if isinstance(part, dict) and part.get("blocks") != part.get("of") else None


def _check_parts(a: LossTable, b: LossTable) -> None:
    """Refuses to set a part of a reference set against more of it."""
    parts = part_of(a), part_of(b)
    if parts == (None, None):
        return
    counts = [
        None if part is None else (part.get("blocks"), len(table)) for part, table in zip(parts, (a, b), strict=True)
    ]
    if counts[0] == counts[1]:
        return
    words = [
        f"{table.meta.get('label') or name} "
        + ("on all" if part is None else f"on {part.get('blocks')} of {part.get('of')}")
        for name, part, table in zip("AB", parts, (a, b), strict=True)
    ]
    raise DataError(
        f"compare: scored on other parts of the reference set ({words[0]} blocks, {words[1]}); "
        "complete the shorter with: vernier eval MODEL --reference REF"
    )


def _by_sample(a: LossTable, b: LossTable, level: float) -> PairedDifference:
    if len(a) != len(b):
        raise DataError(
            f"compare: the same reference set, but {len(a):,} samples in one table, {len(b):,} in the other"
        )
    for column in ("document", "tokens", "bytes"):
        if not np.array_equal(getattr(a, column), getattr(b, column)):
            first = int(np.argmax(getattr(a, column) != getattr(b, column)))
            raise DataError(f"compare: the same reference set, but column {column} differs from sample {first} on")
    return paired_difference(a.loss, b.loss, a.tokens, a.document, flip_below=FEW_DOCUMENTS, level=level)


def _by_document(a: LossTable, b: LossTable, level: float) -> PairedDifference:
    documents_C, bits_a_C, bytes_a_C = _bits(a)
    others_C, bits_b_C, bytes_b_C = _bits(b)
    if not np.array_equal(documents_C, others_C):
        raise DataError(
            f"compare: the same texts, but {len(documents_C):,} and {len(others_C):,} documents "
            "that are not the same ones"
        )
    if not np.array_equal(bytes_a_C, bytes_b_C):
        first = int(np.argmax(bytes_a_C != bytes_b_C))
        raise DataError(
            f"compare: document {documents_C[first]} has {bytes_a_C[first]:,.0f} bytes in one table "
            f"and {bytes_b_C[first]:,.0f} in the other; not the same text was scored"
        )
    if not bytes_a_C.sum() > 0:
        raise DataError("compare: the tables count no bytes, so bits per byte cannot be told")
    return paired_difference(bits_a_C, bits_b_C, bytes_a_C, documents_C, flip_below=FEW_DOCUMENTS, level=level)


def _bits(table: LossTable) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """(document ids ascending, loss in bits of each, bytes of each)."""
    bits_C = by_cluster(table.loss, table.document) / math.log(2)
    return np.unique(table.document), bits_C, by_cluster(table.bytes, table.document)


def _nothing_can_be_shown(comparison: Comparison) -> list[str]:
    found = comparison.difference
    if comparison.can_show:
        return []
    where = f"at {100 * comparison.alpha:g} %"
    if comparison.pairs > 1:
        where = f"among {comparison.pairs} pairs"
    elif comparison.look is not None:  # the look from which on it is so: the same words at all later ones
        first = math.sqrt(comparison.alpha / adjusted_p(found.smallest_p, 1))
        where = f"from look {max(1, math.ceil(first - 1e-9))} along a run on"
    return [f"with {found.clusters} documents no change, however large, can be significant {where}"]


def _cautions(a: LossTable, b: LossTable, found: PairedDifference, unit: str) -> list[str]:
    out = []
    if unit == BITS and not _same(a, b, "reference"):
        out.append("other tokens of the same texts: compared in bits per byte, paired by document")
    dtypes = a.meta.get("dtype"), b.meta.get("dtype")
    if dtypes[0] != dtypes[1]:
        out.append(f"unequal dtype: one was scored in {dtypes[0]}, the other in {dtypes[1]}; part may be rounding")
        if _same(a, b, "source"):
            out.append("the same weights scored in two dtypes: this difference is rounding, not training")
    hardware = a.meta.get("hardware"), b.meta.get("hardware")
    if hardware[0] != hardware[1] and None not in hardware:
        out.append(f"scored on other hardware ({hardware[0]} and {hardware[1]}): last digits differ by that alone")
    if found.method == "sign flips":
        out.append(
            f"{found.clusters} documents, worth {found.effective_clusters:.1f} of equal size: "
            f"below {FEW_DOCUMENTS} the p-value and interval are by flipping signs"
        )
    part = part_of(a)
    if part is not None:
        out.append(
            f"partial: only the first {part.get('blocks')} of {part.get('of')} blocks of the reference set "
            f"({len(a):,} samples) were scored in both"
        )
    if any(table.meta.get("until_verdict") and part_of(table) for table in (a, b)):
        out.append("stopped early: the estimate is inflated, read the interval of the stop")
    for table in (a, b):
        if table.undigested:
            out.append(f"{table.meta.get('label')}: its table has no digest, so damage to it would not be seen")
    return out


def gate_holds(comparison: Comparison, gate: Gate, margin_percent: float = 0.0) -> bool:
    """Whether the upper 95 % bound of B − A is below −margin (better) or below margin (not-worse).

    Identical tables are not worse at any margin, zero included.

    Raises:
        ConfigError: there is no such gate.
    """
    upper = comparison.difference.ci95_percent[1]
    if gate == "better":
        return upper < -margin_percent
    if gate == "not-worse":
        return upper < margin_percent or comparison.verdict == "identical"
    raise ConfigError(f"--gate: {gate!r} is not a verdict; use better or not-worse")
