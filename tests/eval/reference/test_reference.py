"""Every token and byte of a document is scored once, by the rolling rule, in fixed blocks and batches."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.errors import DataError
from eval.reference.set import build_reference, load_reference, retokenize
from eval.reference.tokenizer import open_tokenizer, tokenizer_fingerprint

L = 16
WORDS = [
    "der",
    "Bär",
    "😀",
    "misst",
    "Größe",
    "über",
    "naïve",
    "漢字",
    "caliper",
    "reading\n",
    "twice",
    "",
    "and\tonce",
]


def texts(count: int, seed: int = 0, longest: int = 90) -> list[str]:
    draw = np.random.default_rng(seed)
    return [f"{n} " + " ".join(draw.choice(WORDS, draw.integers(1, longest))) for n in range(count)]


def tokenizer_at(directory: Path, vocab_size: int = 300) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(50),
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet),
    )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_at(tmp_path_factory.mktemp("tokenizer") / "t")


def build(directory: Path, tokenizer: Path, documents: list[str], **changes: Any) -> dict[str, Any]:
    settings = {"sequence_length": L, "batch": 4, "block_samples": 20, "max_windows": 1000, **changes}
    return build_reference(
        directory,
        [f"s{n}" for n in range(len(documents))],
        documents,
        open_tokenizer(tokenizer),
        name="r",
        **settings,
    )


def slow_rolling(tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(context, targets) of each window, token by token: each window is filled with new targets, then context
    is added on the left until the input has `length` tokens or the text begins."""
    out, done = [], 0
    everything = [prefix, *tokens]
    while done < len(tokens):
        targets = tokens[done : done + length]
        done += len(targets)
        context_end = done - len(targets) + 1  # in `everything`: what lies before the first target
        context = everything[:context_end]
        while len(context) + len(targets) - 1 > length:
            context = context[1:]
        out.append((context, targets))
    return out


def exact_lengths(tokenizer: Path) -> list[str]:
    """Documents of 1, L − 1, L, L + 1, 2L, 2L + 1 and 3L tokens: one byte a token, none of them merged."""
    found = open_tokenizer(tokenizer)
    out = []
    for count in (1, L - 1, L, L + 1, 2 * L, 2 * L + 1, 3 * L):
        text = ("%#" * count)[:count]
        assert len(found.encode([text])[0]) == count
        out.append(text)
    return out


def test_windows_follow_the_rolling_rule_and_score_everything_once(tmp_path: Path, tokenizer: Path) -> None:
    documents = exact_lengths(tokenizer) + texts(60) + ["😀" * 40, "a<|end|>b"]
    build(tmp_path / "r", tokenizer, documents)
    found = load_reference(tmp_path / "r")
    opened = open_tokenizer(tokenizer)
    at = 0
    for number, (text, ids) in enumerate(zip(documents, opened.encode(documents), strict=True)):
        size = 0
        for context, targets in slow_rolling(ids.tolist(), opened.prefix_id, L):
            row = found.input_ids[found.offsets[at] : found.offsets[at + 1]].tolist()
            assert row == context + targets
            assert len(row) <= L + 1
            assert (found.document[at], found.labels_from[at], found.tokens[at]) == (
                number,
                len(context),
                len(targets),
            )
            size += int(found.bytes[at])
            at += 1
        assert size == len(text.encode())
    assert at == len(found.sample)
    assert opened.eos_id not in opened.encode(["a<|end|>b"])[0]


def test_bytes_are_those_of_the_tokens_scored(tmp_path: Path, tokenizer: Path) -> None:
    build(tmp_path / "r", tokenizer, [*texts(3), "plain words only, " * 20])
    found = load_reference(tmp_path / "r")
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    for i in np.flatnonzero(found.document == 3):
        row = found.input_ids[found.offsets[i] : found.offsets[i + 1]]
        assert found.bytes[i] == len(decode(row[found.labels_from[i] :].tolist()))


