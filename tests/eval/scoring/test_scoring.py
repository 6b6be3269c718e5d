"""Scoring gives the same bits at any number of ranks, and the numbers that transformers gives."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, table_of, vernier

from eval.reference.set import load_reference
from eval.tables import read_table


@pytest.fixture(scope="module")
def tables(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = tiny_run / "snapshots" / "step-00000020"
    found = {}
    ways = {"1": [], "2": [], "3": [], "shuffled": ["--shuffle-batches", 11]}
    for way, options in ways.items():
        out = tmp_path_factory.mktemp("tables")
        nproc = 2 if way == "shuffled" else way
        vernier("eval", model, "--reference", tiny_data / "reference", "--nproc", nproc, "--out", out, *options)
        (found[way],) = out.glob("*.parquet")
    return found


@pytest.mark.parametrize("way", ["2", "3", "shuffled"])
def test_tables_are_the_same_bits_at_any_number_of_ranks_and_order_of_batches(way: str, tables: dict) -> None:
    assert tables[way].read_bytes() == tables["1"].read_bytes()


def test_inline_scoring_gives_the_same_bits(tables: dict, tiny_run: Path) -> None:
    assert np.array_equal(read_table(table_of(tiny_run, 20)).loss, read_table(tables["1"]).loss)


def test_each_samples_loss_is_that_of_a_plain_transformers_forward(
    tables: dict, tiny_run: Path, tiny_data: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_run / "snapshots" / "step-00000020", dtype=torch.float32)
    table, reference = read_table(tables["1"]), load_reference(tiny_data / "reference")
    seen = 0
    for batch in range(reference.batch_count):
        ids, first, lengths = reference.batch_inputs(batch)
        for row, sample in enumerate(reference.batch_samples(batch)):
            own = torch.from_numpy(ids[row, : lengths[row]])
            with torch.no_grad():
                logits = model(input_ids=own[None, :-1]).logits[0].float()
            nll = torch.nn.functional.cross_entropy(logits, own[1:], reduction="none")[first[row] - 1 :]
            assert len(nll) == table.tokens[sample]
            assert table.loss[sample] == pytest.approx(float(nll.double().sum()), rel=1e-5)
            seen += 1
    assert seen == len(table)


def test_tokens_correct_and_positions_add_up(tables: dict) -> None:
    table = read_table(tables["1"])
    assert np.array_equal(table.position_tokens.sum(1), table.tokens)
    np.testing.assert_allclose(table.position_loss.sum(1), table.loss, rtol=1e-12)
    assert 0.05 < table.correct.sum() / table.tokens.sum() < 0.9


def test_what_is_scored_already_costs_nothing(tiny_run: Path, tiny_data: Path) -> None:
    done = vernier("eval", tiny_run / "snapshots" / "step-00000020", "--reference", tiny_data / "reference")
    assert "scored already" in done.stderr


def test_a_model_whose_logits_are_more_than_its_head_is_scored_right() -> None:
    """Gemma-2 caps its logits after the head: the short cut must notice and not be taken."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from eval.scoring.losses import Scorer, split_model

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert split_model(model) is None  # also now, when its logits are near 0 and no cap is reached
    ids = torch.randint(1, 100, (3, 12))
    found = Scorer(model, 16).score(ids, torch.tensor([1, 4, 1]), torch.tensor([12, 12, 5]))
    logits = model(input_ids=ids[:, :-1]).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 11)
    expected = [nll[0].sum(), nll[1, 3:].sum(), nll[2, :4].sum()]
    np.testing.assert_allclose(found.loss.numpy(), [float(e) for e in expected], rtol=1e-5)


def test_a_model_in_the_hugging_face_cache_is_scored(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The cache calls its folder `snapshots` as well, and knows nothing of our manifests."""
    model = tmp_path / "models--who--what" / "snapshots" / "0123abcd"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", model)
    (model / "manifest.json").unlink()
    out = tmp_path / "losses"
    vernier("eval", model, "--reference", tiny_data / "reference", "--out", out)
    (path,) = out.glob("0123abcd@*")
    again, first = read_table(path), read_table(table_of(tiny_run, 20))
    assert np.array_equal(again.loss, first.loss)
    assert again.meta["source"] == first.meta["source"]  # by the content of the weights, not their files


def test_zero3_scores_inline_in_chunks_although_batches_need_different_numbers_of_them(
    tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "zero.stage=3", "steps=2", "schedule.warmup_steps=0"]
    small = {**os.environ, "VERNIER_LOGITS_BYTES": str(4 * 512 * 20)}
    vernier("train", TINY, *settings, env=small)
    model = run / "snapshots" / "step-00000002"
    vernier("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path, env=small)
    (path,) = tmp_path.glob("*.parquet")
    np.testing.assert_allclose(read_table(table_of(run, 2)).loss, read_table(path).loss, rtol=1e-5)


def test_chunks_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from eval.scoring import losses as module

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=200,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids, target = torch.randint(0, 200, (4, 30)), torch.randint(0, 200, (4, 30))
    target[1, :20] = module.IGNORED
    parts = module.split_model(model)
    assert parts is not None

    def loss_and_gradient() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = module.training_loss(parts, ids, target, 200)
        loss.backward()
        return float(loss), model.lm_head.weight.grad.clone()

    whole = loss_and_gradient()
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 200 * 16)
    pieces = loss_and_gradient()
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(pieces[1], whole[1])
