"""Whole documents in windows: nothing lost, nothing twice, nothing seen of another, and the same loss as one by one."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import DataError
from eval.scoring.losses import IGNORED
from trainer.data.examples import Examples
from trainer.data.shards import write_shards
from trainer.objectives import TrainableLM

LENGTH, VOCABULARY, PREFIX, EOS = 24, 64, 1, 2


def documents(seed: int = 0, count: int = 80, longest: int = LENGTH) -> list[np.ndarray]:
    numbers = np.random.default_rng(seed)
    return [numbers.integers(3, VOCABULARY, numbers.integers(2, longest + 2)).astype(np.uint32) for _ in range(count)]


def conversations(tmp_path: Path, *, packing: str, shard: int = 200) -> tuple[Examples, list, list]:
    ids = documents()
    masks = [np.random.default_rng(at).random(len(one)) < 0.5 for at, one in enumerate(ids)]
    write_shards(tmp_path / "shards", ids, None, VOCABULARY, scored=masks, shard_tokens=shard)
    return Examples(tmp_path, LENGTH, packing), ids, masks


@pytest.mark.parametrize("packing", ["documents", "none"])
@pytest.mark.parametrize("shard", [97, 10_000])
def test_each_target_is_there_once_after_the_tokens_before_it(packing: str, shard: int, tmp_path: Path) -> None:
    data, ids, masks = conversations(tmp_path, packing=packing, shard=shard)
    found = set()
    for window in range(len(data)):
        fed = data.fed(np.array([window]))
        assert fed.scored is not None
        positions = fed.positions if fed.positions is not None else np.arange(fed.ids.shape[1])[None]
        starts = [*np.flatnonzero(positions[0] == 0).tolist(), fed.ids.shape[1]]
        for a, b in pairwise(starts):
            if fed.scored[0, a:b].any():
                length = int(np.flatnonzero(fed.scored[0, a:b])[-1]) + 1
                text = (*fed.ids[0, a : a + length].tolist(), int(fed.targets[0, a + length - 1]))
                found.add((text, tuple(np.flatnonzero(fed.scored[0, a:b]).tolist())))
        assert fed.scored.sum() == data.target_counts(np.array([window]))[0]
    wanted = set()
    for one, mask in zip(ids, masks, strict=True):
        if mask[1:].any():
            last = int(np.flatnonzero(mask[1:])[-1]) + 1
            wanted.add((tuple(one[: last + 1].tolist()), tuple(np.flatnonzero(mask[1:]).tolist())))
    assert found == wanted
    assert data.documents(np.arange(len(data))).tolist() == list(range(len(ids)))
    assert (data.fill() > 0.9) == (packing == "documents")


def test_texts_are_asked_for_from_their_first_token_and_cut_where_they_are_too_long(tmp_path: Path) -> None:
    ids = documents(longest=3 * LENGTH)
    write_shards(tmp_path / "shards", ids, EOS, VOCABULARY)
    data = Examples(tmp_path, LENGTH, "documents", PREFIX)
    assert data.target_counts(np.arange(len(data))).sum() == sum(len(one) + 1 for one in ids)
    asked = []
    for window in range(len(data)):
        fed = data.fed(np.array([window]))
        assert fed.scored is not None
        assert fed.positions is not None
        first = fed.positions[0] == 0
        asked += fed.targets[0][fed.scored[0]].tolist()
        before = fed.ids[0][1:][~first[1:] & fed.scored[0][1:]]
        assert (before == fed.targets[0][:-1][~first[1:] & fed.scored[0][1:]]).all()
    assert np.bincount(asked).tolist() == np.bincount(np.concatenate([*ids, [EOS] * len(ids)])).tolist()


def test_a_document_that_a_window_does_not_hold_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", documents(longest=LENGTH), None, VOCABULARY)
    with pytest.raises(DataError, match=r"sequence_length: 10 is shorter than a document of 25 tokens"):
        Examples(tmp_path, 10, "documents")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_packed_batch_has_the_loss_and_the_gradient_of_its_documents_one_by_one(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
    own = {"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64, "head_dim": 8}
    sizes |= {} if kind == "gpt2" else own
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    model = TrainableLM(lm).eval()
    summed = {}
    for packing in ("documents", "none"):
        data, *_ = conversations(tmp_path, packing=packing)
        lm.zero_grad()
        total = 0.0
        for chunk in np.array_split(np.arange(len(data)), max(1, len(data) // 8)):
            fed = data.fed(chunk)
            assert fed.scored is not None
            target = torch.from_numpy(np.where(fed.scored, fed.targets, IGNORED))
            position = None if fed.positions is None else torch.from_numpy(fed.positions)
            loss = model(torch.from_numpy(fed.ids), target, position)
            loss.backward()
            total += float(loss.detach())
        summed[packing] = total, torch.cat([p.grad.flatten() for p in lm.parameters()])
    packed, alone = summed["documents"], summed["none"]
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert torch.allclose(packed[1], alone[1], rtol=1e-4, atol=1e-4)
