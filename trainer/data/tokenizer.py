"""Makes the tokenizer of a data set: a byte-level BPE trained on its documents, or a copy of a given one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from eval.reference.tokenizer import TextTokenizer, check_repeatable, copy_tokenizer_files, open_tokenizer

END_OF_TEXT = "<|endoftext|>"
OF_MASKED = {  # in the order of RoBERTa's ids
    "bos_token": "<s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}
TRAINING_BYTES = 256 << 20  # the first so much text (in random order) settles the merges; more only takes longer


def make_tokenizer(
    directory: Path, texts: Sequence[str], *, given: Path | None, vocab_size: int, masks: bool = False
) -> TextTokenizer:
    """Writes the new folder `directory`: the tokenizer of `given`, or one trained on `texts`.

    A trained one has every byte in its alphabet and one special token, both BOS and EOS. The same texts give
    the same tokenizer. It may have fewer entries than `vocab_size` where there is little text. `masks`: for a masked
    LM, with the special tokens that RoBERTa's has.

    Raises:
        DataError: `given` is not a tokenizer that can be used, or gives a text other ids each time.
    """
    if given is not None:
        asked = open_tokenizer(given, "data.tokenizer").switched_off
        copy_tokenizer_files(given, directory)
        copied = replace(open_tokenizer(directory, "data.tokenizer"), switched_off=asked)
        check_repeatable(copied, texts, "data.tokenizer")
        return copied

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = OF_MASKED if masks else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_first(texts), trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **special).save_pretrained(
        directory
    )
    return open_tokenizer(directory)


def _first(texts: Sequence[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
