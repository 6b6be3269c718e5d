"""The reference set: frozen documents, cut into the samples that every checkpoint is scored on.

Windows follow the rolling rule of lm-evaluation-harness: every token and byte is scored exactly once. Of a document
with a prompt, the response's are.
Legend: `_N` one entry a sample, `_D` one a document, `_BT` rows of a batch by position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.facts import read_reference_facts
from configs.files.atomic import read_manifest, verify, whole_directory, write_json
from configs.run.directory import tables_folder
from eval.reference.tokenizer import (
    TextTokenizer,
    check_repeatable,
    copy_tokenizer_files,
    open_tokenizer,
    tokenizer_fingerprint,
)
from eval.reference.windows import LARGEST_SHARE, Samples, cut_documents, document_sha256, make_samples

__all__ = [
    "ReferenceSet",
    "build_reference",
    "load_reference",
    "read_documents",
    "retokenize",
    "tokenizer_fingerprint",
]

KIND = "reference"


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """A reference set in memory, samples in reference order.

    `input_ids` holds the ids of sample i at `offsets[i]:offsets[i + 1]`: at most `sequence_length` + 1,
    of which the targets from `labels_from[i]` on are scored (target j is predicted from the ids before it).
    Documents of one family share a long run of tokens; it is called by the number of its first document.
    `objective` is "prompt" where a document has a prompt, which is context only, "masked" where a masked LM is to be
    scored; else "causal".
    """

    directory: Path
    name: str
    text_fingerprint: str
    tokens_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    sequence_length: int
    documents: int
    batch_count: int
    sample: NDArray[np.int64]
    document: NDArray[np.int64]
    block: NDArray[np.int32]
    batch: NDArray[np.int32]
    labels_from: NDArray[np.int32]
    tokens: NDArray[np.int32]
    bytes: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    objective: str = "causal"
    family: NDArray[np.int64] | None = None  # of each sample's document; None: each is one of its own

    @property
    def short_name(self) -> str:
        """What the folder of its loss tables is called."""
        return tables_folder(self.name, self.tokens_fingerprint)

    @cached_property
    def _by_batch(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order_N = np.argsort(self.batch, kind="stable").astype(np.int64)
        return order_N, np.searchsorted(self.batch[order_N], np.arange(self.batch_count + 1)).astype(np.int64)

    def batch_samples(self, batch: int) -> NDArray[np.int64]:
        """The samples that are scored together as `batch`, ascending, int64 [B]."""
        order_N, starts = self._by_batch
        return order_N[starts[batch] : starts[batch + 1]]

    def batch_inputs(self, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(ids int64 [B, T] padded with 0 on the right, first scored target int64 [B], length int64 [B])."""
        rows = self.batch_samples(batch)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        at_BT = np.arange(lengths.max())[None, :]
        real_BT = at_BT < lengths[:, None]
        ids_BT = np.zeros(real_BT.shape, np.int64)
        ids_BT[real_BT] = self.input_ids[(self.offsets[rows][:, None] + at_BT)[real_BT]]
        return ids_BT, self.labels_from[rows].astype(np.int64), lengths


