"""Settings and files: the schema of every setting, its loader, the layout of a run directory, the shipped recipes.

Imports nothing else of ours, and neither torch nor transformers: reading settings must be quick.
"""

from configs.errors import ConfigError, DataError, GateError, VernierError
from configs.load import dump_config, load_config, resolve
from configs.rundir import RunDir, open_run
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