def test_blocks_are_whole_documents_and_batches_stay_inside(tmp_path: Path, tokenizer: Path) -> None:
    build(tmp_path / "r", tokenizer, texts(80))
    found = load_reference(tmp_path / "r")
    lengths = np.diff(found.offsets)
    per_block = np.bincount(found.block)
    assert (np.diff(found.block) >= 0).all()
    assert len(per_block) > 3
    assert per_block.min() >= 20
    for document in range(found.documents):
        assert len(set(found.block[found.document == document])) == 1
    for block in range(len(per_block) - 1):  # no block goes on after it has enough
        last = found.document[found.block == block][-1]
        assert ((found.block == block) & (found.document < last)).sum() < 20
    seen = []
    for batch in range(found.batch_count):
        rows = found.batch_samples(batch)
        ids, first, length = found.batch_inputs(batch)
        assert len(set(found.block[rows])) == 1
        assert ids.shape == (len(rows), length.max())
        assert first.dtype == length.dtype == ids.dtype == np.int64
        for k, row in enumerate(rows):
            assert ids[k, : length[k]].tolist() == found.input_ids[found.offsets[row] : found.offsets[row + 1]].tolist()
            assert not ids[k, length[k] :].any()
        seen.append((int(found.block[rows[0]]), int(lengths[rows].min()), int(lengths[rows].max()), len(rows)))
    assert seen == sorted(seen, key=lambda b: b[:2])
    for (block, _, longest, size), (next_block, shortest, _, _) in pairwise(seen):
        assert block != next_block or (longest <= shortest and size == 4)
    assert sum(size for *_, size in seen) == len(found.sample)


def test_long_documents_are_cut_and_stored_as_scored(tmp_path: Path, tokenizer: Path) -> None:
    documents = [*texts(9, longest=200), "😀漢字" * 300, "x" * 999 + "   \n  " * 50]
    facts = build(tmp_path / "r", tokenizer, documents, max_windows=2)
    found = load_reference(tmp_path / "r")
    assert np.bincount(found.document).max() <= 2
    stored = pq.read_table(tmp_path / "r" / "documents.parquet").to_pylist()
    for row, ids in zip(stored, open_tokenizer(tokenizer).encode([r["text"] for r in stored]), strict=True):
        mine = found.document == row["document"]
        assert documents[int(row["source"][1:])].startswith(row["text"])
        assert found.tokens[mine].sum() == len(ids)
        assert found.bytes[mine].sum() == len(row["text"].encode())
    assert facts["cut"]["documents_cut"] >= 2
    assert facts["counts"]["largest_document_share"] == pytest.approx(
        np.bincount(found.document, weights=found.tokens).max() / found.tokens.sum()
    )


def test_of_a_hundred_documents_none_has_more_than_one_percent(tmp_path: Path, tokenizer: Path) -> None:
    draw = np.random.default_rng(0)
    documents = [f"{n} " + " ".join(draw.choice(WORDS, 60)) for n in range(150)] + texts(3, 1, 3000)
    facts = build(tmp_path / "r", tokenizer, documents, max_windows=100)
    assert facts["counts"]["largest_document_share"] <= 0.01
    assert 1 < facts["cut"]["max_windows"] < 100
    few = build(tmp_path / "few", tokenizer, documents[-50:], max_windows=100)
    assert few["cut"]["max_windows"] == 100
    assert few["counts"]["largest_document_share"] > 0.01


def test_fingerprints_hang_on_content_alone(tmp_path: Path, tokenizer: Path) -> None:
    def prints(name: str, *args: Any, **changes: Any) -> tuple[str, str]:
        found = build(tmp_path / name, tokenizer, *args, **changes)["fingerprints"]
        return found["text"], found["tokens"]

    same = prints("a", texts(30))
    assert prints("b", texts(30)) == same
    assert prints("c", texts(30)[::-1])[0] != same[0]
    for name, changes in [("d", {"batch": 3}), ("e", {"sequence_length": 17}), ("f", {"block_samples": 50})]:
        text, tokens = prints(name, texts(30), **changes)
        assert text == same[0]
        assert tokens != same[1]