def build_reference(
    directory: Path,
    sources: Sequence[str],
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    *,
    name: str,
    sequence_length: int,
    batch: int,
    block_samples: int,
    max_windows: int | None,
    drawn: dict[str, Any] | None = None,
    decontamination: dict[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
    families: Sequence[int] | None = None,
    objective: str | None = None,
) -> dict[str, Any]:
    """Writes the reference set of `texts`, in their order, as the whole directory `directory`.

    Args:
        max_windows: a document is cut after so many windows, or fewer where one would be more than 1 % of
            all tokens; None: the texts stay as they are (they were cut before).
        drawn: how the documents were chosen, for the record.
        decontamination: what was done to keep them out of the training data, for the record.
        prompts: of each text, "" where it has none.
        families: of each text, a number that those share which have long passages in common; None: none have.
        objective: that the set is for; None: "prompt" where there is a prompt, else "causal".

    Returns:
        What `reference.json` says.

    Raises:
        DataError: fewer than two documents.
    """
    kept, documents, cut = cut_documents(texts, tokenizer, sequence_length, max_windows, prompts)
    sources = [sources[at] for at in kept]
    if len(documents) < 2:
        raise DataError(f"reference: {len(documents)} documents are left, at least 2 are needed")
    samples = make_samples(documents, tokenizer.prefix_id, sequence_length, batch, block_samples)
    sha256s = [document_sha256(d.text, d.prompt) for d in documents]
    text_fingerprint = hashlib.sha256("\n".join(sha256s).encode()).hexdigest()
    tokens_fingerprint = _tokens_fingerprint(text_fingerprint, tokenizer.fingerprint, sequence_length, samples)
    tokens_D = np.bincount(samples.document, weights=samples.tokens)
    prompted = any(d.prompt for d in documents)
    family_D = None if families is None else _first_members([families[at] for at in kept])
    related = family_D is not None and len(np.unique(family_D)) < len(family_D)
    facts = {
        "name": name,
        **({"objective": objective or "prompt"} if objective or prompted else {}),
        "fingerprints": {"text": text_fingerprint, "tokens": tokens_fingerprint},
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "prefix_id": tokenizer.prefix_id,
        },
        "sequence_length": sequence_length,
        "batch": batch,
        "block_samples": block_samples,
        "counts": {
            "documents": len(documents),
            **({"families": len(np.unique(family_D))} if related and family_D is not None else {}),
            "samples": len(samples.document),
            "tokens": int(samples.tokens.sum()),
            "bytes": int(samples.bytes.astype(np.int64).sum()),
            "blocks": int(samples.block[-1]) + 1,
            "batches": int(samples.batch.max()) + 1,
            "largest_document_share": float(tokens_D.max() / tokens_D.sum()),
            "effective_documents": float(tokens_D.sum() ** 2 / (tokens_D**2).sum()),
        },
        "cut": {**cut, "largest_share_wanted": LARGEST_SHARE},
        "drawn": drawn or {},
        "decontamination": decontamination or {},
    }
    with whole_directory(directory, {"kind": KIND, "name": name, "fingerprints": facts["fingerprints"]}) as part:
        copy_tokenizer_files(tokenizer.directory, part / "tokenizer")
        own: dict[str, Sequence[Any]] = {"prompt": [d.prompt for d in documents]} if prompted else {}
        if related and family_D is not None:  # a set without is the same files as ever
            own["family"] = family_D.tolist()
        _write_documents(part / "documents.parquet", sources, [d.text for d in documents], sha256s, own)
        _write_samples(part / "samples.parquet", samples)
        write_json(part / "reference.json", facts)
    return facts


def load_reference(directory: Path, check: bool = True) -> ReferenceSet:
    """Reads a reference set; with `check`, only if every file's hash and the arrays' fingerprint are right.

    Raises:
        DataError: missing, not whole, or changed.
    """
    if check:
        verify(directory, KIND)
    else:
        read_manifest(directory, KIND)
    facts = read_reference_facts(directory)
    samples = _read_samples(directory / "samples.parquet")
    prints = facts["fingerprints"]
    if check:
        found = _tokens_fingerprint(
            prints["text"], facts["tokenizer"]["fingerprint"], facts["sequence_length"], samples
        )
        if found != prints["tokens"]:
            raise DataError(f"{directory}: its samples are not those that its fingerprint was taken of")
    return ReferenceSet(
        directory=directory,
        name=facts["name"],
        text_fingerprint=prints["text"],
        tokens_fingerprint=prints["tokens"],
        tokenizer_fingerprint=facts["tokenizer"]["fingerprint"],
        vocab_size=facts["tokenizer"]["vocab_size"],
        sequence_length=facts["sequence_length"],
        documents=facts["counts"]["documents"],
        batch_count=facts["counts"]["batches"],
        sample=np.arange(len(samples.document), dtype=np.int64),
        objective=facts.get("objective", "causal"),
        family=None if (family_D := read_families(directory)) is None else family_D[samples.document],
        **samples.arrays(),
    )


