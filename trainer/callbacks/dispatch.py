"""Calls callbacks, ours and the user's; finds the user's classes, and says whose mistake ended a training."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from configs.errors import ConfigError, VernierError
from trainer.callbacks.callback import HOOKS, RunContext

KEY = "callbacks"


def find_callbacks(names: Iterable[str]) -> list[type]:
    """The classes that `callbacks` names, as `module:Class` or `FILE.py:Class`.

    Raises:
        ConfigError: which of them cannot be had, and why, a line each.
    """
    found: list[type] = []
    problems: list[str] = []
    for name in names:
        try:
            found.append(_class_of(name))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(*problems)
    return found


def _class_of(name: str) -> type:
    place, _, wanted = name.rpartition(":")
    if not place or not wanted.isidentifier():
        raise ConfigError(f"{KEY}: {name!r}: expected module:Class, or FILE.py:Class")
    try:
        module = _module_of(place)
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(f"{KEY}: {name}: cannot be imported ({type(error).__name__}: {error})") from error
    kind = getattr(module, wanted, None)
    if not isinstance(kind, type):
        there = sorted(n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__)
        raise ConfigError(f"{KEY}: {name}: has no class {wanted}; it has {', '.join(there) or 'none'}")
    strange = [n for n in dir(kind) if n.startswith("on_") and n not in HOOKS]
    if strange:
        raise ConfigError(f"{KEY}: {name}: {strange[0]} is never called; what is: {', '.join(HOOKS)}")
    return kind


def _module_of(place: str) -> ModuleType:
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return import_module(place)
    path = Path(place).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"callbacks_of_{path.stem}"  # not its own name, which may be one of ours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Callbacks:
    """All callbacks of a rank, called in their order. One has the hooks of `Callback` that it cares for."""

    def __init__(self, ours: Iterable[Any], *, may_fail: bool, dropped: Callable[[str], None]) -> None:
        """
        Args:
            ours: parts of the trainer; what they raise is a failure of the training like any other.
            may_fail: a class of the user's that raises is left out from there on.
            dropped: told why.
        """
        self.may_fail, self.dropped = may_fail, dropped
        self._by_hook: dict[str, list[Callable[..., None]]] = {hook: [] for hook in HOOKS}
        self.waits_for_snapshots = False  # the weights must not change before `on_snapshot`
        for callback in ours:
            for hook, method in _methods(callback):
                self._by_hook[hook].append(method)
            self.waits_for_snapshots |= getattr(callback, "waits_for_snapshots", False)

    def add(self, name: str, kind: type, context: RunContext) -> None:
        """Makes one of the user's, and calls it from here on.

        Raises:
            VernierError: it raised, and may not.
        """
        made: list[Any] = []
        if not self._tried(name, "__init__", lambda: made.append(kind(context))):
            return
        guarded: list[tuple[str, Callable[..., None]]] = []

        def call(hook: str, method: Callable[..., None], *given: Any) -> None:
            if not self._tried(name, hook, lambda: method(*given)):
                for one, known in guarded:
                    self._by_hook[one].remove(known)

        for hook, method in _methods(made[0]):

            def one(*given: Any, hook: str = hook, method: Callable[..., None] = method) -> None:
                call(hook, method, *given)

            guarded.append((hook, one))
            self._by_hook[hook].append(one)

    def _tried(self, name: str, hook: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            traceback.print_exc()  # into the log
            told = f"{KEY}: {name} raised {type(error).__name__} in {hook}: {error}"
            if not self.may_fail:
                raise VernierError(f"{told}; mend it, or leave it out, or set callbacks_may_fail=true") from error
            self.dropped(f"caution: {told}; training goes on without it")
            return False
        return True

    def _call(self, hook: str, *given: Any) -> None:
        for method in tuple(self._by_hook[hook]):
            method(*given)

    def on_step_begin(self, step: int) -> None:
        self._call("on_step_begin", step)

    def on_before_optimizer_step(self, step: int) -> None:
        self._call("on_before_optimizer_step", step)

    def on_after_optimizer_step(self, step: int) -> None:
        self._call("on_after_optimizer_step", step)

    def on_step_end(self, line: Mapping[str, Any]) -> None:
        self._call("on_step_end", MappingProxyType(dict(line)))

    def on_snapshot(self, step: int, directory: Path) -> None:
        self._call("on_snapshot", step, directory)

    def on_checkpoint(self, step: int, directory: Path) -> None:
        self._call("on_checkpoint", step, directory)

    def on_end(self, step: int) -> None:
        self._call("on_end", step)


def _methods(callback: Any) -> Iterator[tuple[str, Callable[..., None]]]:
    for hook in HOOKS:
        method = getattr(callback, hook, None)
        if method is not None:
            yield hook, method
