"""Losses are those that lm-evaluation-harness and transformers find; bits per byte are what one adds up by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import vernier

from eval.reference.set import ReferenceSet, load_reference
from eval.scoring.losses import IGNORED
from eval.statistics import by_cluster
from eval.tables import LossTable, read_table

L = 64  # sequence_length of tests/tiny.yaml


def model_at(directory: Path, vocab_size: int) -> Any:
    """A Llama with random weights, large enough that its predictions are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(vocab_size)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=L + 1, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(directory)
    return model


def scored(model: Path, reference: Path, out: Path) -> LossTable:
    vernier("eval", model, "--reference", reference, "--out", out)
    (path,) = out.glob("*.parquet")
    return read_table(path)


@pytest.fixture(scope="module")
def reference(tiny_data: Path) -> ReferenceSet:
    found = load_reference(tiny_data / "reference")
    assert found.sequence_length == L
    assert len(found.sample) > found.documents  # some documents have several windows
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agreement")


@pytest.fixture(scope="module")
def model(reference: ReferenceSet, folder: Path) -> Any:
    return model_at(folder / "a", reference.vocab_size)


@pytest.fixture(scope="module")
def table(model: Any, reference: ReferenceSet, folder: Path) -> LossTable:
    return scored(folder / "a", reference.directory, folder / "tables-a")


def texts_of(reference: ReferenceSet) -> list[str]:
    return pq.read_table(reference.directory / "documents.parquet")["text"].to_pylist()


def test_a_documents_loss_is_that_of_lm_evaluation_harness(
    model: Any, reference: ReferenceSet, table: LossTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip("lm_eval", reason="lm_eval is in the extra `dev`")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference.directory / "tokenizer")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=L, batch_size=4, device="cpu")
    texts = texts_of(reference)
    for document, text in enumerate(texts):  # the same tokens, so that what is compared is the losses
        own = np.flatnonzero(reference.document == document)
        assert len(harness.tok_encode(text)) == reference.tokens[own].sum()
        assert harness.prefix_token_id == reference.input_ids[reference.offsets[own[0]]]
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in texts]
    theirs_D = -np.asarray(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    np.testing.assert_allclose(np.bincount(table.document, weights=table.loss), theirs_D, rtol=1e-4)


def test_a_samples_loss_is_that_which_transformers_computes_from_labels(
    model: Any, reference: ReferenceSet, table: LossTable
) -> None:
    for sample in range(len(table)):
        row = reference.input_ids[reference.offsets[sample] : reference.offsets[sample + 1]]
        ids = torch.from_numpy(row.astype(np.int64))[None]
        labels = ids.clone()
        labels[0, : reference.labels_from[sample]] = IGNORED
        with torch.no_grad():
            mean = float(model(input_ids=ids, labels=labels).loss)
        assert table.loss[sample] == pytest.approx(mean * table.tokens[sample], rel=1e-5)


def other_tokenizer(directory: Path, texts: list[str]) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return directory


def test_two_tokenizers_are_compared_in_bits_per_byte_document_by_document(
    reference: ReferenceSet, table: LossTable, folder: Path
) -> None:
    tokenizer, again = other_tokenizer(folder / "tokenizer", texts_of(reference)), folder / "reference-b"
    vernier("prepare", "--reference", reference.directory, "--tokenizer", tokenizer, "--out", again)
    retokenized = load_reference(again)
    model_at(folder / "b", retokenized.vocab_size)
    other = scored(folder / "b", again, folder / "tables-b")
    assert other.tokens.sum() < table.tokens.sum()
    assert other.bytes.sum() == table.bytes.sum() == sum(len(text.encode()) for text in texts_of(reference))

    targets = [next((folder / f"tables-{name}").glob("*.parquet")) for name in "ab"]
    found = json.loads(vernier("compare", *targets, "--json").stdout)

    bytes_D = np.bincount(table.document, weights=table.bytes)
    a_D, b_D = (np.bincount(t.document, weights=t.loss) / math.log(2) for t in (table, other))
    a, b = a_D.sum() / bytes_D.sum(), b_D.sum() / bytes_D.sum()
    assert (found["unit"], found["paired_by"]) == ("bits per byte", "document")
    assert found["reference"] == reference.text_fingerprint == retokenized.text_fingerprint
    assert found["difference"]["nats"] is None
    assert [found[side]["loss"] for side in "ab"] == pytest.approx([a, b], rel=1e-12)
    assert found["difference"]["bits_per_byte"] == pytest.approx(b - a, rel=1e-9)
    assert found["difference"]["percent"] == pytest.approx(100 * (b - a) / a, rel=1e-9)
    # The error of the ratio ΣD/ΣA by the delta method, families of documents as clusters (docs/design.md, section 2).
    ratio = (b_D - a_D).sum() / a_D.sum()
    family_D = table.cluster[np.unique(table.document, return_index=True)[1]]
    residual_C = by_cluster(b_D - a_D - ratio * a_D, family_D)
    n = len(residual_C)
    error = math.sqrt(n / (n - 1) * (residual_C**2).sum()) / a_D.sum()
    assert found["difference"]["se_percent"] == pytest.approx(100 * error, rel=1e-9)
    assert found["difference"]["win_rate"] == pytest.approx((b_D < a_D).mean())
