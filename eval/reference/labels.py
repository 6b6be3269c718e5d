"""What a classifier is to say: the labels of texts, as names in data and as numbers in losses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError

MOST_CLASSES = 1000


@dataclass(frozen=True)
class Labels:
    """`given`: of each text: a name ("single"), a JSON list of names ("several") or a number ("regression").
    `names`: all there may be, in the order of their numbers; of a regression none."""

    problem: str
    names: tuple[str, ...]
    given: tuple[str, ...]

    @classmethod
    def of(cls, facts: dict[str, Any], given: Sequence[str]) -> Labels:
        """Of texts under the labels that `facts` names."""
        return cls(facts["problem"], tuple(facts["names"]), tuple(given))

    def facts(self) -> dict[str, Any]:
        """What the data and its reference set say of labels; `counts`: texts that have each."""
        counts = Counter(name for one in self.given for name in self._names_of(one))
        told = {"problem": self.problem, "names": list(self.names)}
        return told if self.problem == "regression" else {**told, "counts": [counts[name] for name in self.names]}

    @property
    def unit(self) -> str:
        """What a text's loss is."""
        return "squared error" if self.problem == "regression" else "nats per text"

    def take(self, places: Sequence[int]) -> Labels:
        """Of some of the texts."""
        return Labels(self.problem, self.names, tuple(self.given[at] for at in places))

    @cached_property
    def numbers(self) -> NDArray[Any]:
        """Of each text: the label's number int64 [N], 1 at its labels and else 0 float32 [N, K], or a float32 [N]."""
        if self.problem == "regression":
            return np.asarray([float(one) for one in self.given], np.float32)
        number = {name: at for at, name in enumerate(self.names)}
        if self.problem == "single":
            return np.asarray([number[one] for one in self.given], np.int64)
        out_NK = np.zeros((len(self.given), len(self.names)), np.float32)
        for row, one in enumerate(self.given):
            out_NK[row, [number[name] for name in json.loads(one)]] = 1
        return out_NK

    def _names_of(self, one: str) -> list[str]:
        return list(json.loads(one)) if self.problem == "several" else [one]


def labels_in(problem: str, given: Sequence[str], wanted: Sequence[str] | None) -> Labels:
    """The labels of texts; names are those in `wanted`, else those there are, sorted (whole numbers by their size).

    Raises:
        ConfigError: there is one class only, or there are more than could be meant.
    """
    if problem == "regression":
        return Labels(problem, (), tuple(given))
    found = {name for one in given for name in (json.loads(one) if problem == "several" else [one])}
    names = list(wanted) if wanted is not None else sorted(found, key=_by_size)
    if problem == "single" and len(found) < 2:
        only = f"the one label {next(iter(found))!r}" if found else "no label"
        raise ConfigError(f"data.label_field: all texts have {only}; a classifier needs two at least")
    if len(names) > MOST_CLASSES:
        raise ConfigError(
            f"data.label_field: {len(names):,} different labels, such as {names[0]!r} and {names[1]!r}; more than "
            f"{MOST_CLASSES:,} are none; for numbers set objective.problem: regression"
        )
    return Labels(problem, tuple(names), tuple(given))


def _by_size(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name)
