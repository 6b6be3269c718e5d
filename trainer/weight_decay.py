"""Which parameters weight decay shrinks: matrices and embeddings, nothing that sets a scale, an offset or a rate."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from configs.errors import ConfigError

# By name: the logarithms of decay rates of state-space layers (Mamba), and gains that stand outside of a norm's module.
_RATES_AND_GAINS = ("A_log", "scale")


@dataclass(frozen=True)
class Decayed:
    """One trainable parameter, and why it is not decayed (None: it is)."""

    name: str
    parameter: nn.Parameter
    kept_from: str | None


def decay_of(model: nn.Module, patterns: Sequence[str] = ()) -> Iterator[Decayed]:
    """Every trainable parameter in the model's order, tied ones once.

    Not decayed are vectors (one dimension longer than 1, whatever their number), biases by name, experts' with two
    dimensions among them, all of a norm, rates and gains, what its model marks by `_no_weight_decay` (as the authors of
    Mamba do), and what a pattern names. Decay of these is a pull to a function, not to a simpler one; Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), say nothing of them, GPT-2 and its successors leave
    them out.

    Args:
        patterns: as in the shell, of whole names (`*embed_tokens*`).
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            yield Decayed(name, parameter, _why_not(name, leaf, parameter, modules[owner], patterns))


def _why_not(name: str, leaf: str, parameter: nn.Parameter, owner: nn.Module, patterns: Sequence[str]) -> str | None:
    own = name.removeprefix("lm.")  # of TrainableLM
    if any(fnmatchcase(own, pattern) for pattern in patterns):
        return "optimizer.no_decay"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "biases"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if leaf in _RATES_AND_GAINS or getattr(parameter, "_no_weight_decay", False):
        return "rates and gains"
    shape = getattr(parameter, "ds_shape", parameter.shape)  # whole, where DeepSpeed has cut it
    return "vectors" if sum(size > 1 for size in shape) <= 1 else None


def parameter_groups(model: nn.Module, weight_decay: float, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Torch's parameter groups: decayed first, then the others; none is empty.

    Raises:
        ConfigError: a pattern names no parameter.
    """
    every = list(decay_of(model, patterns))
    check_patterns([one.name.removeprefix("lm.") for one in every], patterns)
    groups = [
        {"params": [one.parameter for one in every if one.kept_from is None], "weight_decay": weight_decay},
        {"params": [one.parameter for one in every if one.kept_from is not None], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Refuses patterns of `optimizer.no_decay` that name nothing.

    Raises:
        ConfigError: a line each, with a name that is near.
    """
    problems = []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.strip("*"), names, n=1, cutoff=0.3)
            example = f", such as {near[0]}" if near else ""
            problems.append(
                f"optimizer.no_decay: {pattern!r} names no parameter of the model; expected a pattern of whole names"
                f"{example} (* stands for anything)"
            )
    if problems:
        raise ConfigError(*problems)
