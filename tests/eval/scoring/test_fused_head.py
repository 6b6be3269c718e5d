"""The loss of an output head in one go: as the naive one, and its gradients too, whatever is asked for."""

import pytest
import torch
import torch.nn.functional as F

from eval.scoring.fused_head import IGNORED, head_loss

WIDTH, VOCABULARY, TARGETS = 24, 301, 90


def made(seed: int = 0, *, bias: bool = False) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias)
    return head, torch.randn(TARGETS, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (TARGETS,))


@pytest.mark.parametrize("rows", [1, 7, 90, 1000])
@pytest.mark.parametrize("ignored", [0, 40, TARGETS])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_the_naive_ones(rows: int, ignored: int, bias: bool) -> None:
    head, hidden, target = made(bias=bias)
    target[torch.randperm(TARGETS)[:ignored]] = IGNORED
    wanted = F.cross_entropy(head(hidden), target, ignore_index=IGNORED, reduction="sum")
    of = [hidden, *head.parameters()]
    gradients = torch.autograd.grad(wanted * 0.3, of)
    found = head_loss(head, hidden, target, rows)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for mine, naive in zip(torch.autograd.grad(found * 0.3, of), gradients, strict=True):
        assert (mine - naive).norm() <= 1e-6 * naive.norm() + 1e-9
    assert "forward" not in vars(head)


def test_tied_weights_get_both_gradients() -> None:
    head, _, target = made()
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight = head.weight
    ids = torch.randint(0, VOCABULARY, (TARGETS,))
    naive = torch.autograd.grad(F.cross_entropy(head(embedding(ids)), target, reduction="sum"), head.weight)[0]
    mine = torch.autograd.grad(head_loss(head, embedding(ids), target, 16), head.weight)[0]
    assert (mine - naive).abs().max() <= 1e-6 * naive.abs().max()


def test_what_is_frozen_costs_no_gradient() -> None:
    head, hidden, target = made()
    head.requires_grad_(False)
    head_loss(head, hidden, target, 16).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_in_16_bits_it_is_as_near_as_the_naive_one() -> None:
    head, hidden, target = made()
    exact = torch.autograd.grad(F.cross_entropy(head(hidden), target, reduction="sum"), [hidden, head.weight])
    head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    of = [hidden, head.weight]
    naive = torch.autograd.grad(F.cross_entropy(head(hidden).float(), target, reduction="sum"), of)
    mine = torch.autograd.grad(head_loss(head, hidden, target, 16), of)
    for a, b, c in zip(mine, naive, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - c).norm() <= 1.2 * (b.float() - c).norm()
