"""Which samples and documents changed most between two models, with their text. For looking, not for testing.

Legend: `_N` one entry a sample, `_D` one a document.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.run.facts import read_reference_facts
from eval.compare.pair import compare_tables
from eval.statistics import by_cluster
from eval.tables import LossTable

MOST_TEXT = 300  # characters


@dataclass(frozen=True)
class Change:
    """A sample or document (`sample` is None): losses and their change in nats per token, and how its text begins.

    `text`: what was scored, at most 300 characters, an ellipsis where it goes on.
    """

    sample: int | None
    document: int
    source: str
    tokens: int
    loss_a: float
    loss_b: float
    change: float
    text: str

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Changed:
    """Those whose loss fell and rose most from A to B, the largest change first."""

    a: str
    b: str
    samples_fell: tuple[Change, ...]
    samples_rose: tuple[Change, ...]
    documents_fell: tuple[Change, ...]
    documents_rose: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        def listed(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
            return [change.to_json() for change in changes]

        return {
            "a": self.a,
            "b": self.b,
            "unit": "nats per token",
            "samples": {"fell": listed(self.samples_fell), "rose": listed(self.samples_rose)},
            "documents": {"fell": listed(self.documents_fell), "rose": listed(self.documents_rose)},
        }


def most_changed(a: LossTable, b: LossTable, reference_dir: Path, count: int) -> Changed:
    """The `count` samples and the `count` documents whose loss per token changed most, in each direction.

    A document's loss is that of all its scored tokens. What did not change is not listed.

    Raises:
        DataError: `count` below 1, tables that cannot be paired by sample, or a reference set that is not theirs.
    """
    if count < 1:
        raise DataError(f"--changed: {count} is not a number of samples of 1 or more")
    if compare_tables(a, b).paired_by != "sample":
        raise DataError("--changed: the two were scored under other tokenizers; samples cannot be set side by side")
    _check_reference(a, reference_dir)
    document_N, bytes_N = _samples_of(reference_dir)

    change_N = (b.loss - a.loss) / a.tokens
    ids_D, tokens_D = np.unique(a.document), by_cluster(a.tokens, a.document)
    loss_a_D, loss_b_D = by_cluster(a.loss, a.document), by_cluster(b.loss, a.document)
    change_D = by_cluster(b.loss - a.loss, a.document) / tokens_D
    samples = [_first(change_N, count), _first(-change_N, count)]
    documents = [_first(change_D, count), _first(-change_D, count)]
    needed = np.unique(np.concatenate([*(a.document[rows] for rows in samples), *(ids_D[rows] for rows in documents)]))
    texts = _texts_of(reference_dir, needed)
    starts_N = np.cumsum(bytes_N) - bytes_N  # bytes of all documents before a sample, then of its own
    first_N = starts_N - starts_N[np.searchsorted(document_N, document_N)]

    def sample(row: int) -> Change:
        document = int(a.document[row])
        source, text = texts[document]
        # Samples cover a document's bytes one after the other, so no tokenizer is needed to cut one out.
        cut = text.encode()[first_N[row] : first_N[row] + bytes_N[row]].decode(errors="replace")
        return _change(row, document, source, cut, a.tokens[row], a.loss[row], b.loss[row])

    def whole(row: int) -> Change:
        source, text = texts[int(ids_D[row])]
        return _change(None, int(ids_D[row]), source, text, tokens_D[row], loss_a_D[row], loss_b_D[row])

    names = [str(table.meta.get("label") or name) for table, name in ((a, "A"), (b, "B"))]
    return Changed(
        names[0],
        names[1],
        samples_fell=tuple(sample(int(row)) for row in samples[0]),
        samples_rose=tuple(sample(int(row)) for row in samples[1]),
        documents_fell=tuple(whole(int(row)) for row in documents[0]),
        documents_rose=tuple(whole(int(row)) for row in documents[1]),
    )


def _first(change: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` lowest below zero, the lowest first; equal ones in their order."""
    lowest = np.argsort(change, kind="stable")[:count]
    return lowest[change[lowest] < 0].astype(np.int64)


def _change(
    sample: int | None, document: int, source: str, text: str, tokens: float, loss_a: float, loss_b: float
) -> Change:
    if len(text) > MOST_TEXT:
        text = f"{text[: MOST_TEXT - 1]}…"
    before, after = float(loss_a) / float(tokens), float(loss_b) / float(tokens)
    return Change(sample, document, source, int(tokens), before, after, after - before, text)


def _check_reference(table: LossTable, reference_dir: Path) -> None:
    found = read_reference_facts(reference_dir, "fingerprints.tokens")["fingerprints"]["tokens"]
    wanted = table.meta.get("reference")
    if found != wanted:
        raise DataError(
            f"--changed: the tables were scored on reference set {str(wanted)[:8]}, "
            f"but {reference_dir} is {str(found)[:8]}; give theirs with --reference"
        )


def _samples_of(reference_dir: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(document [N], bytes [N]) of all samples: what they cover, whichever targets in them were scored."""
    table = _read(reference_dir / "samples.parquet", ["document", "bytes"])
    return tuple(np.asarray(table[name], dtype=np.int64) for name in ("document", "bytes"))  # type: ignore[return-value]


def _texts_of(reference_dir: Path, documents: NDArray[np.int64]) -> dict[int, tuple[str, str]]:
    """(source, text) of some documents by number."""
    table = _read(reference_dir / "documents.parquet", ["source", "text"]).take(documents)
    pairs = zip(table["source"].to_pylist(), table["text"].to_pylist(), strict=True)
    return dict(zip(documents.tolist(), pairs, strict=True))


def _read(path: Path, columns: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            return pq.ParquetFile(file).read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
