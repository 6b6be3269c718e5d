"""Dropout whose masks belong to the windows: a function of (seed, position, window) and of the place in the model.

Neither ranks nor the micro-batch size nor what was drawn before changes them. The model is left as it is: its calls of
`torch.nn.functional.dropout`, `torch.dropout` and `scaled_dot_product_attention` are answered here instead.
The n-th such call of a forward pass draws each window's mask from a generator seeded with the n-th output of SplitMix64
(Steele, Lea, Flood, OOPSLA 2014) that starts at the window's seed. Nothing is carried over from call to call, so
gradient checkpointing, which runs layers again in the backward pass, has only to know where it began to count.

A tensor is taken for B windows, batch first, where its first dimension is a multiple of B. Else (tokens routed to one
of several experts, a position embedding) it has one mask, of the first window. Everything else that is random (noise in
a router, layers left out as a whole) follows the first window's seed too. These two do change with the micro-batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

# Fields of a config that are of no concern to a causal LM: of heads that it does not have.
OTHER_HEADS = ("summary_", "classifier_", "seq_classif", "qa_", "pooler_")
_MASK = 0xFFFFFFFFFFFFFFFF
_current = threading.local()  # backward passes on a GPU run in threads of their own


class WindowDropout:
    """The dropout of one causal LM."""

    def __init__(self, lm: Any) -> None:
        self.needed = drops(lm)

    def windows(self, seeds: Sequence[int]) -> AbstractContextManager[Any]:
        """Within it, a forward pass over a micro-batch draws its masks from the windows' seeds.

        The backward pass may be outside of it.

        Args:
            seeds: one a row of the micro-batch, each in 0..2^64-1, made from (seed, position, window).
        """
        torch.manual_seed(seeds[0])
        return _Windows(seeds) if self.needed else nullcontext()


def drops(lm: Any) -> bool:
    """Whether a causal LM drops anything while it trains. Settings of heads that it does not have do not count."""
    config = lm.config.get_text_config().to_dict()
    found = [value for name, value in config.items() if "drop" in name and not name.startswith(OTHER_HEADS)]
    for module in lm.modules():
        found += [value for name, value in vars(module).items() if "drop" in name]
        if isinstance(module, _DropoutNd):
            found.append(module.p)
    return any(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in found)


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For `torch.utils.checkpoint`'s `context_fn`: a layer that is run again draws the masks it had the first time."""
    active: _Windows | None = getattr(_current, "mode", None)
    return nullcontext(), nullcontext() if active is None else _Windows(active.seeds, active.calls)


class _Windows(TorchFunctionMode):
    """Answers the calls that drop. May be entered again, and then counts from `start` again."""

    def __init__(self, seeds: Sequence[int], start: int = 0) -> None:
        super().__init__()
        self.seeds = seeds
        self.start = self.calls = start  # calls so far that dropped anything

    def __enter__(self) -> _Windows:
        self.calls = self.start
        self.outer = getattr(_current, "mode", None)
        _current.mode = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _current.mode = self.outer
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = ANSWERS.get(func)
        if answer is None:
            return func(*args, **(kwargs or {}))
        return answer(self, *args, **(kwargs or {}))

    def pieces(self, tensor: torch.Tensor) -> Iterator[int]:
        """The next call's pieces of `tensor` along its first dimension: yields each one's size.

        While a piece is out, the default generator of the tensor's device is seeded for it; then it is as it was.
        """
        rows = len(self.seeds)
        whole = tensor.dim() == 0 or tensor.shape[0] % rows != 0
        generator = _default_generator(tensor.device)
        before = generator.get_state()
        self.calls += 1
        try:
            for seed in self.seeds[:1] if whole else self.seeds:
                generator.manual_seed(_split_mix(seed, self.calls))
                yield 0 if tensor.dim() == 0 else tensor.shape[0] // (1 if whole else rows)
        finally:
            generator.set_state(before)

    def dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        """As `torch.nn.functional.dropout`."""
        if not training or not 0 < p <= 1:
            return F.dropout(input, p, training, inplace)
        kept = torch.empty(input.shape, dtype=torch.bool, device=input.device)
        place = 0
        for size in self.pieces(input):
            (kept[place : place + size] if input.dim() else kept).bernoulli_(1 - p)
            place += size
        scale = 1 / (1 - p) if p < 1 else 0.0
        # Scaled by itself: a mask of 0s and scales would have to be kept for the backward pass in 4 bytes an element.
        return input.mul_(kept).mul_(scale) if inplace else (input * kept) * scale

    def torch_dropout(self, input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        """As `torch.dropout`."""
        return self.dropout(input, p, train)

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **settings: Any,
    ) -> torch.Tensor:
        """As `torch.nn.functional.scaled_dot_product_attention`, a window at a time.

        Kernels that never hold the weights draw their masks inside, from the device's default generator: so the
        windows cannot share a call.
        """
        given = {"dropout_p": dropout_p, "is_causal": is_causal, **settings}
        if dropout_p <= 0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **given)
        parts: list[Sequence[Any]] = []
        outputs = []
        for at, size in enumerate(self.pieces(query)):
            if not parts:  # split once: its backward pass joins the pieces' gradients in one go
                parts = [_split(tensor, query, size) for tensor in (query, key, value, attn_mask)]
            q, k, v, mask = (part[at if len(part) > 1 else 0] for part in parts)
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask, **given))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


ANSWERS: dict[Any, Callable[..., torch.Tensor]] = {
    F.dropout: _Windows.dropout,
    torch.dropout: _Windows.torch_dropout,
    F.scaled_dot_product_attention: _Windows.attention,
}


def _split(tensor: torch.Tensor | None, like: torch.Tensor, size: int) -> Sequence[Any]:
    """Pieces of `size` rows of a tensor that has as many as `like`; the tensor itself where all rows share it."""
    if tensor is None or tensor.dim() < like.dim() or tensor.shape[0] != like.shape[0]:
        return [tensor]
    pieces: tuple[torch.Tensor, ...] = tensor.split(size)
    return pieces


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    generator: torch.Generator = module.default_generators[index]
    return generator


def _split_mix(seed: int, call: int) -> int:
    """The `call`-th output of SplitMix64 started at `seed` (Steele, Lea, Flood, OOPSLA 2014, §5)."""
    x = (seed + call * 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
