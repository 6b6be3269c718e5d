"""Cuts reference documents into samples, and these into blocks and batches, by texts and settings alone.

A document is a text, or a prompt and the text that answers it: then the prompt is context, and never scored.
Legend: `_N` one entry a sample, `_D` one a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.reference.tokenizer import TextTokenizer

LARGEST_SHARE = 0.01  # of all tokens, for one document: no cluster may dominate the errors
FEW_DOCUMENTS = 100  # below it no cut can bring the largest share to 1 %


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """`ids` uint32 [n]; `ends` int64 [n]: characters of `text` up to and with each token, never falling.

    `prompt_ids` uint32 [p]: the prompt is tokenized by itself, so no token lies across its end.
    """

    text: str
    ids: NDArray[np.uint32]
    ends: NDArray[np.int64]
    prompt: str = ""
    prompt_ids: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a reference set in order; sample i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    document: NDArray[np.int64]
    block: NDArray[np.int32]
    batch: NDArray[np.int32]
    labels_from: NDArray[np.int32]
    tokens: NDArray[np.int32]
    bytes: NDArray[np.int32]
    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    scored: NDArray[np.bool_] | None = None  # of each of `input_ids`: whether it is a target; None: from labels_from on

    def arrays(self) -> dict[str, Any]:
        """Its arrays by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}


def rolling_windows(tokens: int, sequence_length: int) -> list[tuple[int, int, int]]:
    """Windows over a document of `tokens` tokens: (start, stop, labels_from), positions in [prefix] + tokens.

    The rule of lm-evaluation-harness (`get_rolling_token_windows`) with one token of context: windows end
    every `sequence_length` tokens, and the last one takes full context but scores only what is left.
    """
    out = []
    for scored in range(0, tokens, sequence_length):
        end = min(tokens, scored + sequence_length)
        start = max(0, end - sequence_length)
        out.append((start, end + 1, end + 1 - start - (end - scored)))
    return out


