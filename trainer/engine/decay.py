"""Which parameters weight decay pulls at: matrices and embeddings; never norms, biases or what a model exempts.

By role and name, not by dimensions alone: a norm of each head, the biases of all experts and Mamba's A_log have two.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from configs.errors import ConfigError
from trainer.engine.zero_state import own_name

VECTORS = {"bias", "scale", "norm"}  # words in a parameter's name: its role, whatever its shape
STATE_SPACE = {"A_log", "D"}  # of Mamba and its kin, whose code marks them; reading weights may lose the mark


def decay_groups(model: nn.Module, no_decay: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is decayed, what is not): trained parameters by name, tied ones once, in the model's order.

    Args:
        no_decay: patterns of `optimizer.no_decay`, matched against whole names in the Hugging Face model.

    Raises:
        ConfigError: a pattern that no parameter has.
    """
    found = [(own_name(name), name, p) for name, p in model.named_parameters() if p.requires_grad]
    check_patterns([own for own, *_ in found], no_decay)
    exempt = set(_by_role(model))
    decayed: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for own, name, parameter in found:
        named = any(fnmatchcase(own, pattern) for pattern in no_decay)
        (kept if named or name in exempt else decayed)[own] = parameter
    return decayed, kept


def _by_role(model: nn.Module) -> Iterator[str]:
    """Names of parameters that are never decayed."""
    for place, module in model.named_modules():
        kind = type(module).__name__.lower()
        norm = "norm" in kind.replace("normal", "")
        for last, parameter in module.named_parameters(recurse=False):
            if (
                norm
                or _vector(parameter)
                or getattr(parameter, "_no_weight_decay", False)
                or last in STATE_SPACE
                or VECTORS & set(last.lower().split("_"))
            ):
                yield f"{place}.{last}" if place else last


def _vector(parameter: Any) -> bool:
    """Whether it has one dimension, or three and more of which one is not 1 (as RWKV's time_mix_key)."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return len(shape) <= 1 or (len(shape) > 2 and sum(size > 1 for size in shape) <= 1)


def alike(names: Iterable[str]) -> list[str]:
    """Parameters' names with a star for each number, once each: layers and experts are alike."""
    return list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))


def check_patterns(names: Sequence[str], patterns: Sequence[str], setting: str = "optimizer.no_decay") -> None:
    """Raises ConfigError for a pattern, of a setting, that fits none of a model's parameters."""
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        known = alike(names)
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
        raise ConfigError(f"{setting}: no parameter is named {pattern!r}; expected patterns such as {', '.join(near)}")
