"""How the tasks of a preflight tell one another what they found: by files in the run's folder, and by a TCP store.

Each way still works where the other one is what is broken: a node whose folder is read-only tells so by the store.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from configs.files.atomic import write_atomic
from eval.distributed.environment import told_by

Facts = dict[str, Any]  # what a task found, as JSON
PHASES = ("started", "ready", "measured", "exchanged", "done")
LOOK_S = 0.05
LOOK_EACH_S = 0.001  # more, the more there is to look at


@dataclass(frozen=True)
class Who:
    """This task among those of the preflight."""

    node: str
    rank: int
    world: int
    job: str | None  # the scheduler's
    attempt: str  # names this preflight's folder; the same on every task
    own_name: bool  # no other preflight of this run has that name
    address: tuple[str, int] | None  # of the store
    hosted: bool  # somebody else (torchrun) has opened the store already
    local_rank: int | None  # where several tasks share a machine


def who_am_i(environment: dict[str, str] | None = None) -> Who:
    """This task, as srun, torchrun or mpirun tell it; a process started alone is rank 0 of 1.

    Raises:
        VernierError: what they tell makes no sense.
    """
    env = dict(os.environ) if environment is None else environment
    told = told_by(env)
    rank, world, local = told.rank, told.world, told.local_rank if told.local_world > 1 else None
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    if local is not None:
        node = f"{node}.{local}"
    address = None
    if "MASTER_ADDR" in env and env.get("MASTER_PORT", "").isdigit():
        address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    job = env.get("SLURM_JOB_ID")
    restart = env.get("SLURM_RESTART_COUNT", "0")
    if job is not None:
        attempt = f"{job}-{restart}.{env.get('SLURM_STEP_ID', 'batch')}"
    elif "PMIX_NAMESPACE" in env:
        attempt = f"mpi-{re.sub('[^A-Za-z0-9]+', '-', env['PMIX_NAMESPACE'])}"
    else:
        attempt = f"port-{address[1]}" if address and world > 1 else f"alone-{socket.gethostname()}-{os.getpid()}"
    return Who(
        node=node,
        rank=rank,
        world=world,
        job=job,
        attempt=attempt,
        own_name=not attempt.startswith("port-"),
        address=address if world > 1 else None,
        hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        local_rank=local,
    )


def node_names(who: Who, environment: dict[str, str] | None = None) -> list[str]:
    """What the tasks' nodes are called, by rank, as far as the scheduler tells; else `task N`."""
    env = dict(os.environ) if environment is None else environment
    names: list[str] = []
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if listed and who.local_rank is None:
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["scontrol", "show", "hostnames", listed]
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            names = said.stdout.split()
    if len(names) != who.world:
        names = [f"task {rank}" for rank in range(who.world)]
    names[who.rank] = who.node
    return names


@dataclass
class Board:
    """Where tasks tell what they found, and read what others did."""

    folder: Path
    who: Who
    store: Any = None  # torch's TCPStore
    problem: str | None = None  # why there is no store where one was wanted
    told: Facts = field(default_factory=dict)
    unwritten: str | None = None  # why the folder cannot be written

    def tell(self, **facts: Any) -> None:
        """Adds to what this task has told; never fails."""
        self.told |= facts
        text = json.dumps(self.told)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / f"{self.who.node}.json", text)
        except OSError as error:
            self.unwritten = error.strerror or str(error)
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(f"facts/{self.who.rank}", text)

    def read(self) -> dict[int, Facts]:
        """What all tasks have told so far, by rank."""
        found: dict[int, Facts] = {}
        for rank in range(self.who.world):
            told = self._ask(f"facts/{rank}")
            if told is not None:
                found[rank] = told
        if len(found) < self.who.world and (self.who.own_name or self.store is None):
            for path in self.folder.glob("*.json"):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    facts = json.loads(path.read_text())
                    found.setdefault(int(facts["rank"]), facts)
        return {**found, self.who.rank: self.told}

    def _ask(self, key: str) -> Any:
        """What the store has under a key; None where it has nothing, or is gone: it is not asked again then."""
        if self.store is None:
            return None
        try:
            return json.loads(self.store.get(key)) if self.store.check([key]) else None
        except RuntimeError:
            self.store = None
            return None

    def wait_for(self, phase: str, ranks: list[int], deadline: float, *, looks: int = 0) -> dict[int, Facts]:
        """What was told once all of `ranks` have come to `phase`, or at the deadline (of `time.monotonic`).

        Args:
            looks: at their speed, that they have to have taken as well.
        """
        least = PHASES.index(phase)
        while True:
            found = self.read()
            there = [rank for rank in ranks if PHASES.index(found.get(rank, {}).get("phase", PHASES[0])) >= least]
            there = [rank for rank in there if found.get(rank, {}).get("looks", 0) >= looks]
            if len(there) == len(ranks) or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_S + LOOK_EACH_S * self.who.world)

    def say(self, name: str, value: Any) -> None:
        """Tells all tasks something under a name."""
        text = json.dumps(value)
        with suppress(OSError):
            write_atomic(self.folder / f"{name}.txt", text)
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(name, text)

    def hear(self, name: str, deadline: float) -> Any:
        """What was said under a name; None where nothing was by the deadline."""
        while True:
            told = self._ask(name)
            if told is not None:
                return told
            if self.who.own_name:
                with suppress(OSError, ValueError):
                    return json.loads((self.folder / f"{name}.txt").read_text())
            if time.monotonic() > deadline:
                return None
            time.sleep(LOOK_S)

    def linger(self, ranks: list[int], seconds: float) -> None:
        """The store's host stays until the others have heard it; they say so."""
        if self.store is None:
            return
        with suppress(RuntimeError):
            self.store.add("heard", 1)
            end = time.monotonic() + seconds
            while self.who.rank == 0 and self.store.add("heard", 0) < len(ranks) and time.monotonic() < end:
                time.sleep(LOOK_S)


def connect(board: Board, seconds: float) -> None:
    """Opens the store (rank 0) or joins it; says in `board.problem` why it could not within so many seconds."""
    who = board.who
    if who.address is None:
        return
    from torch.distributed import DistError, PrefixStore, TCPStore

    host, port = who.address
    try:
        store = TCPStore(
            host,
            port,
            who.world,
            is_master=who.rank == 0 and not who.hosted,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, DistError) as error:
        said = str(error).splitlines()[0]
        board.problem = said if who.rank == 0 else f"no answer at {host}:{port} within {seconds:.0f} s"
    else:
        board.store = PrefixStore("preflight", store)
