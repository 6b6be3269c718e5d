"""Documents as token ids: what goes into shards, which of it is trained on, and by what documents are akin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.schema import Config
from eval.reference.chat import Example, said_in
from eval.reference.examples import EXAMPLES, encode_examples
from eval.reference.labels import Labels, labels_in
from eval.reference.tokenizer import TextTokenizer
from trainer.data.sources import Document

Step = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents of which the tokenizer leaves something; of each its ids, which of these are trained on (None: all),
    the ids that it is akin to others by, and, where it is fed whole, how. `dropped`: documents with nothing to learn.
    """

    documents: list[Document]
    ids: list[NDArray[np.uint32]]
    masks: list[NDArray[np.bool_]] | None
    related: list[NDArray[np.uint32]]
    examples: list[Example] | None = None
    labels: Labels | None = None
    dropped: int = 0

    def facts(self, training: Sequence[int]) -> dict[str, Any]:
        """What `dataset.json` says of training documents that are fed whole."""
        if self.examples is None:
            return {}
        cut = [self.examples[at].cut for at in training]
        return {"cut": sum(one > 0 for one in cut), "tokens_cut": sum(cut), "without_target": self.dropped}


def encode(config: Config, tokenizer: TextTokenizer, documents: list[Document], step: Step) -> Encoded:
    """The documents as a config trains on them.

    Raises:
        ConfigError: labels that cannot be meant.
        DataError: nothing is left, or the tokenizer's chat template refuses a conversation.
    """
    if config.objective.name in EXAMPLES:
        return _examples(config, tokenizer, documents, step)
    encoded = tokenizer.encode([d.text for d in documents], step)
    kept = [i for i, ids in enumerate(encoded) if len(ids)]
    documents, encoded = [documents[i] for i in kept], [encoded[i] for i in kept]
    if not any(d.prompt for d in documents):
        return Encoded(documents, encoded, None, encoded)
    # Each by itself, as the reference set has it: no token lies across the end of a prompt.
    prompts = tokenizer.encode([d.prompt for d in documents])
    masks = [np.arange(len(p) + len(ids)) >= len(p) for p, ids in zip(prompts, encoded, strict=True)]
    whole = [np.concatenate(pair) for pair in zip(prompts, encoded, strict=True)]
    return Encoded(documents, whole, masks, whole)


def _examples(config: Config, tokenizer: TextTokenizer, documents: list[Document], step: Step) -> Encoded:
    objective, texts = config.objective, [d.text for d in documents]
    chat = objective.name == "instruct"
    found = encode_examples(objective.name, texts, tokenizer.directory, config.sequence_length, step)
    kept = [at for at, one in enumerate(found) if (one.scored[1:].any() if chat else len(one.ids))]
    if not kept:
        raise DataError(
            f"sequence_length: {config.sequence_length} is too short for the assistant to say a token in any of "
            f"{len(found)} conversations; raise it"
        )
    documents, found = [documents[at] for at in kept], [found[at] for at in kept]
    # A system prompt or a template that all share makes nobody akin.
    related = tokenizer.encode([said_in(d.text) if chat else d.text for d in documents])
    labels = None
    if not chat:
        labels = labels_in(objective.problem, [d.label for d in documents], objective.labels)
    masks = [one.scored for one in found] if chat else None
    return Encoded(documents, [one.ids for one in found], masks, related, found, labels, len(texts) - len(kept))
