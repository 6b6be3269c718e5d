"""Python finds our own packages, whatever else on PYTHONPATH or in the current folder is called `trainer` or `eval`."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

NAMES = ("configs", "eval", "trainer", "launcher", "slurm")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class _OursFirst:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if path is None and name in NAMES else None


def put_first() -> None:
    """Has this process find ours. Called when `configs` is imported, which every package of ours sees to."""
    if _OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, _OursFirst)


def put_first_for_children(environment: MutableMapping[str, str]) -> None:
    """Has processes with this environment find ours: `python -m trainer` must not run somebody else's.

    Where nothing of PYTHONPATH hides ours it stays as it is: what else lies beside ours need not come first.
    """
    given = environment.get("PYTHONPATH", "")
    folders = [os.path.abspath(folder) for folder in given.split(os.pathsep)] if given else []  # "" is the current one
    if folders and folders[0] != ROOT and any(_holds_ours(folder) for folder in folders):
        environment["PYTHONPATH"] = os.pathsep.join([ROOT, given])


def _holds_ours(folder: str) -> bool:
    names = (os.path.join(folder, name) for name in NAMES)
    return folder != ROOT and any(os.path.exists(name) or os.path.exists(f"{name}.py") for name in names)
