"""The `vernier` command, under a name that nobody else has: from here on Python finds our own packages."""

import os
import sys


def main() -> None:
    """Runs a verb."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import configs  # noqa: F401  (configs.own)

    del sys.path[0]
    from launcher.cli import main

    main()
