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
from configs.files.atomic import read_manifest, verify, whole_directory, write_json
from configs.run.directory import tables_folder
from configs.run.facts import read_reference_facts
from eval.reference.chat import Example
from eval.reference.examples import EXAMPLES, encode_examples, example_samples
from eval.reference.files import (
    read_documents,
    read_families,
    read_labels,
    read_samples,
    write_documents,
    write_samples,
)
from eval.reference.labels import Labels
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
    scored: NDArray[np.bool_] | None = None  # of each of `input_ids`: a target or not; None: from `labels_from` on
    labels: Labels | None = None  # of each sample, where a classifier is to be scored

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
        rows, lengths, real_BT, places = self._laid_out(batch)
        ids_BT = np.zeros(real_BT.shape, np.int64)
        ids_BT[real_BT] = self.input_ids[places]
        return ids_BT, self.labels_from[rows].astype(np.int64), lengths

    def batch_scored(self, batch: int) -> NDArray[np.bool_] | None:
        """Which ids of `batch_inputs` are targets, bool [B, T]; None: those from the first scored one on."""
        if self.scored is None:
            return None
        _, _, real_BT, places = self._laid_out(batch)
        out_BT = np.zeros(real_BT.shape, bool)
        out_BT[real_BT] = self.scored[places]
        return out_BT

    def _laid_out(
        self, batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
        """A batch's samples [B], their lengths [B], where a padded row of T holds an id [B, T], and which that is."""
        rows = self.batch_samples(batch)
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        at_BT = np.arange(lengths.max())[None, :]
        real_BT = at_BT < lengths[:, None]
        return rows, lengths, real_BT, (self.offsets[rows][:, None] + at_BT)[real_BT]


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
    examples: Sequence[Example] | None = None,
    labels: Labels | None = None,
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
        examples: each text as it is fed, where it is fed whole.
        labels: of each text, for a classifier.

    Returns:
        What `reference.json` says.

    Raises:
        DataError: fewer than two documents.
    """
    if examples is None:
        kept, documents, cut = cut_documents(texts, tokenizer, sequence_length, max_windows, prompts)
        own_texts, own_prompts = [d.text for d in documents], [d.prompt for d in documents]
    else:
        kept, own_texts, own_prompts, documents = list(range(len(texts))), list(texts), [""] * len(texts), []
        longer = [example.cut for example in examples if example.cut]
        cut = {"max_windows": None, "documents_cut": len(longer), "tokens_cut": sum(longer)}
    sources = [sources[at] for at in kept]
    if len(kept) < 2:
        raise DataError(f"reference: {len(kept)} documents are left, at least 2 are needed")
    if examples is None:
        samples = make_samples(documents, tokenizer.prefix_id, sequence_length, batch, block_samples)
    else:
        samples = example_samples(str(objective), examples, batch, block_samples)
    sha256s = [document_sha256(text, prompt) for text, prompt in zip(own_texts, own_prompts, strict=True)]
    told = sha256s if labels is None else [f"{one} {label}" for one, label in zip(sha256s, labels.given, strict=True)]
    text_fingerprint = hashlib.sha256("\n".join(told).encode()).hexdigest()
    tokens_fingerprint = _tokens_fingerprint(text_fingerprint, tokenizer.fingerprint, sequence_length, samples)
    tokens_D = np.bincount(samples.document, weights=samples.tokens)
    prompted = any(own_prompts)
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
            "documents": len(kept),
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
        **({"labels": labels.facts()} if labels is not None else {}),
        "drawn": drawn or {},
        "decontamination": decontamination or {},
    }
    with whole_directory(directory, {"kind": KIND, "name": name, "fingerprints": facts["fingerprints"]}) as part:
        copy_tokenizer_files(tokenizer.directory, part / "tokenizer")
        own: dict[str, Sequence[Any]] = {"prompt": own_prompts} if prompted else {}
        if labels is not None:
            own["label"] = labels.given
        if related and family_D is not None:  # a set without is the same files as ever
            own["family"] = family_D.tolist()
        write_documents(part / "documents.parquet", sources, own_texts, sha256s, own)
        write_samples(part / "samples.parquet", samples)
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
    samples = read_samples(directory / "samples.parquet")
    prints, labels = facts["fingerprints"], facts.get("labels")
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
        labels=None if labels is None else Labels.of(labels, read_labels(directory)),
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
    objective, length = facts.get("objective"), sequence_length or facts["sequence_length"]
    examples = None
    if objective in EXAMPLES:
        examples = encode_examples(objective, texts, tokenizer_dir, length, setting="--tokenizer")
    labels = facts.get("labels")
    made = build_reference(
        out_dir,
        sources,
        texts,
        tokenizer,
        name=facts["name"],
        sequence_length=length,
        batch=facts["batch"],
        block_samples=facts["block_samples"],
        max_windows=None,
        drawn=facts["drawn"],
        decontamination=facts["decontamination"],
        prompts=prompts,
        families=None if (family_D := read_families(reference_dir)) is None else family_D.tolist(),
        objective=objective if objective != "prompt" else None,
        examples=examples,
        labels=None if labels is None else Labels.of(labels, read_labels(reference_dir)),
    )
    assert made["fingerprints"]["text"] == facts["fingerprints"]["text"]
    return load_reference(out_dir, check=False)


def _tokens_fingerprint(text: str, tokenizer: str, sequence_length: int, samples: Samples) -> str:
    digest = hashlib.sha256(f"{text} {tokenizer} {sequence_length}".encode())
    for name, array in samples.arrays().items():
        digest.update(f" {name} {len(array)} ".encode())
        digest.update(array.astype(np.dtype("<i8")).data)
    return digest.hexdigest()


def _first_members(families: Sequence[int]) -> NDArray[np.int64]:
    """The place of the first document of each one's family, int64 [D]."""
    _, first, index_D = np.unique(np.asarray(families), return_index=True, return_inverse=True)
    return first[index_D].astype(np.int64)
