"""What a job's processes find round them: the site's file of variables, and a folder on each node's own disk."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from configs.errors import VernierError
from launcher.jobs.run.steps import SCRATCH_READY
from launcher.jobs.spec import JobSpec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def enter(spec: JobSpec, job: str) -> str:
    """Puts the variables of a job into this process's, and makes its folder on this node; gives where that lies.

    Raises:
        VernierError: the file of variables cannot be read, or the folder cannot be made.
    """
    if spec.environment_file is not None:
        os.environ.update(variables_of(Path(spec.environment_file), without=spec.variables))
    scratch = os.path.expandvars(spec.scratch)
    if "$" in scratch:
        raise VernierError(f"scratch: {spec.scratch}: a variable in it is not set on this node (site profile)")
    own = f"{scratch}/vernier-{job}"
    os.environ["TMPDIR"] = own
    if subprocess.run(["bash", "-c", SCRATCH_READY], check=False).returncode:
        raise VernierError(f"{own} cannot be made, or belongs to another user (scratch in the site profile)")
    os.environ["TORCH_EXTENSIONS_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{own}/torch_extensions", f"{own}/triton"
    os.environ["HF_HOME"] = os.environ.get("HF_HOME") or f"{own}/huggingface"
    return scratch


def variables_of(path: Path, without: Collection[str] = ()) -> dict[str, str]:
    """The variables in a file of NAME=value lines, to the letter; a pair of quotes round a value is taken off.

    Args:
        without: names that are not taken from it.

    Raises:
        VernierError: it cannot be read, or a line is something else. No value is ever shown.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        raise VernierError(f"{path}: cannot be read on this node") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.removeprefix("export ").partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise VernierError(f"{path}: line {number}: expected NAME=value")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        if name not in without:
            found[name] = value
    return found
