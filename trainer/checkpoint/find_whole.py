"""Which checkpoint to go on from: the newest whole one. What is damaged is moved out of the way, never deleted."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from configs.errors import ConfigError, DataError
from configs.files.atomic import MANIFEST, MISSING, first_damaged, fsync_path, read_json
from configs.files.manifests import parse_manifest
from configs.files.opening import read_bytes
from configs.run.directory import RunDir, step_name, step_of
from eval.distributed.ranks import PeerFailure, Ranks
from trainer.checkpoint.checkpoint import STATE, VERSION, file_names, state_problem

NONE = -1


@dataclass(frozen=True)
class Damage:
    """What is wrong with a checkpoint."""

    step: int
    file: str
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}'s checkpoint is damaged: {step_name(self.step)}/{self.file}: {self.reason}"


def find_whole_checkpoint(run: RunDir, ranks: Ranks) -> tuple[Path | None, list[Damage]]:
    """The newest checkpoint whose files are as they were written, with what was found wrong with newer ones.

    Newer ones are moved to `quarantine/` by the first rank, which must hold the run's lock. A collective.

    Raises:
        ConfigError: checkpoints are there or in quarantine, and none is whole.
        DataError: a file cannot be read, so that nothing is known about it. Nothing was moved.
    """
    damaged: list[Damage] = []
    while True:
        step = ranks.broadcast_int(max(_steps(run), default=NONE) if ranks.is_rank_zero else NONE)
        if step == NONE:
            break
        directory = run.checkpoints / step_name(step)
        found, unread = None, ""
        try:
            if ranks.local_rank == 0:  # each node checks the hashes once
                found = damage(directory, step)
        except OSError as error:
            unread = f"{error.filename or directory}: cannot be read ({error.strerror}); training does not go round it"
        if not ranks.all_true(not unread):
            raise DataError(unread) if unread else PeerFailure(f"{directory}: not read by another rank")
        if ranks.all_true(found is None):
            return directory, damaged
        _, words = ranks.first_message("" if found is None else "\0".join(found))
        file, _, reason = words.partition("\0")
        damaged.append(Damage(step, file, reason))
        if ranks.is_rank_zero:
            _move_aside(run, damaged[-1])
        ranks.barrier()
    # The event comes after the checkpoint is there, and the newest is never thinned out: somebody has removed it.
    lost = ranks.is_rank_zero and (
        any(run.quarantine.glob("step-*")) or any(e["kind"] == "checkpoint" for e in run.read_events())
    )
    if not ranks.broadcast_int(int(lost)):
        return None, damaged
    if not ranks.is_rank_zero:
        raise PeerFailure(f"{run.path}: no whole checkpoint")
    told = f" ({'; '.join(map(str, damaged))})" if damaged else ""
    raise ConfigError(
        f"run.dir: {run.path} has no whole checkpoint left{_where(run)}{told}; "
        f"put a good copy of one into {run.checkpoints.name}/, or start anew with --fresh"
    )


def _where(run: RunDir) -> str:
    there = any(run.quarantine.glob("step-*"))
    return f", only damaged ones in {run.quarantine.name}/" if there else ", though it has written some"


def damage(directory: Path, step: int) -> tuple[str, str] | None:
    """(file, what is wrong with it) of the first damaged file of a checkpoint; None where it is whole.

    Files that the manifest does not name are never opened, here or later, so they do no harm.

    Raises:
        OSError: a file cannot be read for a reason that says nothing about its content.
    """
    name = MANIFEST
    try:
        if not (directory / MANIFEST).is_file():
            return MANIFEST, MISSING
        try:
            files = parse_manifest(read_bytes(directory / MANIFEST), step_name(step), "checkpoint")["files"]
        except ValueError as error:
            said = str(error)
            return MANIFEST, said if said.startswith("changed") else f"changed since it was written: {said}"
        if STATE not in files:
            return MANIFEST, f"changed since it was written: does not name {STATE}"
        for name, fact in files.items():
            found = first_damaged(directory, {name: fact})
            if found is not None:
                return found
    except (FileNotFoundError, NotADirectoryError):
        return name, MISSING
    except OSError as error:
        if error.errno == errno.EIO:
            return name, "the disk does not give it back (input/output error)"
        raise
    try:
        state = read_json(directory / STATE)
    except DataError as error:
        return STATE, str(error)
    problem = state_problem(state, step)
    if problem is not None:
        return STATE, problem
    if state.get("version") == VERSION:  # another is refused, with a reason of its own, when it is loaded
        unnamed = sorted(set(file_names(state)) - set(files))
        if unnamed:
            return MANIFEST, f"changed since it was written: does not name {unnamed[0]}"
    return None


def _steps(run: RunDir) -> list[int]:
    """Steps of all that lies in `checkpoints/` under the name of one, whole or not."""
    steps = {path.name: step_of(path.name) for path in run.checkpoints.glob("step-*")}
    return [step for name, step in steps.items() if step is not None and name == step_name(step)]


def _move_aside(run: RunDir, found: Damage) -> None:
    run.quarantine.mkdir(exist_ok=True)
    name = step_name(found.step)
    places = (run.quarantine / f"{name}.{number}" for number in count(1))
    place = next(p for p in places if not p.exists())
    (run.checkpoints / name).rename(place)
    fsync_path(run.quarantine)
    fsync_path(run.checkpoints)
    told = f"{found}; it is now {run.quarantine.name}/{place.name}"
    run.add_event("quarantined", told, step=found.step, rank=0, file=found.file, reason=found.reason)
