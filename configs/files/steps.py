"""How steps are named in folders and tables."""

from __future__ import annotations

import re

_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Folder or table name of a step, sorted as text like the steps themselves."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder or table name starts with, or None."""
    match = _STEP_FOLDER.match(name)
    return int(match.group(1)) if match else None