def prompted_windows(prompt: int, tokens: int, sequence_length: int) -> list[tuple[int, int, int]]:
    """Windows over a response of `tokens` tokens after a prompt: (start, stop, labels_from), positions in
    [prefix] + prompt + response.

    Each has all the context that fits, cut on its left, and scores no more than leaves half a window of
    context, where there is so much. What fits in one window is one window.
    """
    out = []
    done = 0
    while done < tokens:
        scored = min(tokens - done, sequence_length - min(prompt + done, sequence_length // 2))
        done += scored
        stop = 1 + prompt + done
        start = max(0, stop - (sequence_length + 1))
        out.append((start, stop, stop - start - scored))
    return out


def document_sha256(text: str, prompt: str = "") -> str:
    """SHA-256 of a document, in hexadecimal: of its text in UTF-8, or of the two hashes of prompt and response."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not prompt:
        return digest
    return hashlib.sha256(f"{hashlib.sha256(prompt.encode()).hexdigest()} {digest}".encode()).hexdigest()


def cut_documents(
    texts: Sequence[str],
    tokenizer: TextTokenizer,
    sequence_length: int,
    max_windows: int | None,
    prompts: Sequence[str] | None = None,
) -> tuple[list[int], list[TokenizedDocument], dict[str, Any]]:
    """(which of `texts` are kept, as documents with at most `max_windows` windows each, the record of what was cut).

    `prompts`: of each document, "" where it has none; a cut shortens the response only.

    Fewer windows are kept where it takes that to bring the largest document to 1 % of all tokens; below 100
    documents that cannot be reached and is not tried. A document that the cut makes equal to an earlier one,
    or that has no tokens, is dropped.
    """
    whole = _tokenized(texts, tokenizer, prompts)
    if max_windows is None:
        return list(range(len(whole))), whole, {"max_windows": None}
    windows = max_windows
    tokens_D = np.asarray([len(d.ids) for d in whole], np.int64)
    prompt_D = np.asarray([len(d.prompt_ids) for d in whole], np.int64)

    def too_large() -> bool:
        return _largest_share(np.minimum(tokens_D, _most_tokens(prompt_D, windows, sequence_length)))

    while windows > 1 and len(whole) >= FEW_DOCUMENTS and too_large():
        windows -= 1
    while True:
        cut = _cut_to(whole, tokenizer, _most_tokens(prompt_D, windows, sequence_length))
        kept = {(d.prompt, d.text): index for index, d in reversed(list(enumerate(cut))) if len(d.ids)}
        chosen = sorted(kept.values())
        left_D = np.asarray([len(cut[index].ids) for index in chosen], np.int64)
        # Cut texts have a few tokens less than the sum above took them for.
        if windows == 1 or len(chosen) < FEW_DOCUMENTS or not _largest_share(left_D):
            break
        windows -= 1
    record = {
        "max_windows": windows,
        "max_windows_wanted": max_windows,
        "documents_cut": sum(len(cut[i].text) < len(whole[i].text) for i in chosen),
        "documents_dropped": len(cut) - len(chosen),
        "tokens_cut": int(tokens_D[chosen].sum() - left_D.sum()),
    }
    return chosen, [cut[i] for i in chosen], record


def make_samples(
    documents: Sequence[TokenizedDocument],
    prefix_id: int,
    sequence_length: int,
    batch: int,
    block_samples: int,
) -> Samples:
    """All samples of `documents`, in order, with the blocks and batches that are part of the set."""
    ids: list[NDArray[np.int64]] = []
    document, labels_from, tokens, sizes = [], [], [], []
    for number, item in enumerate(documents):
        prompt = len(item.prompt_ids)
        sequence = np.concatenate([[prefix_id], item.prompt_ids, item.ids]).astype(np.int64)
        byte_ends = _byte_ends(item)
        done = 0
        windows = (
            prompted_windows(prompt, len(item.ids), sequence_length)
            if prompt
            else rolling_windows(len(item.ids), sequence_length)
        )
        for start, stop, first in windows:
            ids.append(sequence[start:stop])
            document.append(number)
            labels_from.append(first)
            tokens.append(stop - start - first)
            upto = stop - 1 - prompt
            sizes.append(int(byte_ends[upto] - byte_ends[done]))
            done = upto
    lengths_N = np.asarray([len(row) for row in ids], np.int64)
    document_N = np.asarray(document, np.int64)
    block_N, batch_N = blocks_and_batches(document_N, lengths_N, block_samples, batch)
    return Samples(
        document=document_N,
        block=block_N,
        batch=batch_N,
        labels_from=np.asarray(labels_from, np.int32),
        tokens=np.asarray(tokens, np.int32),
        bytes=np.asarray(sizes, np.int32),
        input_ids=np.concatenate(ids).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64),
    )


def _tokenized(
    texts: Sequence[str], tokenizer: TextTokenizer, prompts: Sequence[str] | None = None
) -> list[TokenizedDocument]:
    found = tokenizer.encode_with_ends(texts)
    documents = [TokenizedDocument(text, ids, ends) for text, (ids, ends) in zip(texts, found, strict=True)]
    if prompts is None or not any(prompts):
        return documents
    asked = zip(documents, prompts, tokenizer.encode(prompts), strict=True)
    return [replace(document, prompt=prompt, prompt_ids=ids) for document, prompt, ids in asked]


def _most_tokens(prompt_D: NDArray[np.int64], windows: int, sequence_length: int) -> NDArray[np.int64]:
    """Tokens that so many windows score of a document, after a prompt of so many tokens."""
    half = sequence_length // 2
    prompted_D = windows * (sequence_length - half) + half - np.minimum(prompt_D, half)
    return np.where(prompt_D > 0, prompted_D, windows * sequence_length)


def _largest_share(tokens_D: NDArray[np.int64]) -> bool:
    """Whether a document has more than its share."""
    return bool(tokens_D.max() > LARGEST_SHARE * tokens_D.sum())


def _cut_to(
    whole: Sequence[TokenizedDocument], tokenizer: TextTokenizer, most_D: NDArray[np.int64]
) -> list[TokenizedDocument]:
    """The documents with at most `most_D` tokens: text is cut where a token ends and tokenized again."""
    out = list(whole)
    keep = {index: int(most_D[index]) for index, document in enumerate(whole) if len(document.ids) > most_D[index]}
    while keep:
        # `ends` counts whole characters, so the cut never falls inside one, whatever tokens it has.
        again = [whole[i].text[: int(whole[i].ends[n - 1]) if n > 0 else 0] for i, n in keep.items()]
        longer = {}
        for (index, tokens), document in zip(keep.items(), _tokenized(again, tokenizer), strict=True):
            out[index] = replace(whole[index], text=document.text, ids=document.ids, ends=document.ends)
            # A text cut short may be split otherwise near its end, into more tokens than it had there.
            if len(document.ids) > most_D[index]:
                longer[index] = tokens - (len(document.ids) - int(most_D[index]))
        keep = longer
    return out


def _byte_ends(document: TokenizedDocument) -> NDArray[np.int64]:
    """Bytes of UTF-8 covered by the first k tokens, [n + 1]; the last token takes what is left."""
    points = np.frombuffer(document.text.encode("utf-32-le"), dtype="<u4")
    width = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(width)]).astype(np.int64)
    out = np.concatenate([[0], upto[document.ends]])
    out[-1] = upto[-1]
    return out


def blocks_and_batches(
    document_N: NDArray[np.int64], lengths_N: NDArray[np.int64], block_samples: int, batch: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(block, batch) of samples in order, by their documents and lengths, each int32 [samples]."""
    block_N = _blocks(document_N, block_samples)
    return block_N, _batches(block_N, lengths_N, batch)


def _blocks(document_N: NDArray[np.int64], block_samples: int) -> NDArray[np.int32]:
    """Block of each sample: whole documents until there are enough; a short last one joins the one before."""
    samples_D = np.bincount(document_N)
    block_D = np.zeros(len(samples_D), np.int32)
    block = filled = 0
    for document, samples in enumerate(samples_D):
        if filled >= block_samples:
            block, filled = block + 1, 0
        block_D[document] = block
        filled += samples
    if filled < block_samples and block > 0:
        block_D[block_D == block] = block - 1
    return block_D[document_N]


def _batches(block_N: NDArray[np.int32], lengths_N: NDArray[np.int64], batch: int) -> NDArray[np.int32]:
    """Batch of each sample: bucketed by length inside a block, to pad little; numbered over the set."""
    order = np.lexsort((lengths_N, block_N))  # stable: equal lengths stay in reference order
    block = block_N[order]
    start_of_block = np.searchsorted(block, block)
    in_block = np.arange(len(order)) - start_of_block
    begins = in_block % batch == 0
    out = np.empty(len(order), np.int32)
    out[order] = np.cumsum(begins) - 1
    return out
