"""What a user typed for `train`, `launch` and sweeps, as values that verbs and backends hand on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resume:
    """How to take a run directory that is there already."""

    fresh: bool = False  # move it away
    extend: bool = False  # go on beyond its steps
    force: bool = False  # go on with settings that may not change

    def flags(self) -> tuple[str, ...]:
        """What the ranks are told of it; moving away is done before they start."""
        return (*(("--extend",) if self.extend else ()), *(("--force-resume",) if self.force else ()))


@dataclass(frozen=True)
class Launch:
    """How to launch."""

    on: str = "slurm"
    site: str | None = None
    dry_run: bool = False
    template: Path | None = None
    exclude_bad: bool = False
    extend: bool = False
    force: bool = False
    only: str | None = None  # a component
    hosts: str | None = None  # of mpi and ssh
    runs: str | None = None  # of skypilot: where the run outlives the nodes

    @property
    def resume(self) -> Resume:
        return Resume(extend=self.extend, force=self.force)


@dataclass(frozen=True)
class SweepAsked:
    """A sweep, as it was asked for."""

    axes: tuple[str, ...]  # key=v1,v2
    seeds: int = 1
    dir: Path | None = None
    at_once: int = 0
