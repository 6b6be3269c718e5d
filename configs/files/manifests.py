"""What a manifest must say to be believed: that of a directory which is whole or not there, and that of a run.

A manifest lists the hashes of all that lies beside it, so a letter of it that has changed would switch checks off: what
is missing or unknown in it is damage. Newer ones are sealed; of those that are not, every key is known.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from configs.files.seal import SEAL, parsed
from configs.files.steps import step_name, step_of

# By kind: the keys beside `kind` and `files`, and what must be among the files.
_KEYS: dict[str, tuple[dict[str, type], str]] = {
    "snapshot": ({"step": int, "tokens": int, "dtype": str, "weights": str}, "config.json"),
    "checkpoint": ({"step": int}, "state.json"),
    "dataset": ({"fingerprints": dict}, "dataset.json"),
    "reference": ({"name": str, "fingerprints": dict}, "reference.json"),
}
_MAY_BE: dict[str, type] = {"ema_decay": float}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def parse_manifest(text: bytes, directory: str, kind: str | None = None) -> dict[str, Any]:
    """What a manifest says.

    Args:
        directory: the name of the directory that it lies in; one of a step must hold that step.
        kind: what the directory has to be; None: anything of ours.

    Raises:
        ValueError: in a few words, what is wrong with it.
    """
    content = parsed(text)
    if not isinstance(content, dict):
        raise ValueError("changed since it was written: no object")
    problem = _problem(content, directory, kind, strict=not _is_sealed(text))
    if problem is not None:
        raise ValueError(problem)
    return content


def _is_sealed(text: bytes) -> bool:
    return f'"{SEAL}"'.encode() in text  # and the seal fits, or it had not been parsed


def _problem(content: dict[str, Any], directory: str, kind: str | None, *, strict: bool) -> str | None:
    found = content.get("kind")
    if kind is not None and found != kind:
        return f"expected a {kind}, found {found or 'something else'}"
    changed = "changed since it was written"
    files = content.get("files")
    if not isinstance(files, dict):
        return f"{changed}: it names no files"
    for name, fact in files.items():
        if not _is_fact(name, fact):
            return f"{changed}: what it says of {name} is no size and hash"
    step = content.get("step")
    if directory == step_name(step_of(directory) or 0) and step is not None and step != step_of(directory):
        return f"{changed}: it is of step {step}, its directory is called {directory}"
    if not strict:
        return None
    if found not in _KEYS:
        return f"{changed}: {found!r} is no kind of directory"
    keys, needed = _KEYS[str(found)]
    odd = sorted((set(content) ^ {"kind", "files", *keys}) - set(_MAY_BE))
    if odd:
        return f"{changed}: {odd[0]!r} is {'unknown' if odd[0] in content else 'missing'}"
    wrong = [key for key, is_a in {**keys, **_MAY_BE}.items() if key in content and type(content[key]) is not is_a]
    if wrong:
        return f"{changed}: {wrong[0]} is {content[wrong[0]]!r}"
    return None if needed in files else f"{changed}: does not name {needed}"


def _is_fact(name: str, fact: Any) -> bool:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        return False
    if not isinstance(fact, dict) or set(fact) != {"sha256", "bytes"}:
        return False
    size = fact["bytes"]
    return isinstance(fact["sha256"], str) and bool(_SHA256.fullmatch(fact["sha256"])) and type(size) is int
