"""`RUN/jobs/COMPONENT-JOB.failed`: why a job's script ended before its ranks. The script writes it itself, by the
shell: it may have no Python. A run whose state still waits for that job has failed (`RunDir.read_state`).

The scripts of a sweep's tasks leave it in the sweep's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.files.atomic import write_atomic


def _places(run: Path, component: str, job: object) -> Iterator[Path]:
    for folder in (run, run.parent):
        yield folder / "jobs" / f"{component}-{job}.failed"


def script_end(run: Path, component: str, job: object) -> dict[str, Any] | None:
    """(error, time, log in the run's logs) of a job's script that ended before its ranks; None where it did not."""
    for file in _places(run, component, job):
        with suppress(OSError):
            words, when = file.read_text(errors="replace"), file.stat().st_mtime
            log = next((file.parent.parent / "logs").glob(f"slurm-{component}*-{job}.out"), None)
            named = {"log": os.path.relpath(log, run / "logs")} if log else {}
            return {"error": " ".join(words.split()), "time": when, **named}
    return None


def note_script_end(run: Path, component: str, job: object, why: str | None) -> None:
    """Says, or with None takes back, why a job's script ends before its ranks; nothing where it cannot be written."""
    for file in _places(run, component, job):
        with suppress(OSError):
            if why is None:
                file.unlink(missing_ok=True)
            elif file.parent.is_dir():
                write_atomic(file, f"{why}\n")
                return
