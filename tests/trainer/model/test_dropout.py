"""Dropout belongs to windows: the same masks however a global batch is cut, with gradient checkpointing or without."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY

from configs.load import load_config
from eval.scoring.score import cpu_threads
from trainer.model.build import make_model
from trainer.model.dropout import WindowDropout
from trainer.objectives import TrainableLM
from trainer.order import mixed_seed

WINDOWS, LENGTH, VOCABULARY = 8, 12, 64
AT_ONCE = [list(range(WINDOWS))]
CUTS = {
    "one by one": [[w] for w in range(WINDOWS)],
    "two of four, in another order": [[5, 0, 7, 2], [1, 6, 3, 4]],
    "of unequal size": [[3, 2, 1], [0, 4, 5, 6, 7]],
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
ALL_DROP = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
MODELS = {
    "gpt2": ("gpt2", GPT2 | ALL_DROP),
    "gpt2, eager": ("gpt2", GPT2 | ALL_DROP | {"attn_implementation": "eager"}),
    "llama": ("llama", LLAMA | {"num_key_value_heads": 2, "attention_dropout": 0.1}),
    "llama, eager": ("llama", LLAMA | {"attention_dropout": 0.1, "attn_implementation": "eager"}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On models this small a second thread only waits."""
    with cpu_threads(1):
        yield


def lm_of(kind: str, fields: dict[str, Any], *, checkpointing: bool = False) -> Any:
    from transformers import AutoConfig

    ids = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    hf = AutoConfig.for_model(kind, **ids, **fields)
    config = load_config(Path(ROOT / TINY)).model_copy(update={"gradient_checkpointing": checkpointing})
    return make_model(config, hf).train()


def trained(lm: Any, cut: list[list[int]], position: int = 3) -> tuple[float, list[torch.Tensor]]:
    """Summed loss and gradients of a global batch, a forward and a backward pass a micro-batch."""
    model, dropout = TrainableLM(lm), WindowDropout(lm)
    lm.train()
    ids_BT = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    total = 0.0
    for rows in cut:
        torch.rand(7)  # what was drawn before must not matter
        with dropout.windows([mixed_seed(17, position, w) for w in rows]):
            loss = model(ids_BT[rows, :-1], ids_BT[rows, 1:])
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the second's norm."""
    a, b = (torch.cat([g.double().flatten() for g in gradients]) for gradients in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_however_a_batch_is_cut_loss_and_gradients_are_the_same(name: str) -> None:
    lm = lm_of(*MODELS[name])
    loss, gradients = trained(lm, AT_ONCE)
    for cut in CUTS.values():
        again, others = trained(lm, cut)
        assert again == pytest.approx(loss, rel=1e-6)
        assert apart(others, gradients) < 1e-6
    assert trained(lm, AT_ONCE, position=4)[0] != pytest.approx(loss, rel=1e-5)  # masks are drawn anew


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_has_the_same_masks_again(name: str) -> None:
    loss, gradients = trained(lm_of(*MODELS[name]), AT_ONCE)
    lm = lm_of(*MODELS[name], checkpointing=True)
    for cut in (AT_ONCE, *CUTS.values()):
        again, others = trained(lm, cut)
        assert again == pytest.approx(loss, rel=1e-6)
        assert apart(others, gradients) < 1e-6


def test_gradient_checkpointing_without_dropout_has_the_same_gradients() -> None:
    loss, gradients = trained(lm_of("llama", LLAMA), AT_ONCE)
    again, others = trained(lm_of("llama", LLAMA, checkpointing=True), CUTS["one by one"])
    assert again == pytest.approx(loss, rel=1e-6)
    assert apart(others, gradients) < 1e-6


@pytest.fixture(scope="module")
def dropout() -> WindowDropout:
    return WindowDropout(lm_of(*MODELS["gpt2"]))


def seeds(*windows: int, position: int = 0) -> list[int]:
    return [mixed_seed(17, position, w) for w in windows]


def test_every_window_call_and_position_has_its_own_mask(dropout: WindowDropout) -> None:
    ones = torch.ones(3, 1000)
    with dropout.windows(seeds(1, 2, 1)):
        first, second = F.dropout(ones, 0.5), F.dropout(ones, 0.5)
    with dropout.windows(seeds(1, position=1)):
        elsewhere = F.dropout(ones[:1], 0.5)
    masks = [first[0], first[1], second[0], second[1], elsewhere[0]]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.4 < (a == b).float().mean() < 0.6
    assert torch.equal(first[2], first[0])  # one window twice


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fraction_dropped_and_the_scale_are_right(dropout: WindowDropout, p: float, dtype: torch.dtype) -> None:
    x = torch.ones(4, 25_000, dtype=dtype, requires_grad=True)
    with dropout.windows(seeds(1, 2, 3, 4)):
        y = F.dropout(x, p)
        y.sum().backward()
    assert y.dtype == dtype
    assert abs((y == 0).float().mean() - p) < 0.01
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-2)
    assert torch.equal(x.grad, y)


