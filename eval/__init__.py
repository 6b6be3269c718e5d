"""Scoring: the reference set, per-sample losses over a rank-group, loss tables, statistics, comparisons.

Knows nothing about training: it scores any Hugging Face model directory.
"""

import os as _os
import sys as _sys

# The `configs` beside this, whatever else is called so; it sees to the other packages (configs.own).
_sys.path.insert(0, _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))
import configs as _configs  # noqa: F401

del _sys.path[0]
