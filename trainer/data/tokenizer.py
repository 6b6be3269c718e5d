"""Makes the tokenizer of a data set: a byte-level BPE trained on its documents, or a copy of a given one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    directory: Path,
    texts: Sequence[str],
    *,
    given: Path | None,
    vocab_size: int,
    masks: bool = False,
    characters: bool = False,
) -> TextTokenizer:
    """Writes the new folder `directory`: the tokenizer of `given`, or one trained on `texts`.

    A trained one has every byte in its alphabet and one special token, both BOS and EOS. The same texts give
    the same tokenizer. It may have fewer entries than `vocab_size` where there is little text. `masks`: for a masked
    LM, with the special tokens that RoBERTa's has. `characters`: each is a token, and there is no other.

    Raises:
        DataError: `given` is not a tokenizer that can be used, or gives a text other ids each time.
    """
    if given is not None:
        asked = open_tokenizer(given, "data.tokenizer").switched_off
        copy_tokenizer_files(given, directory)
        copied = replace(open_tokenizer(directory, "data.tokenizer"), switched_off=asked)
        check_repeatable(copied, texts, "data.tokenizer")
        return copied

    from transformers import PreTrainedTokenizerFast

    special = OF_MASKED if masks else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    made = _characters(texts, special) if characters else _bpe(texts, special, vocab_size)
    if masks:  # what a classifier is fed begins and ends with them; a stream of texts does not
        from tokenizers import processors

        ends = [(name, made.token_to_id(name)) for name in (special["cls_token"], special["sep_token"])]
        made.post_processor = processors.RobertaProcessing(ends[1], ends[0], False)
    PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special).save_pretrained(
        directory
    )
    return open_tokenizer(directory)


def _bpe(texts: Sequence[str], special: dict[str, str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    return bpe


def _characters(texts: Sequence[str], special: dict[str, str]) -> Any:
    """Every character of the texts, by its code point; one that is in none of them is nothing."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    named = list(dict.fromkeys(special.values()))
    vocabulary = {name: at for at, name in enumerate([*named, *sorted(set().union(*texts))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=named[0]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(named)
    return made


def _first(texts: Sequence[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
