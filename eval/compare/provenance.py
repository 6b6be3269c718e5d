"""What two sets of weights have to do with each other: of one run, of two, and what differs between the two runs.

A comparison says which *weights* are better. Whether another seed would say the same is another question, which one run
of each cannot answer; what is said here keeps a reader from taking the one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.errors import VernierError
from eval.compare.targets import Found
from eval.curves.pairing import changed_between

SHOWN = 4  # settings by name


@dataclass(frozen=True)
class Provenance:
    """Where two sets of weights come from. `changed`: settings of the experiment that differ, as `key: A's → B's`;
    None where they cannot be read."""

    of: Literal["one run", "two runs", "unknown"] = "unknown"
    changed: tuple[str, ...] | None = None

    @property
    def seed_alone(self) -> bool:
        """Whether the two runs are of one recipe."""
        return self.of == "two runs" and self.changed is not None and all(c.startswith("seed:") for c in self.changed)

    def caution(self) -> str | None:
        """What a verdict on these weights does not say; None where there is no other run in question."""
        if self.of != "two runs":
            return None
        if self.seed_alone:
            by = f"they differ in the seed alone ({self.changed[0]})" if self.changed else "their settings are the same"
            return f"two runs of one recipe, {by}: this is what chance in training does, nothing about a recipe"
        return (
            "one run of each: these weights are compared; whether the recipe is better cannot be told, since another "
            f"seed may move either as far{self._differ()}"
        )

    def _differ(self) -> str:
        if not self.changed:
            return ""
        more = f" and {len(self.changed) - SHOWN} more" if len(self.changed) > SHOWN else ""
        return f"; settings that differ: {', '.join(self.changed[:SHOWN])}{more}"

    def to_json(self) -> dict[str, Any]:
        return {"of": self.of, "settings_changed": None if self.changed is None else list(self.changed)}


UNKNOWN, ONE_RUN = Provenance(), Provenance("one run")


def provenance(a: Found, b: Found) -> Provenance:
    """That of two tables."""
    if a.run is None or b.run is None:
        return UNKNOWN
    if a.run.resolve() == b.run.resolve():
        return ONE_RUN
    return Provenance("two runs", _changed(a.run, b.run))


def _changed(a: Path, b: Path) -> tuple[str, ...] | None:
    try:
        return tuple(changed_between(a, b))
    except (VernierError, OSError):
        return None