def retokenize(
    reference_dir: Path, tokenizer_dir: Path, out_dir: Path, *, sequence_length: int | None = None
) -> ReferenceSet:
    """The same documents, by the same rule, for another tokenizer: the text fingerprint stays.

    `sequence_length`: of the new windows, where a model takes fewer tokens than the old ones have.

    Raises:
        DataError: one of the inputs is not what it should be, or `out_dir` is there already.
    """
    if out_dir.exists():
        raise DataError(f"--out: {out_dir} is there already; name a directory that is not")
    verify(reference_dir, KIND)
    facts = read_reference_facts(reference_dir)
    sources, texts, prompts = read_documents(reference_dir)
    tokenizer = open_tokenizer(tokenizer_dir, "--tokenizer")
    check_repeatable(tokenizer, texts, "--tokenizer")
    made = build_reference(
        out_dir,
        sources,
        texts,
        tokenizer,
        name=facts["name"],
        sequence_length=sequence_length or facts["sequence_length"],
        batch=facts["batch"],
        block_samples=facts["block_samples"],
        max_windows=None,
        drawn=facts["drawn"],
        decontamination=facts["decontamination"],
        prompts=prompts,
        families=None if (family_D := read_families(reference_dir)) is None else family_D.tolist(),
        objective=facts.get("objective"),
    )
    assert made["fingerprints"]["text"] == facts["fingerprints"]["text"]
    return load_reference(out_dir, check=False)


def _tokens_fingerprint(text: str, tokenizer: str, sequence_length: int, samples: Samples) -> str:
    digest = hashlib.sha256(f"{text} {tokenizer} {sequence_length}".encode())
    for name, array in samples.arrays().items():
        digest.update(f" {name} {len(array)} ".encode())
        digest.update(array.astype(np.dtype("<i8")).data)
    return digest.hexdigest()


def read_documents(directory: Path) -> tuple[list[str], list[str], list[str]]:
    """(sources, texts, prompts) of a reference set's documents, in its order; a prompt is "" where there is none.

    Raises:
        DataError: they are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "documents.parquet"
    try:
        there = pq.read_schema(path).names
        asked = ["source", "text", *(["prompt"] if "prompt" in there else [])]
        table = pq.read_table(path, columns=asked, page_checksum_verification=True)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as a reference set's documents ({said})") from None
    texts = table["text"].to_pylist()
    prompts = table["prompt"].to_pylist() if "prompt" in there else [""] * len(texts)
    return table["source"].to_pylist(), texts, prompts


def read_families(directory: Path) -> NDArray[np.int64] | None:
    """The family of each document, called by the number of its first, int64 [D]; None where the set does not say.

    Raises:
        DataError: the documents are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / "documents.parquet"
    try:
        if "family" not in pq.read_schema(path).names:
            return None
        return np.asarray(pq.read_table(path, columns=["family"])["family"], dtype=np.int64)
    except (OSError, ValueError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as a reference set's documents ({said})") from None


def _first_members(families: Sequence[int]) -> NDArray[np.int64]:
    """The place of the first document of each one's family, int64 [D]."""
    _, first, index_D = np.unique(np.asarray(families), return_index=True, return_inverse=True)
    return first[index_D].astype(np.int64)


def _write_documents(
    path: Path, sources: Sequence[str], texts: Sequence[str], sha256s: Sequence[str], own: dict[str, Sequence[Any]]
) -> None:
    """`own`: columns that not every set has, by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number_D = pa.array(np.arange(len(texts), dtype=np.int64))
    # large_string: the 32-bit offsets of plain strings end at 2 GiB of text.
    columns = {
        "document": number_D,
        "sha256": pa.array(sha256s, pa.string()),
        "source": pa.array(sources, pa.string()),
        "text": pa.array(texts, pa.large_string()),
        "order": number_D,
    }
    kinds = {"prompt": pa.large_string(), "family": pa.int64()}
    columns |= {name: pa.array(values, kinds[name]) for name, values in own.items()}
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def _write_samples(path: Path, samples: Samples) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.LargeListArray.from_arrays(pa.array(samples.offsets), pa.array(samples.input_ids))
    table = pa.table(
        {
            "sample": pa.array(np.arange(len(samples.document), dtype=np.int64)),
            "document": pa.array(samples.document),
            "block": pa.array(samples.block),
            "batch": pa.array(samples.batch),
            "input_ids": ids,
            "labels_from": pa.array(samples.labels_from),
            "tokens": pa.array(samples.tokens),
            "bytes": pa.array(samples.bytes),
        }
    )
    pq.write_table(table, path, write_page_checksum=True)


def _read_samples(path: Path) -> Samples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        ids = table["input_ids"]
        lengths = np.asarray(pa.compute.list_value_length(ids), dtype=np.int64)
        columns = {
            name: np.asarray(table[name]) for name in ("document", "block", "batch", "labels_from", "tokens", "bytes")
        }
        flat = np.asarray(pa.compute.list_flatten(ids))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a reference set's samples ({error})") from None
    return Samples(input_ids=flat, offsets=np.concatenate([[0], np.cumsum(lengths)]), **columns)
