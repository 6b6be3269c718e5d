"""The paired verdict between two loss tables. Prints nothing; along a run see `eval.compare.along_run`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.compare.cautions import BITS, cautions_of, check_parts, same
from eval.compare.provenance import UNKNOWN, Provenance
from eval.compare.twins import TwinNoise
from eval.statistics import (
    Estimate,
    PairedDifference,
    Power,
    by_cluster,
    detectable,
    power_for,
)
from eval.statistics.paired import FEW_DOCUMENTS, SKEWED, paired_difference, t_quantile
from eval.statistics.power import flips_factor
from eval.tables import LossTable, unit_of

Verdict = Literal["better", "worse", "no difference seen", "identical", "same weights"]
Limit = Literal["samples", "training noise", "seeds unknown", "unknown"]
PairedBy = Literal["sample", "document"]
ALPHA = 0.05
JUDGED = {"flip_below": FEW_DOCUMENTS, "skew_above": SKEWED}  # how differences are tested where a verdict is given
# In percent of the loss: by so much two scorings of the same weights may differ, by rounding alone.
ROUNDING_PERCENT = {"fp32": 1e-4, "bf16": 0.1}


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
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """B − A on the same reference set. Better: B's loss is lower. The question is about *weights*: whether B's are
    better than A's on texts like these; documents are the error.

    `wobble_percent`: checkpoint-to-checkpoint noise of the runs that the two are of, the larger; None where it cannot
    be told. `twins`: what twins of these runs differ by, which takes the wobble's place. `one_step`: the two are one
    optimizer step of one run apart. `same_weights`: one model scored twice, in two dtypes say; `rounding_percent`: by
    how much that may change a loss. `shares`: of how many comparisons this one bears the error: p, interval, verdict
    and gate go by α over it. `pairs`: for how many p by flipped signs can be small enough. `origin`: what the two have
    to do with each other.
    """

    a: Side
    b: Side
    difference: PairedDifference
    alpha: float
    unit: str
    paired_by: PairedBy
    reference: str
    cautions: tuple[str, ...] = ()
    wobble_percent: float | None = None
    twins: TwinNoise | None = None
    one_step: bool = False
    same_weights: bool = False
    rounding_percent: float = 0.0
    pairs: int = 1
    shares: float = 1.0
    origin: Provenance = UNKNOWN

    @property
    def p_adjusted(self) -> float:
        return min(1.0, self.difference.p * self.shares)

    @property
    def ci95_percent(self) -> tuple[float, float]:
        """The 95 % interval of the change that holds together with those of the comparisons it shares α with."""
        found = self.difference
        low, high = found.ci95_percent
        if self.shares <= 1 or found.identical:
            return low, high
        level, df = 1 - self.alpha / self.shares, found.clusters - 1
        if found.method != "sign flips":
            return found.interval_percent(level)
        wider = t_quantile(level, df) / t_quantile(0.95, df)
        low, high = (found.percent + wider * (bound - found.percent) for bound in (low, high))
        # By flipped signs only the bounds of .95 are known: which side of zero the corrected ones lie on, p tells.
        if self.p_adjusted >= self.alpha:
            return min(low, 0.0), max(high, 0.0)
        return (low, min(high, math.nextafter(0, -1))) if found.percent < 0 else (max(low, math.nextafter(0, 1)), high)

    @property
    def can_show(self) -> bool:
        """Whether any change could be significant: signs of few documents can be flipped in few ways."""
        return max(self.pairs, self.shares) * self.difference.smallest_p < self.alpha

    @property
    def detectable_percent(self) -> float:
        """Smallest change seen with probability .8: `detectable`, by Student's t, at its share of α; where signs are
        flipped, `flips_factor` times that. Infinite where no change could be.
        """
        if not self.can_show:
            return math.inf
        found = self.difference
        times = flips_factor(found.clusters) if found.method == "sign flips" else 1.0
        return times * detectable(found.se_percent, self.alpha / self.shares, df=found.clusters - 1)

    @property
    def half_width_percent(self) -> float:
        """Half the 95 % interval of the change."""
        return (self.ci95_percent[1] - self.ci95_percent[0]) / 2

    @property
    def verdict(self) -> Verdict:
        if self.difference.identical:
            return "identical"
        if self.same_weights and abs(self.difference.percent) <= self.rounding_percent:
            return "same weights"
        if self.p_adjusted < self.alpha:
            return "better" if self.difference.value < 0 else "worse"
        return "no difference seen"

    @property
    def noise_percent(self) -> float | None:
        """Standard deviation of one checkpoint by the noise of training: by twins where there are any, else the wobble;
        of twins that have not settled the larger of the two. None where it cannot be told."""
        return self.twins.percent if self.twins is not None and self.noise_by_twins else self.wobble_percent

    @property
    def noise_by_twins(self) -> bool:
        """Whether the noise is what twins differ by."""
        return self.twins is not None and (self.twins.settled or self.twins.percent >= (self.wobble_percent or 0.0))

    @property
    def noise_is_known(self) -> bool:
        """Whether what is above the noise is above it for good: twins that still move apart are a lower bound."""
        if self.twins is not None and self.noise_by_twins:
            return self.twins.settled
        return self.wobble_percent is not None

    @property
    def noise_bound_percent(self) -> float | None:
        """What two checkpoints differ by anyway, at most: √2 times the noise, times 2 or, by twins, Student's t."""
        if self.noise_percent is None:
            return None
        times = t_quantile(0.95, self.twins.df) if self.twins is not None and self.noise_by_twins else 2.0
        return times * math.sqrt(2) * self.noise_percent

    @property
    def below_noise(self) -> bool:
        """Whether the change is within `noise_bound_percent`."""
        bound = self.noise_bound_percent
        if self.same_weights:  # no other checkpoint is in question
            return False
        return bound is not None and abs(self.difference.percent) < bound

    @property
    def limited_by(self) -> Limit | None:
        """What keeps a verdict from saying more; None where nothing does.

        A clear difference below the training noise is limited by it, save between weights one optimizer step
        apart: there no more is asked than which of two given sets of weights is better. One between two runs is limited
        by what is not known of other seeds; one within a run whose noise cannot be told, or of weights of which no run
        is known, by something unknown. Where no difference is seen, the larger counts of the noise of a difference,
        √2 times that of one, and its standard error; the samples do where they could not show any change.
        """
        verdict, given = self.verdict, self.one_step or self.same_weights
        if verdict in ("identical", "same weights"):
            return None
        if verdict == "no difference seen":
            noise = 0.0 if given else math.sqrt(2) * (self.noise_percent or 0.0)
            return "training noise" if self.can_show and noise > self.difference.se_percent else "samples"
        if given:
            return None
        if self.below_noise:
            return "training noise"
        if self.origin.of == "two runs":
            return "seeds unknown"
        return None if self.noise_is_known else "unknown"

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
            alpha=self.alpha / self.shares,
            least_documents=math.ceil(FEW_DOCUMENTS * self.a.documents / self.difference.effective_clusters - 1e-9),
        )
        return replace(power, detectable_percent=self.detectable_percent)

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B --json` prints (docs/design.md, section 2); null where a number is infinite.

        In bits per byte `nats` is null and `bits_per_byte` has the difference.
        """
        found = self.difference
        in_nats = self.unit.startswith("nats")
        return {
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "difference": {
                "nats": finite(found.value) if in_nats else None,
                **({} if in_nats else {self.unit.replace(" ", "_"): finite(found.value)}),
                "percent": finite(found.percent),
                "se_percent": finite(found.se_percent),
                "ci95_percent": [finite(bound) for bound in self.ci95_percent],
                "p": finite(found.p),
                "p_adjusted": finite(self.p_adjusted),
                "alpha": self.alpha,
                "win_rate": finite(found.win_rate),
                "detectable_percent": finite(self.detectable_percent),
                "pairing_gain": finite(found.pairing_gain),
                "t": finite(found.t),
                "t_unpaired": finite(found.t_unpaired),
                "method": found.method,
                "clusters": found.clusters,
            },
            "question": "weights",
            "verdict": self.verdict,
            "origin": self.origin.to_json(),
            "limited_by": self.limited_by,
            "wobble_percent": finite(self.wobble_percent),
            "twins": self.twins and self.twins.to_json(),
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
    looks: int = 1,
    alpha: float = ALPHA,
    names: tuple[str, str] | None = None,
    in_bits: bool = False,
    pairs: int = 1,
) -> Comparison:
    """The paired comparison of two tables, `b` against `a`.

    Tables of the same reference set are paired by sample, in nats per token. Tables of the same texts
    under two tokenizers are paired by document, in bits per byte.

    Args:
        looks: comparisons that share α from the start, such as those that are planned along a run.
        names: what to call the two; default their labels.
        in_bits: bits per byte by document also where the tokens are the same ones.
        pairs: how many comparisons share α, so that a p by flipped signs can be small enough.

    Raises:
        DataError: they have nothing in common to pair by, other objectives, other parts of the set, or fewer than
            two documents.
    """
    level = alpha / (looks * pairs)
    objectives = a.meta.get("objective"), b.meta.get("objective")
    if objectives[0] != objectives[1]:
        raise DataError(f"compare: the objectives differ ({objectives[0]} and {objectives[1]}); nothing can be paired")
    check_parts(a, b)
    if same(a, b, "reference") and not (in_bits and same(a, b, "reference_text")):
        reference, paired_by, unit = str(a.meta["reference"]), "sample", unit_of(a)
        found = _by_sample(a, b, level)
    elif same(a, b, "reference_text"):
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
        alpha=alpha,
        unit=unit,
        paired_by="sample" if paired_by == "sample" else "document",
        reference=reference,
        cautions=tuple(cautions_of(a, b, found, unit)),
        same_weights=same(a, b, "source"),
        rounding_percent=max(ROUNDING_PERCENT.get(str(t.meta.get("dtype")), 0.1) for t in (a, b)),
        pairs=pairs,
        shares=float(looks),
    )
    return replace(comparison, cautions=(*_nothing_can_be_shown(comparison), *comparison.cautions))


def _reference_words(table: LossTable) -> str:
    name, fingerprint = table.meta.get("reference_name"), table.meta.get("reference")
    return " ".join(str(w)[:16] for w in (name, fingerprint) if w) or "one without a fingerprint"


def side_of(table: LossTable, name: str, loss: Estimate) -> Side:
    """What a table amounts to, its loss told already."""
    documents = len(np.unique(table.document))
    return Side(name, loss.value, loss.se, len(table), documents, int(np.sum(table.tokens, dtype=np.int64)))


def _by_sample(a: LossTable, b: LossTable, level: float) -> PairedDifference:
    if len(a) != len(b):
        raise DataError(
            f"compare: the same reference set, but {len(a):,} samples in one table, {len(b):,} in the other"
        )
    for column in ("document", "tokens", "bytes"):
        if not np.array_equal(getattr(a, column), getattr(b, column)):
            first = int(np.argmax(getattr(a, column) != getattr(b, column)))
            raise DataError(f"compare: the same reference set, but column {column} differs from sample {first} on")
    return paired_difference(a.loss, b.loss, a.tokens, clusters_of(a, b), **JUDGED, level=level)


def clusters_of(a: LossTable, b: LossTable) -> NDArray[np.int64]:
    """What the errors of two tables of one set are clustered by, [N]: families, where either table knows them."""
    return a.cluster if a.family is not None else b.cluster


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
    clusters_C = documents_C
    for table in (a, b):
        if table.family is not None:
            clusters_C = table.family[np.searchsorted(table.document, documents_C)]
    return paired_difference(bits_a_C, bits_b_C, bytes_a_C, clusters_C, **JUDGED, level=level)


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
    elif comparison.shares > 1:
        where = f"among {comparison.shares:.0f} comparisons along a run"
    return [f"with {found.clusters} documents no change, however large, can be significant {where}"]
