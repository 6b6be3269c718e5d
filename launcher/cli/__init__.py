"""The `vernier` command line: one function a verb, which says what it takes and hands over to its module.

Nothing heavy is imported here: `vernier --help` must answer at once. Only `main` and `app` are for others.
"""

from __future__ import annotations

import os

from configs.console import open_streams
from configs.own import put_first_for_children
from configs.process import end_at_once
from launcher.cli import scoring, training, watching  # noqa: F401  # each adds its verbs to `app`
from launcher.cli.base import VERBS, app, panel
from launcher.ends import code_of

__all__ = ["app", "main"]

for verb in app.registered_commands:
    verb.name = verb.name or str(verb.callback and verb.callback.__name__)
    verb.rich_help_panel = panel(verb.name)
app.registered_commands.sort(key=lambda verb: VERBS.index(str(verb.name)))


def main() -> None:
    """Entry point of `vernier`: runs a verb, tells errors in a line, ends with the exit codes of configs.errors."""
    open_streams()
    put_first_for_children(os.environ)
    end_at_once(code_of(lambda: app(prog_name="vernier", standalone_mode=False)))
