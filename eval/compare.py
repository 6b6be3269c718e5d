"""Paired verdicts: between two loss tables, and along the checkpoints of a run. Prints nothing."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.rundir import RunDir, read_jsonl, step_name
from eval.statistics import PairedDifference, adjusted_p, by_cluster, clustered_ratio, detectable, spent_alpha
from eval.statistics.paired import paired_difference
from eval.tables import LossTable, read_table
from eval.targets import most_scored

Verdict = Literal["better", "worse", "no difference seen", "identical"]
Gate = Literal["better", "not-worse"]
PairedBy = Literal["sample", "document"]
ALPHA = 0.05
# With fewer documents the t interval of a clustered error is liberal: it claims .067 at 5 % with 20 of them.
FEW_DOCUMENTS = 40
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
    """B − A on the same reference set. Better: B's loss is lower."""

    a: Side
    b: Side
    difference: PairedDifference
    look: int | None
    alpha: float
    unit: str
    paired_by: PairedBy
    reference: str
    cautions: tuple[str, ...] = ()

    @property
    def p_adjusted(self) -> float:
        return adjusted_p(self.difference.p, self.look)

    @property
    def detectable_percent(self) -> float:
        """Smallest change seen with probability .8, at the error rate that this look may spend."""
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

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare A B --json` prints (docs/design.md, section 2); null where a number is infinite.

        In bits per byte `nats` is null and `bits_per_byte` has the difference.
        """
        found = self.difference
        verdict = self.verdict
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
            },
            "verdict": verdict,
            "limited_by": "samples" if verdict == "no difference seen" else None,
            "wobble_percent": None,
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
) -> Comparison:
    """The paired comparison of two tables, `b` against `a`.

    Tables of the same reference set are paired by sample, in nats per token. Tables of the same texts
    under two tokenizers are paired by document, in bits per byte.

    Args:
        look: None for a comparison that stands by itself; 1, 2, … along a run, where α·6/(π²k²) may be spent.
        names: what to call the two; default their labels.

    Raises:
        DataError: they have nothing in common to pair by, other objectives, or fewer than two documents.
    """
    objectives = a.meta.get("objective"), b.meta.get("objective")
    if objectives[0] != objectives[1]:
        raise DataError(f"compare: the objectives differ ({objectives[0]} and {objectives[1]}); nothing can be paired")
    if _same(a, b, "reference"):
        reference, paired_by, unit = str(a.meta["reference"]), "sample", NATS
        found = _by_sample(a, b)
    elif _same(a, b, "reference_text"):
        reference, paired_by, unit = str(a.meta["reference_text"]), "document", BITS
        found = _by_document(a, b)
    else:
        raise DataError(
            f"compare: scored on different reference sets ({_reference_words(a)} and {_reference_words(b)}); "
            "score both on one with: vernier eval MODEL --reference REF"
        )
    labels = names or (str(a.meta.get("label") or "A"), str(b.meta.get("label") or "B"))
    return Comparison(
        a=_side(a, labels[0], found.a.value, found.a.se, found.clusters),
        b=_side(b, labels[1], found.b.value, found.b.se, found.clusters),
        difference=found,
        look=look,
        alpha=alpha,
        unit=unit,
        paired_by="sample" if paired_by == "sample" else "document",
        reference=reference,
        cautions=tuple(_cautions(a, b, found, unit)),
    )


def _same(a: LossTable, b: LossTable, key: str) -> bool:
    return a.meta.get(key) is not None and a.meta.get(key) == b.meta.get(key)


def _reference_words(table: LossTable) -> str:
    name, fingerprint = table.meta.get("reference_name"), table.meta.get("reference")
    return " ".join(str(w)[:16] for w in (name, fingerprint) if w) or "one without a fingerprint"


def _side(table: LossTable, name: str, loss: float, se: float, documents: int) -> Side:
    return Side(name, loss, se, len(table), documents, int(np.sum(table.tokens, dtype=np.int64)))


def _by_sample(a: LossTable, b: LossTable) -> PairedDifference:
    if len(a) != len(b):
        raise DataError(
            f"compare: the same reference set, but {len(a):,} samples in one table, {len(b):,} in the other"
        )
    for column in ("document", "tokens", "bytes"):
        if not np.array_equal(getattr(a, column), getattr(b, column)):
            first = int(np.argmax(getattr(a, column) != getattr(b, column)))
            raise DataError(f"compare: the same reference set, but column {column} differs from sample {first} on")
    return paired_difference(a.loss, b.loss, a.tokens, a.document)


def _by_document(a: LossTable, b: LossTable) -> PairedDifference:
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
    return paired_difference(bits_a_C, bits_b_C, bytes_a_C, documents_C)


def _bits(table: LossTable) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.float64]]:
    """(document ids ascending, loss in bits of each, bytes of each)."""
    bits_C = by_cluster(table.loss, table.document) / math.log(2)
    return np.unique(table.document), bits_C, by_cluster(table.bytes, table.document)


def _cautions(a: LossTable, b: LossTable, found: PairedDifference, unit: str) -> list[str]:
    out = []
    if unit == BITS:
        out.append("other tokens of the same texts: compared in bits per byte, paired by document")
    dtypes = a.meta.get("dtype"), b.meta.get("dtype")
    if dtypes[0] != dtypes[1]:
        out.append(f"unequal dtype: one was scored in {dtypes[0]}, the other in {dtypes[1]}; part may be rounding")
        if _same(a, b, "source"):
            out.append("the same weights scored in two dtypes: this difference is rounding, not training")
    hardware = a.meta.get("hardware"), b.meta.get("hardware")
    if hardware[0] != hardware[1] and None not in hardware:
        out.append(f"scored on other hardware ({hardware[0]} and {hardware[1]}): last digits differ by that alone")
    if min(found.clusters, found.effective_clusters) < FEW_DOCUMENTS:
        out.append(
            f"{found.clusters} documents, worth {found.effective_clusters:.0f} of equal size: "
            f"below {FEW_DOCUMENTS} the intervals are too narrow and the p-values too small"
        )
    return out


def gate_holds(comparison: Comparison, gate: Gate, margin_percent: float = 0.0) -> bool:
    """Whether the upper 95 % bound of B − A is below −margin (better) or below margin (not-worse).

    Identical tables are not worse at any margin, zero included.
    """
    upper = comparison.difference.ci95_percent[1]
    if gate == "better":
        return upper < -margin_percent
    if gate == "not-worse":
        return upper < margin_percent or comparison.verdict == "identical"
    raise ConfigError(f"--gate: {gate!r} is not a verdict; use better or not-worse")


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A scored step of a run. `tokens`: trained on up to it, None where the run does not say."""

    step: int
    tokens: int | None
    side: Side
    versus_previous: Comparison | None
    versus_first: Comparison | None


@dataclass(frozen=True)
class RunComparison:
    """The scored checkpoints of a run in step order. `notes`: what was left out, for people."""

    run: str
    reference: str
    checkpoints: tuple[ScoredCheckpoint, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare RUN --json` prints (docs/design.md, section 2)."""
        return {
            "run": self.run,
            "reference": self.reference,
            "checkpoints": [
                {
                    "step": point.step,
                    "tokens": point.tokens,
                    "loss": finite(point.side.loss),
                    "se": finite(point.side.se),
                    "versus_previous": point.versus_previous and point.versus_previous.to_json(),
                    "versus_first": point.versus_first and point.versus_first.to_json(),
                }
                for point in self.checkpoints
            ],
        }


def compare_run(run_dir: Path, *, alpha: float = ALPHA) -> RunComparison:
    """Compares every scored step of a run with the one before and with the first; look k = 1, 2, … at each.

    Where it was scored in several ways (references, objectives, dtypes), that with most tables is taken.

    Raises:
        DataError: nothing is scored yet, or a table is broken.
    """
    scale, paths, others = most_scored(run_dir)
    trained = _tokens_by_step(RunDir(run_dir))
    points: list[ScoredCheckpoint] = []
    first = previous = None
    for look, (step, path) in enumerate(sorted(paths.items())):
        table = read_table(path)
        table = replace(table, meta={**table.meta, "label": step_name(step)})
        try:
            own = clustered_ratio(table.loss, table.tokens, table.document)
            before = None if previous is None else compare_tables(previous, table, look=look, alpha=alpha)
            start = None if first is None else compare_tables(first, table, look=look, alpha=alpha)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        side = _side(table, step_name(step), own.value, own.se, own.clusters)
        points.append(ScoredCheckpoint(step, _tokens_at(trained, step), side, before, start))
        first, previous = first or table, table
    reference = str(previous.meta.get("reference")) if previous else ""
    notes = (
        [f"scored in other ways too; shown is {scale.words}, not {', '.join(o.words for o in others)}"]
        if others
        else []
    )
    return RunComparison(str(run_dir), reference, tuple(points), tuple(notes))


def _tokens_by_step(run: RunDir) -> tuple[list[int], list[int]]:
    """Steps in `metrics.jsonl`, ascending, and the tokens trained on up to each."""
    known = {line["step"]: line["tokens"] for line in read_jsonl(run.metrics) if "step" in line and "tokens" in line}
    steps = sorted(known)
    return steps, [int(known[step]) for step in steps]


def _tokens_at(trained: tuple[list[int], list[int]], step: int) -> int | None:
    steps, tokens = trained
    at = bisect_right(steps, step)
    if step == 0:
        return 0
    return tokens[at - 1] if at else None
