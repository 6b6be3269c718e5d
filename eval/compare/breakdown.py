"""Where two models differ: the paired difference by source, by length of document, or by place in the window.

One verdict for the whole set is `eval.compare.pair`; here no row is a verdict by itself, hence p-values adjusted for
all.
Legend: `_N` one entry a sample, `_D` one a document, `_K` one a position bin.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.compare.pair import ALPHA, JUDGED, clusters_of, compare_tables, finite
from eval.statistics import by_cluster, holm, holm_shares
from eval.statistics.paired import paired_difference
from eval.tables import POSITION_BINS, LossTable

KINDS = ("source", "length", "position")
MOST_ROWS = 12
LENGTH_BINS = 8
LEAST_DOCUMENTS = 6  # with fewer, flipping signs can give no p below 5 %
OTHERS = "others"


@dataclass(frozen=True)
class Row:
    """The difference B − A on a part of the set: losses in nats per token, the change in percent of A's loss there.

    `ci95` in percent, all rows together; a bound may be infinite (few documents, whose bounds are each row's own).
    `p_holm`: adjusted for all rows.
    """

    label: str
    samples: int
    documents: int
    tokens: int
    loss_a: float
    loss_b: float
    percent: float
    se_percent: float
    ci95: tuple[float, float]
    p: float
    p_holm: float
    win_rate: float

    def to_json(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers = {key: finite(value) for key, value in content.items() if isinstance(value, float)}
        return {**content, **numbers, "ci95": [finite(bound) for bound in self.ci95]}


@dataclass(frozen=True)
class Breakdown:
    """Rows of one kind ("source", "length", "position"), and what a reader should know of how they were made."""

    by: str
    a: str
    b: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "a": self.a,
            "b": self.b,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Part:
    """Which samples (indices) belong to a row, with both sums of loss and the scored targets of each."""

    label: str
    rows_N: NDArray[np.int64]
    loss_a_N: NDArray[np.float64]
    loss_b_N: NDArray[np.float64]
    tokens_N: NDArray[Any]


def breakdown(
    a: LossTable, b: LossTable, by: str, *, sources: Sequence[str] | None, sequence_length: int | None
) -> Breakdown:
    """The clustered paired difference on each part of the reference set.

    By "source": groups of documents by the first two parts of their source's path; groups of fewer than 6 documents
    go up to the first part, then to "others", and at most 12 rows are given. By "length": of the document in scored
    tokens, in bins of about equal numbers of documents (nearly all samples are full windows, so their own length says
    nothing). By "position": the 16 bins of a table, each sequence_length/16 targets of the window.

    Args:
        sources: of each document, in the reference set's order; needed by "source" alone.
        sequence_length: tokens of a window; None: bins of positions are numbered instead.

    Raises:
        DataError: another `by`, tables that cannot be paired by sample, or what it needs is not there.
    """
    if by not in KINDS:
        raise DataError(f"--by: {by!r} is none of {', '.join(KINDS)}")
    if compare_tables(a, b).paired_by != "sample":
        raise DataError(f"--by {by}: the two were scored under other tokenizers; parts are compared by sample only")
    parts, notes = {
        "source": lambda: _by_source(a, b, sources),
        "length": lambda: _by_length(a, b),
        "position": lambda: _by_position(a, b, sequence_length),
    }[by]()
    found = [(part, paired) for part in parts if (paired := _paired(part, clusters_of(a, b), len(parts))) is not None]
    if not found:
        raise DataError(f"--by {by}: no part of the set has 2 documents and a loss above zero")
    if len(found) < len(parts):
        notes.append(f"{len(parts) - len(found)} of {len(parts)} parts left out: fewer than 2 documents, or no loss")
    p = [paired.p for _, paired in found]
    adjusted, shares = holm(p), holm_shares(p)
    # Holm never gives less for a larger p, so this is the best that each row could get.
    best = holm([paired.smallest_p for _, paired in found])
    mute = [part.label for (part, _), p in zip(found, best, strict=True) if p >= ALPHA]
    if mute:
        notes.append(f"too few documents for any change to be significant among {len(found)} rows: {', '.join(mute)}")
    rows = tuple(
        Row(
            label=part.label,
            samples=len(part.rows_N),
            documents=len(np.unique(a.document[part.rows_N])),
            tokens=int(part.tokens_N.sum(dtype=np.int64)),
            loss_a=paired.a.value,
            loss_b=paired.b.value,
            percent=paired.percent,
            se_percent=paired.se_percent,
            ci95=paired.ci95_percent if paired.method == "sign flips" else paired.interval_percent(1 - ALPHA / share),
            p=paired.p,
            p_holm=float(p_holm),
            win_rate=paired.win_rate,
        )
        for (part, paired), p_holm, share in zip(found, adjusted, shares, strict=True)
    )
    names = [str(table.meta.get("label") or name) for table, name in ((a, "A"), (b, "B"))]
    return Breakdown(by, names[0], names[1], rows, tuple(notes))


def _paired(part: _Part, clusters_N: NDArray[np.int64], parts: int) -> Any:
    clusters_N = clusters_N[part.rows_N]
    if len(np.unique(clusters_N)) < 2 or not part.loss_a_N.sum() > 0:
        return None
    return paired_difference(
        part.loss_a_N,
        part.loss_b_N,
        part.tokens_N,
        clusters_N,
        **JUDGED,
        level=ALPHA / parts,
    )


def _of_documents(a: LossTable, b: LossTable, groups: dict[str, NDArray[np.bool_]]) -> list[_Part]:
    """Parts that are whole documents. `groups`: by label, a mask [D] over documents by number."""
    out = []
    for label, mask_D in groups.items():
        rows_N = np.flatnonzero(mask_D[a.document])
        out.append(_Part(label, rows_N, a.loss[rows_N], b.loss[rows_N], a.tokens[rows_N]))
    return out


def _by_source(a: LossTable, b: LossTable, sources: Sequence[str] | None) -> tuple[list[_Part], list[str]]:
    if sources is None:
        raise DataError("--by source: needs the sources of the documents, which the reference set has")
    count = int(a.document.max()) + 1
    if len(sources) < count:
        raise DataError(f"--by source: {len(sources):,} sources for {count:,} documents; not the set that was scored")
    label_D = np.asarray(group_sources(sources[:count]))
    groups = {str(label): label_D == label for label in _by_size(label_D.tolist())}
    every = set(group_sources(sources[:count], most=count + 1))
    notes = [f"groups of fewer than {LEAST_DOCUMENTS} documents are joined"] if OTHERS in every else []
    if len(every) > MOST_ROWS:
        notes.append(f"{len(every)} groups: all but the {MOST_ROWS - 1} with most documents are joined as {OTHERS}")
    return _of_documents(a, b, groups), notes


def _by_size(labels: Sequence[str]) -> list[str]:
    """Distinct labels, that with most documents first, the joined rest last."""
    counts = Counter(labels)
    return sorted(counts, key=lambda label: (label == OTHERS, -counts[label], label))


def group_sources(sources: Sequence[str], most: int = MOST_ROWS, least: int = LEAST_DOCUMENTS) -> list[str]:
    """A group for each source: its path's first two parts where `least` documents have them, else its first, else
    "others"; at most `most` groups. A leading scheme or /, a row (`file.jsonl#12`) and folders that all share but the
    last do not count.
    """
    paths = [re.sub(r"^\w+://|#[^/]*$", "", source).strip("/").split("/") for source in sources]
    shared = _shared_folders(paths)
    labels = _by_folder([path[max(0, shared - 1) :] for path in paths], least)
    counts = Counter(labels)
    labels = [label if counts[label] >= least else OTHERS for label in labels]
    ranked = _by_size(labels)
    kept = set(ranked if len(ranked) <= most else [r for r in ranked if r != OTHERS][: most - 1])
    labels = [label if label in kept else OTHERS for label in labels]
    if labels.count(OTHERS) == 1 and len(set(labels)) > 1:  # one document has no error bar: the smallest joins it
        smallest = [label for label in _by_size(labels) if label != OTHERS][-1]
        labels = [OTHERS if label == smallest else label for label in labels]
    return labels


def _by_folder(paths: list[list[str]], least: int) -> list[str]:
    """A label for each path: two parts of it where `least` have them, else the first, or what is the rest of that."""
    labels = ["/".join(path[:2]) for path in paths]
    counts = Counter(labels)
    split = {path[0] for path, label in zip(paths, labels, strict=True) if counts[label] >= least and len(path) > 1}
    one = len({path[0] for path in paths}) == 1
    for at, (label, path) in enumerate(zip(labels, paths, strict=True)):
        if counts[label] < least:
            rest = OTHERS if one else f"{path[0]} (rest)"  # the rest of the only one is simply the rest
            labels[at] = rest if path[0] in split else path[0]
    return labels


def _shared_folders(paths: Sequence[list[str]]) -> int:
    """How many leading folders all paths have in common."""
    first, last = min(paths), max(paths)
    most = min(len(first), len(last)) - 1
    return next((k for k in range(most) if first[k] != last[k]), most)


def _by_length(a: LossTable, b: LossTable) -> tuple[list[_Part], list[str]]:
    tokens_D = np.zeros(int(a.document.max()) + 1)
    tokens_D[np.unique(a.document)] = by_cluster(a.tokens, a.document)
    there_D = tokens_D > 0
    lengths_D = tokens_D[there_D]
    bins = max(1, min(LENGTH_BINS, len(lengths_D) // LEAST_DOCUMENTS))
    # Bins begin at whole lengths. Documents are often cut at one length, which then is a bin by itself.
    edges = np.unique(np.ceil(np.quantile(lengths_D, np.arange(bins) / bins)))
    groups = {}
    for low, after in zip(edges, [*edges[1:], np.inf], strict=True):
        mask_D = there_D & (tokens_D >= low) & (tokens_D < after)
        lowest, highest = int(tokens_D[mask_D].min()), int(tokens_D[mask_D].max())
        label = f"{lowest:,}" if lowest == highest else f"{lowest:,}–{highest:,}"
        groups[f"{label} tokens"] = mask_D
    return _of_documents(a, b, groups), [
        "length: scored tokens of the whole document, as the reference set cut it; its samples are mostly full windows"
    ]


def _by_position(a: LossTable, b: LossTable, sequence_length: int | None) -> tuple[list[_Part], list[str]]:
    loss_a_NK, tokens_NK = _positions(a, "A")
    loss_b_NK, tokens_b_NK = _positions(b, "B")
    if not np.array_equal(tokens_NK, tokens_b_NK):
        raise DataError("--by position: the two tables count other targets by position; score both again")
    parts = []
    for k in range(POSITION_BINS):
        rows_N = np.flatnonzero(tokens_NK[:, k] > 0)
        if not len(rows_N):
            continue  # a window of fewer than 16 tokens
        parts.append(
            _Part(
                _bin_label(k, sequence_length),
                rows_N,
                loss_a_NK[rows_N, k],
                loss_b_NK[rows_N, k],
                tokens_NK[rows_N, k],
            )
        )
    note = "position: of the target in its window; a document's last window has context that was scored before"
    return parts, [note]


def _positions(table: LossTable, name: str) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    if table.position_loss is None or table.position_tokens is None:
        which = table.meta.get("label") or name
        raise DataError(f"--by position: the table of {which} has no losses by position; score it again")
    return table.position_loss, table.position_tokens


def _bin_label(k: int, sequence_length: int | None) -> str:
    if sequence_length is None:
        return f"bin {k + 1} of {POSITION_BINS}"
    # Target t of L is in bin ⌊16·t/L⌋ (eval.scoring.losses), so bin k begins at ⌈k·L/16⌉.
    first, after = (-(-edge * sequence_length // POSITION_BINS) for edge in (k, k + 1))
    return f"tokens {first + 1}–{after}" if after - first > 1 else f"token {after}"
