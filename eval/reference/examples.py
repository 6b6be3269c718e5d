"""Examples, which are fed whole: conversations, and texts to classify; and the samples of a reference set of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configs.errors import DataError
from eval.reference.chat import ChatTemplate, Example
from eval.reference.tokenizer import open_tokenizer
from eval.reference.windows import Samples, blocks_and_batches

EXAMPLES = ("instruct", "classify")  # objectives whose documents are fed whole


def encode_examples(
    objective: str,
    texts: Sequence[str],
    tokenizer: Path,
    sequence_length: int,
    progress: Callable[[int, int], None] | None = None,
    setting: str = "data.tokenizer",
) -> list[Example]:
    """Each text as an example of an objective in `EXAMPLES`.

    Of a conversation the first `sequence_length` + 1 tokens are kept, so that there are `sequence_length` targets at
    most. Of a text to classify the first that make `sequence_length` with the tokenizer's special tokens.

    Raises:
        DataError: the tokenizer has no chat template, or that refuses a conversation.
    """
    if objective == "instruct":
        return ChatTemplate(tokenizer, setting).encode(texts, progress, longest=sequence_length + 1)
    return _classified(texts, tokenizer, sequence_length, progress, setting)


def _classified(
    texts: Sequence[str],
    directory: Path,
    longest: int,
    progress: Callable[[int, int], None] | None,
    setting: str,
) -> list[Example]:
    out = []
    backend = open_tokenizer(directory, setting).backend
    for start in range(0, len(texts), 1024):
        portion = texts[start : start + 1024]
        for text, found in zip(portion, backend.encode_batch(portion, add_special_tokens=True), strict=True):
            ids = np.asarray(found.ids, np.uint32)
            closing = int(np.argmin(found.special_tokens_mask[::-1])) if not all(found.special_tokens_mask) else 0
            kept = ids
            if len(ids) > longest:
                kept = np.concatenate([ids[: longest - closing], ids[len(ids) - closing :]])
            out.append(Example(kept, np.zeros(len(kept), bool), len(text.encode()), len(ids) - len(kept)))
        if progress is not None:
            progress(start + len(portion), len(texts))
    return out


def example_samples(objective: str, examples: Sequence[Example], batch: int, block_samples: int) -> Samples:
    """A sample of each example, in order, with blocks and batches as `make_samples` has them.

    Of a conversation the assistant's tokens are scored; of a text to classify one thing is, its label.

    Raises:
        DataError: one has nothing to score.
    """
    chat = objective == "instruct"
    scored = []
    for number, example in enumerate(examples):
        own = example.scored.copy()
        own[:1] = False  # nothing comes before the first, so it cannot be predicted
        if chat and not own.any():
            raise DataError(f"reference: document {number} has no token of the assistant's in its window")
        scored.append(own)
    lengths_N = np.asarray([len(example.ids) for example in examples], np.int64)
    number_N = np.arange(len(examples), dtype=np.int64)
    block_N, batch_N = blocks_and_batches(number_N, lengths_N, block_samples, batch)
    ones = np.ones(len(examples), np.int32)
    return Samples(
        document=number_N,
        block=block_N,
        batch=batch_N,
        labels_from=np.asarray([int(np.argmax(own)) for own in scored], np.int32) if chat else ones,
        tokens=np.asarray([int(own.sum()) for own in scored], np.int32) if chat else ones,
        bytes=np.asarray([example.bytes for example in examples], np.int32),
        input_ids=np.concatenate([example.ids for example in examples]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64),
        scored=np.concatenate(scored) if chat else None,
    )