def test_another_tokenizer_keeps_the_text_fingerprint(tmp_path: Path, tokenizer: Path) -> None:
    build(tmp_path / "r", tokenizer, texts(30), max_windows=2)
    before = load_reference(tmp_path / "r")
    after = retokenize(tmp_path / "r", tokenizer_at(tmp_path / "other", 400), tmp_path / "out")
    assert after.text_fingerprint == before.text_fingerprint
    assert after.tokens_fingerprint != before.tokens_fingerprint
    assert after.bytes.sum() == before.bytes.sum()
    assert after.tokens.sum() < before.tokens.sum()
    assert load_reference(tmp_path / "out").short_name == f"r-{after.tokens_fingerprint[:8]}"
    with pytest.raises(DataError, match="is there already"):
        retokenize(tmp_path / "r", tokenizer, tmp_path / "out")
    shorter = retokenize(tmp_path / "r", tokenizer, tmp_path / "shorter", sequence_length=L // 2)
    assert (shorter.sequence_length, shorter.text_fingerprint) == (L // 2, before.text_fingerprint)
    assert shorter.tokens.sum() == before.tokens.sum()
    again = retokenize(tmp_path / "out", tokenizer, tmp_path / "back")
    assert again.tokens_fingerprint == before.tokens_fingerprint


def test_a_changed_or_missing_set_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    build(tmp_path / "r", tokenizer, texts(20))
    with pytest.raises(DataError, match="no such directory"):
        load_reference(tmp_path / "nowhere")
    path = tmp_path / "r" / "samples.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    with pytest.raises(DataError, match="changed since"):
        load_reference(tmp_path / "r")
    shutil.rmtree(tmp_path / "r")
    with pytest.raises(DataError, match="at least 2"):
        build(tmp_path / "r", tokenizer, texts(1))
    assert not (tmp_path / "r").exists()


def test_a_tokenizer_saved_again_by_transformers_is_the_same(tmp_path: Path, tokenizer: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    shutil.copytree(tokenizer, tmp_path / "a")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    again(["x"], truncation=True, max_length=2)  # leaves its mark in tokenizer.json
    again.save_pretrained(tmp_path / "b")
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    assert tokenizer_fingerprint(tmp_path / "b") == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tmp_path / "c") == tokenizer_fingerprint(tokenizer)
    assert len(open_tokenizer(tmp_path / "b").encode(["a long text that is not cut"])[0]) > 2
    assert tokenizer_fingerprint(tokenizer_at(tmp_path / "d", 301)) != tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="neither an EOS nor a BOS"):
        open_tokenizer(tmp_path / "a")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        open_tokenizer(tmp_path)


def slow_prompted(prompt: list[int], tokens: list[int], prefix: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(context, targets) of each window, token by token: targets are taken for as long as the window holds them and
    all context up to half a window; then context is added on the left until it is full or the prompt begins."""
    out, done = [], 0
    before = [prefix, *prompt]
    while done < len(tokens):
        context, targets = before + tokens[:done], []
        while done + len(targets) < len(tokens):
            kept = min(len(context) - 1, length // 2)  # fed besides the id that is before all of them
            if kept + len(targets) + 1 > length:
                break
            targets.append(tokens[done + len(targets)])
        while len(context) + len(targets) > length + 1:
            context = context[1:]
        out.append((context, targets))
        done += len(targets)
    return out


def test_of_a_document_with_a_prompt_every_response_token_is_scored_once(tmp_path: Path, tokenizer: Path) -> None:
    draw = np.random.default_rng(1)
    sizes = [(p, r) for p in (0, 1, 7, 8, 9, 15, 16, 40) for r in (1, 7, 8, 9, 15, 16, 17, 33)]
    prompts = ["".join(draw.choice(list("%#"), p)) for p, _ in sizes]
    answers = ["".join(draw.choice(list("(&"), r)) for _, r in sizes]
    prompts += ["Größe? 😀 "] * 3
    answers += ["漢字 über 😀😀 " * 12, "naïve", " naïve"]
    facts = build(tmp_path / "r", tokenizer, answers, prompts=prompts)
    found, opened = load_reference(tmp_path / "r"), open_tokenizer(tokenizer)
    kept = pq.read_table(tmp_path / "r" / "documents.parquet").to_pylist()
    assert (facts["objective"], found.objective) == ("prompt", "prompt")
    assert {(row["prompt"], row["text"]) for row in kept} == set(zip(prompts, answers, strict=True))
    at = 0
    for row in kept:
        asked, said = (ids.tolist() for ids in opened.encode([row["prompt"], row["text"]]))
        windows = (slow_prompted if asked else lambda _, *rest: slow_rolling(*rest))(asked, said, opened.prefix_id, L)
        if len(asked) + len(said) <= L:
            assert windows == [([opened.prefix_id, *asked], said)]
        size = 0
        for context, targets in windows:
            assert found.input_ids[found.offsets[at] : found.offsets[at + 1]].tolist() == context + targets
            assert len(context) + len(targets) <= L + 1
            if len(asked) + len(said) > L and asked:
                assert len(context) > min(len(asked), L // 2)
            assert (found.document[at], found.labels_from[at]) == (row["document"], len(context))
            assert found.tokens[at] == len(targets)
            size += int(found.bytes[at])
            at += 1
        assert size == len(row["text"].encode())
    assert at == len(found.sample)


def test_a_long_response_is_cut_and_the_same_response_to_another_prompt_stays(tmp_path: Path, tokenizer: Path) -> None:
    long = texts(6, 3, 400)
    prompts = ["a", "a", "b", "", "%" * 99, "c", "d", "e", "d"]
    answers = [*long, "same", "same", "other"]
    build(tmp_path / "r", tokenizer, answers, prompts=prompts, max_windows=3)
    found = load_reference(tmp_path / "r")
    assert found.documents == 9
    assert np.bincount(found.document).tolist() == [3] * 6 + [1] * 3
    stored = pq.read_table(tmp_path / "r" / "documents.parquet").to_pylist()
    for row, prompt, answer in zip(stored, prompts, answers, strict=True):
        assert row["prompt"] == prompt
        assert answer.startswith(row["text"])
        assert found.bytes[found.document == row["document"]].sum() == len(row["text"].encode())


def test_prompts_are_in_the_fingerprint_and_survive_another_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    documents = texts(12)
    plain = build(tmp_path / "plain", tokenizer, documents, prompts=[""] * 12)
    assert plain == build(tmp_path / "same", tokenizer, documents)
    assert "prompt" not in pq.read_schema(tmp_path / "plain" / "documents.parquet").names
    assert "objective" not in plain
    assert load_reference(tmp_path / "plain").objective == "causal"
    prompts = [f"What of {n}?" for n in range(12)]
    build(tmp_path / "r", tokenizer, documents, prompts=prompts)
    other = build(tmp_path / "o", tokenizer, documents, prompts=[*prompts[:-1], "What?"])
    before = load_reference(tmp_path / "r")
    assert len({p["fingerprints"]["text"] for p in (plain, other)} | {before.text_fingerprint}) == 3
    after = retokenize(tmp_path / "r", tokenizer_at(tmp_path / "other", 400), tmp_path / "out")
    assert (after.text_fingerprint, after.objective) == (before.text_fingerprint, "prompt")
    assert after.bytes.sum() == before.bytes.sum()
    assert retokenize(tmp_path / "out", tokenizer, tmp_path / "back").tokens_fingerprint == before.tokens_fingerprint


def test_a_tokenizer_with_cls_and_sep_alone_opens(tmp_path: Path, tokenizer: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "a")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"cls_token": "!", "sep_token": {"content": "#"}}))
    found = open_tokenizer(tmp_path / "a")
    assert found.prefix_id == found.special["cls_token"] == found.backend.token_to_id("!")
    assert found.eos_id == found.special["sep_token"] == found.backend.token_to_id("#")
