"""The loss of a plain output head, and its gradient, in one go: logits are made once, a chunk at a time.

Hidden states' and weights' gradients are ready when the forward pass ends, so the backward pass has only to scale
them; logits of all targets never exist, and are not made again (as Liger's fused linear cross-entropy does; Hsu et al.,
arXiv 2410.10989, section 3.2). Targets that are not asked for are left out before the product.
Legend: N targets, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

IGNORED = -100  # a target that is not scored (torch's and transformers' convention)


def head_loss(head: torch.nn.Linear, hidden_NH: torch.Tensor, target_N: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum of negative log likelihood over the targets that are not IGNORED (nats, fp32 scalar, differentiable).

    The head is called as the module it is: at ZeRO-3 its hooks gather its weights.

    Args:
        rows: targets a chunk.
    """
    with _answering(head, rows):
        loss: torch.Tensor = head(hidden_NH, target_N)
    return loss


@contextmanager
def _answering(head: torch.nn.Linear, rows: int) -> Iterator[None]:
    """Within it the head answers hidden states and targets with their loss."""

    def forward(hidden_NH: torch.Tensor, target_N: torch.Tensor) -> Any:
        return _FusedLoss.apply(hidden_NH, head.weight, head.bias, target_N, rows)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]


class _FusedLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, target [N], rows a chunk) → the summed loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        place_N = _asked_for(target_N)
        asked_NH = hidden_NH if place_N is None else hidden_NH[place_N]
        target_N = target_N if place_N is None else target_N[place_N]
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(asked_NH) if wants_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        for start in range(0, len(target_N), rows):
            part = slice(start, start + rows)
            own_N, h_NH = target_N[part], asked_NH[part]
            logits_NV = torch.nn.functional.linear(h_NH, weight_VH, bias_V)
            fine_NV = logits_NV.float()
            known_N = own_N != IGNORED
            own_N = own_N.clamp(min=0)[:, None]
            asked_N, top_N = fine_NV.gather(-1, own_N)[:, 0], fine_NV.amax(-1)
            p_NV = fine_NV.sub_(top_N[:, None]).exp_()
            sum_N = p_NV.sum(-1)
            total += torch.where(known_N, top_N + sum_N.log() - asked_N, 0.0).sum()
            if grad_NH is None and grad_VH is None and grad_V is None:
                continue
            p_NV.div_(sum_N[:, None])  # of the loss by the logits it is p, and p − 1 at the target
            p_NV.scatter_add_(-1, own_N, torch.full_like(own_N, -1, dtype=p_NV.dtype))
            p_NV = (p_NV * known_N[:, None] if place_N is None and not _on_cpu(p_NV) else p_NV).to(logits_NV.dtype)
            if grad_NH is not None:
                grad_NH[part] = p_NV @ weight_VH.to(p_NV.dtype)
            if grad_VH is not None:
                grad_VH += p_NV.t() @ h_NH.to(p_NV.dtype)
            if grad_V is not None:
                grad_V += p_NV.sum(0)
        if grad_NH is not None and place_N is not None:
            grad_NH = torch.zeros_like(hidden_NH).index_copy_(0, place_N, grad_NH)
        ctx.kinds = hidden_NH.dtype, weight_VH.dtype
        ctx.save_for_backward(grad_NH, grad_VH, grad_V)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        hidden, weight = ctx.kinds
        return (
            None if of_hidden is None else (of_hidden * scale.to(of_hidden.dtype)).to(hidden),
            None if of_weight is None else of_weight.mul_(scale).to(weight),
            None if of_bias is None else of_bias.mul_(scale).to(weight),
            None,
            None,
        )


def _asked_for(target_N: torch.Tensor) -> torch.Tensor | None:
    """Places of the targets that are asked for; None: all are, or the device would have to be waited for to know."""
    if not _on_cpu(target_N) or bool((target_N != IGNORED).all()):
        return None
    return torch.nonzero(target_N != IGNORED)[:, 0]


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
