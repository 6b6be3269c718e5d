"""How a verb ends: what was raised in a line for people, and the exit code for scripts."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from configs.console import tell
from configs.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, VernierError
from configs.yaml.other_names import answer


def code_of(verb: Callable[[], Any]) -> int:
    """Runs a verb; gives its exit code, one of configs.errors where it raises, having told why in a line."""
    try:
        code = verb()
        sys.stdout.flush()
    except VernierError as error:
        problems = error.problems if isinstance(error, ConfigError) else (str(error),)
        tell("\n".join(f"error: {problem}" for problem in problems), sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except typer.Exit as stop:
        code = stop.exit_code
    except UnicodeEncodeError as error:  # of a path that a library was handed
        if not any("\udc80" <= character <= "\udcff" for character in error.object):
            raise
        tell(f"error: {error.object} has bytes that are no UTF-8, which libraries cannot open; rename it", sys.stderr)
        code = EXIT_USAGE
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        tell(f"error: what was to be printed cannot be written ({error.strerror})", sys.stderr)
        code = EXIT_FAILED
    except Exception as error:
        code = _click_code(error)
    return code if isinstance(code, int) else 0


def _click_code(error: Exception) -> int:
    """Usage errors are click's to show; anything else is a fault of ours, and its traceback is wanted."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
        option = getattr(error, "option_name", "")
        if here := answer(option):
            tell(f"{option}: settings are given as KEY=VALUE, without dashes; in Vernier: {here}", sys.stderr)
        return int(getattr(error, "exit_code", EXIT_FAILED))
    if type(error).__name__ == "Abort":
        return EXIT_INTERRUPTED
    raise error
