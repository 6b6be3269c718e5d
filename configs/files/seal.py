"""A checksum inside what is kept as JSON, so that a changed letter in it is seen before it decides anything."""

from __future__ import annotations

import hashlib
import json
from typing import Any

NOT_JSON = "not JSON"  # how what `parsed` says of other text begins
SEAL = "seal"  # its key, the last one
DAMAGED = "changed since it was written (its seal does not fit)"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its seal, to be written as JSON.

    Raises:
        TypeError: it cannot be written so.
    """
    plain = json.loads(json.dumps(content))  # as a reader will have it: keys are texts, tuples are lists
    return {**plain, SEAL: _seal_of(plain)}


def unsealed(content: Any) -> Any:
    """What was read, without its seal. What has none (an older file, or no object) is given as it is.

    Raises:
        ValueError: the seal does not fit.
    """
    if not isinstance(content, dict) or SEAL not in content:
        return content
    plain = {key: value for key, value in content.items() if key != SEAL}
    if content[SEAL] != _seal_of(plain):
        raise ValueError(DAMAGED)
    return plain


def parsed(text: str | bytes) -> Any:
    """JSON, its seal checked and taken off.

    Raises:
        ValueError: in a few words, what is wrong with it.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{NOT_JSON}: {error}") from None
    return unsealed(content)


def _seal_of(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
