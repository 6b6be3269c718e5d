"""Whether two loss tables may be compared, and what of them is not alike: said beside a verdict."""

from __future__ import annotations

from typing import Any

import numpy as np

from configs.errors import DataError
from eval.statistics import PairedDifference
from eval.statistics.paired import FEW_DOCUMENTS
from eval.tables import LossTable

BITS = "bits per byte"
DOMINATES = 0.25  # of the variance of a difference, in one document


def same(a: LossTable, b: LossTable, key: str) -> bool:
    """Whether both say the same of themselves under a key of their metadata."""
    return a.meta.get(key) is not None and a.meta.get(key) == b.meta.get(key)


def units(a: LossTable, b: LossTable) -> str:
    """What the errors of two tables are clustered by, in words."""
    return "documents" if a.family is None and b.family is None else "families of documents"


def part_of(table: LossTable) -> dict[str, Any] | None:
    """{"blocks": k, "of": K, "samples": n} where a table has the first blocks of its set only; None for a whole one."""
    part = table.meta.get("partial")
    return part if isinstance(part, dict) and part.get("blocks") != part.get("of") else None


def check_parts(a: LossTable, b: LossTable) -> None:
    """Refuses to set a part of a reference set against more of it.

    Raises:
        DataError: how much of it each has.
    """
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


def cautions_of(a: LossTable, b: LossTable, found: PairedDifference, unit: str) -> list[str]:
    """What a reader should know of how the two were scored."""
    out = []
    if unit == BITS and not same(a, b, "reference"):
        out.append("other tokens of the same texts: compared in bits per byte, paired by document")
    dtypes = a.meta.get("dtype"), b.meta.get("dtype")
    if dtypes[0] != dtypes[1]:
        out.append(f"unequal dtype: one was scored in {dtypes[0]}, the other in {dtypes[1]}; part may be rounding")
    if same(a, b, "source") and (dtypes[0] != dtypes[1] or not found.identical):
        out.append("the same weights scored twice: this difference is rounding, not training")
    hardware = a.meta.get("hardware"), b.meta.get("hardware")
    if hardware[0] != hardware[1] and None not in hardware:
        out.append(f"scored on other hardware ({hardware[0]} and {hardware[1]}): last digits differ by that alone")
    if found.largest_share > max(DOMINATES, 10 / found.clusters):  # of few documents one has as much by chance
        clusters = a.cluster if a.family is not None else b.cluster
        of = "document" if clusters is a.document or clusters is b.document else "the family of document"
        share = f"{100 * found.largest_share:.0f} % of the variance of this difference"
        out.append(f"{of} {np.unique(clusters)[found.largest]} has {share}")
    if found.skew:
        out.append("the documents' differences are skewed: p and the interval are the wider of Student's and Hall's")
    if found.method == "sign flips":
        out.append(
            f"{found.clusters} {units(a, b)}, worth {found.effective_clusters:.1f} of equal size: "
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
