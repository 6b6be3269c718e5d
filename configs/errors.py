"""Errors that are for people: each carries one line to read and the exit code that `vernier` ends with."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_VERDICT = 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: schedulers requeue on it
EXIT_INTERRUPTED = 130


class VernierError(Exception):
    """Something went wrong that the user can act on; `str()` of it is what they read. Ends with exit code 1."""

    exit_code = EXIT_FAILED


class ConfigError(VernierError):
    """Usage, configuration or input: names the key, the value and what was expected. Ends with exit code 2.

    Several problems found at once are given as several lines, each complete in itself.
    """

    exit_code = EXIT_USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DataError(ConfigError):
    """A file or directory is not what it should be: missing, cut short, changed, or of another kind."""


class GateError(VernierError):
    """A verdict asked for as a gate does not hold. Ends with exit code 3."""

    exit_code = EXIT_VERDICT