def test_attention_drops_its_weights_by_window(dropout: WindowDropout) -> None:
    length = 100
    query, key = torch.zeros(4, 2, length, length), torch.zeros(4, 2, length, length)
    value = length * torch.eye(length).expand(4, 2, -1, -1)  # weights come out, 1 each undropped
    with dropout.windows(seeds(1, 2, 3, 4)):
        weights = F.scaled_dot_product_attention(query, key, value, dropout_p=0.2)
    with dropout.windows(seeds(3)):
        third = F.scaled_dot_product_attention(query[:1], key[:1], value[:1], dropout_p=0.2)
    assert abs((weights == 0).float().mean() - 0.2) < 0.01
    assert weights.max().item() == pytest.approx(1.25)
    assert torch.equal(third[0], weights[2])
    assert 0.6 < (weights[0] == weights[1]).float().mean() < 0.76


def test_attention_with_a_mask_per_window_and_shared_keys(dropout: WindowDropout) -> None:
    generator = torch.Generator().manual_seed(2)
    q_BHTD, k_BHTD = (torch.randn(4, 2, 6, 8, generator=generator) for _ in range(2))
    mask = torch.rand(4, 1, 6, 6, generator=generator) < 0.7
    mask |= torch.eye(6, dtype=torch.bool)
    with dropout.windows(seeds(1, 2, 3, 4)):
        whole = F.scaled_dot_product_attention(q_BHTD, k_BHTD[:1], k_BHTD[:1], attn_mask=mask, dropout_p=0.5)
    with dropout.windows(seeds(4)):
        last = F.scaled_dot_product_attention(q_BHTD[3:], k_BHTD[:1], k_BHTD[:1], mask[3:], 0.5)
    torch.testing.assert_close(whole[3:], last)


def test_tokens_laid_flat_have_the_masks_of_their_windows(dropout: WindowDropout) -> None:
    with dropout.windows(seeds(1, 2)):
        rows = F.dropout(torch.ones(2, 5, 40), 0.5)
    with dropout.windows(seeds(1, 2)):
        flat = torch.dropout(torch.ones(10, 40), 0.5, True)
    assert torch.equal(flat, rows.flatten(0, 1))


def test_a_tensor_that_is_not_of_windows_has_a_mask_of_the_first(dropout: WindowDropout) -> None:
    with dropout.windows(seeds(1, 2)):
        odd = F.dropout(torch.ones(5, 40), 0.5)
        none = F.dropout(torch.ones(0, 40), 0.5)
    with dropout.windows(seeds(1)):
        first = F.dropout(torch.ones(5, 40), 0.5)
    assert torch.equal(odd, first)
    assert none.shape == (0, 40)


def test_what_else_is_random_follows_the_first_window(dropout: WindowDropout) -> None:
    drawn = []
    for others in ((2, 3), (4,)):
        with dropout.windows(seeds(1, *others)):
            F.dropout(torch.ones(1 + len(others), 4), 0.5)
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_nothing_is_dropped_while_evaluating(dropout: WindowDropout) -> None:
    lm = lm_of(*MODELS["gpt2"]).eval()
    ids_BT = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    plain = lm(ids_BT).logits
    with dropout.windows(seeds(1, 2)):
        assert torch.equal(lm(ids_BT).logits, plain)


@pytest.mark.parametrize(
    ("kind", "fields", "needed"),
    [
        ("gpt2", GPT2 | ALL_DROP, True),
        ("gpt2", GPT2 | dict.fromkeys(ALL_DROP, 0.0), False),  # a head that is not there would drop by default
        ("llama", LLAMA, False),
        ("llama", LLAMA | {"attention_dropout": 0.01}, True),
    ],
)
def test_a_model_that_drops_nothing_is_left_alone(kind: str, fields: dict[str, Any], needed: bool) -> None:
    assert WindowDropout(lm_of(kind, fields)).needed is needed
