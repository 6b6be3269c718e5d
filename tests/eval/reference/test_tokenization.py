"""A text has the same ids each time, and what decides them is in a tokenizer's fingerprint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from configs.errors import DataError
from eval.reference.set import build_reference, retokenize
from eval.reference.tokenizer import check_repeatable, copy_tokenizer_files, open_tokenizer, tokenizer_fingerprint

TEXTS = [f"the caliper reads {n} and the reading is read again {n * 7}" for n in range(40)]
SETTINGS: dict[str, Any] = {"eos_token": "<|end|>"}


def saved(directory: Path, settings: dict[str, Any] | None = None, **model: Any) -> Path:
    """A tokenizer directory; `model` are fields of the model in its tokenizer.json."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    whole = json.loads(bpe.to_str())
    whole["model"].update(model)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    (directory / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **(settings or {})}))
    return directory


def ids(directory: Path) -> list[list[int]]:
    return [found.tolist() for found in open_tokenizer(directory).encode(TEXTS)]


def test_dropout_is_off_and_leaves_the_fingerprint_of_the_tokenizer_without(tmp_path: Path) -> None:
    plain, random = saved(tmp_path / "plain"), saved(tmp_path / "random", dropout=0.3)
    assert ids(random) == ids(random) == ids(plain)
    assert tokenizer_fingerprint(random) == tokenizer_fingerprint(plain)
    assert (open_tokenizer(random).switched_off, open_tokenizer(plain).switched_off) == ("dropout 0.3", "")
    copy_tokenizer_files(random, tmp_path / "copy")  # what goes into data and snapshots, for other readers
    assert json.loads((tmp_path / "copy" / "tokenizer.json").read_text())["model"]["dropout"] is None


def test_a_reference_set_made_twice_with_dropout_is_the_same(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(saved(tmp_path / "random", dropout=0.3))
    sizes: dict[str, Any] = {"sequence_length": 16, "batch": 4, "block_samples": 8, "max_windows": 4}
    prints = [
        build_reference(tmp_path / name, ["s"] * len(TEXTS), TEXTS, tokenizer, name="t", **sizes)["fingerprints"]
        for name in ("a", "b")
    ]
    assert prints[0] == prints[1]
    again = [retokenize(tmp_path / "a", tokenizer.directory, tmp_path / name) for name in ("c", "d")]
    assert again[0].tokens_fingerprint == again[1].tokens_fingerprint


def test_a_tokenizer_that_is_random_all_the_same_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(saved(tmp_path / "t"))
    check_repeatable(tokenizer, TEXTS)
    tokenizer.backend.model.dropout = 0.5  # as some way that is not known yet would do it
    with pytest.raises(DataError, match=r"^--tokenizer: .* gives one text other tokens each time"):
        check_repeatable(tokenizer, TEXTS, "--tokenizer")


@pytest.mark.parametrize(
    "setting",
    [
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|end|>"},
        {"model_max_length": 4, "truncation_side": "left", "padding_side": "left"},
        {"add_prefix_space": True},
        {"split_special_tokens": False},
    ],
)
def test_what_is_set_beside_the_tokenizer_changes_no_ids(setting: dict[str, Any], tmp_path: Path) -> None:
    plain, other = saved(tmp_path / "plain"), saved(tmp_path / "other", setting)
    assert ids(other) == ids(plain)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(plain)


def test_cutting_padding_and_special_tokens_of_its_file_change_no_ids(tmp_path: Path) -> None:
    plain, other = saved(tmp_path / "plain"), saved(tmp_path / "other")
    backend = Tokenizer.from_file(str(other / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    whole = json.loads(backend.to_str())
    around = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}}
    whole["post_processor"] = {"type": "TemplateProcessing", "single": around, "pair": around, "special_tokens": tokens}
    (other / "tokenizer.json").write_text(json.dumps(whole))
    assert ids(other) == ids(plain)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(plain)


def with_added(directory: Path, token: AddedToken, normalizer: Any = None) -> Path:
    backend = Tokenizer.from_file(str(saved(directory) / "tokenizer.json"))
    backend.normalizer = normalizer
    backend.add_tokens([token])
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_how_an_added_token_is_found_in_text_is_in_the_fingerprint(flag: str, tmp_path: Path) -> None:
    lower = normalizers.Lowercase()
    plain, other = (
        with_added(tmp_path / str(on), AddedToken("Caliper", special=False, **{"normalized": False, flag: on}), lower)
        for on in (False, True)
    )
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(other)


def test_a_token_that_ends_documents_is_never_made_of_text(tmp_path: Path) -> None:
    directory = saved(tmp_path / "t", {"eos_token": "reading"})
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken("reading", special=False, normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = open_tokenizer(directory)
    assert not any(tokenizer.eos_id in found for found in tokenizer.encode(TEXTS))


def test_fingerprints_of_ordinary_tokenizers_stay(tmp_path: Path) -> None:
    """Of one that has a special token and one that is not: tables hang on it."""
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.normalizer = normalizers.NFC()
    bpe.add_special_tokens(["</s>"])
    bpe.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert tokenizer_fingerprint(tmp_path) == "1332f1499eb3cda128413f3303bc1b5585d5965621af946baa3b12d33bbf4901"
    assert np.concatenate(open_tokenizer(tmp_path).encode(["ab<tool>a"])).tolist() == [2, 4, 0]
