"""Settings and files: the schema of every setting, its loader, the layout of a run directory, the shipped recipes.

Imports nothing else of ours, and neither torch nor transformers: reading settings must be quick. What is named here is
loaded when it is first used, so that `vernier --help` does not wait for pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from configs.own import put_first

if TYPE_CHECKING:
    from configs.errors import ConfigError, DataError, GateError, VernierError
    from configs.load import dump_config, load_config, resolve
    from configs.run.directory import RunDir, open_run
    from configs.schema import Config

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "GateError",
    "RunDir",
    "VernierError",
    "dump_config",
    "load_config",
    "open_run",
    "resolve",
]

_HOMES = {
    "configs.errors": ("ConfigError", "DataError", "GateError", "VernierError"),
    "configs.load": ("dump_config", "load_config", "resolve"),
    "configs.run.directory": ("RunDir", "open_run"),
    "configs.schema": ("Config",),
}
put_first()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'configs' has no attribute {name!r}")
