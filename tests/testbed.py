"""A real Slurm of four nodes on this machine, and questions to it. Tests take it as the fixture `cluster`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UP, DOWN = ROOT / "slurm/testbed/up.sh", ROOT / "slurm/testbed/down.sh"
NEEDED = ("slurmctld", "slurmd", "munged")


@dataclass(frozen=True)
class Cluster:
    """A running testbed: four nodes, node1 to node4, in the partitions main and urgent."""

    dir: Path

    def ask(self, *command: str, timeout: float = 20) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, dict]:
        """All jobs that Slurm remembers, by id, as `squeue --json` has them."""
        return {str(job["job_id"]): job for job in json.loads(self.ask("squeue", "-t", "all", "--json"))["jobs"]}

    def state(self, job: str) -> str:
        """PENDING, RUNNING, …"""
        return str(self.jobs()[job]["job_state"])

    def wait(self, what: Callable[[], bool], seconds: float, say: Callable[[], str] = str) -> None:
        """Waits until it holds. `say`: what to say besides where it does not."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"waited in vain; {self.ask('squeue', '-t', 'all')}{say()}"
            time.sleep(0.3)

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        """Waits until a job is in one of `states`; gives which."""
        self.wait(lambda: self.state(job) in states, seconds)
        return self.state(job)

    def daemon(self, node: str) -> int:
        """The pid of a node's slurmd."""
        return int((self.dir / "run" / f"slurmd.{node}.pid").read_text())

    def start_node(self, node: str, *before: str) -> None:
        """Starts a node's slurmd (again), behind the words of another command if any are given."""
        subprocess.run([*before, "slurmd", "-N", node, "-f", os.environ["SLURM_CONF"]], check=True, timeout=20)
        self.wait(lambda: node in self.ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split(), 60)


def running_cluster(place: Path) -> Iterator[Cluster]:
    """A testbed in a folder, while it is wanted; SLURM_CONF is set as long as it is up."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if (missing or os.getuid() != 0) and not os.environ.get("REQUIRE_CLUSTER"):
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing" if missing else "slurmd needs root")
    environment = {**os.environ, "VERNIER_TESTBED_PORT": str(_free_ports(5))}
    # Jobs of one number would ask for one port, on what is one machine here for all workers' clusters.
    environment["VERNIER_TESTBED_FIRST_JOB"] = str(1 + 1000 * _worker())
    done = subprocess.run(
        ["bash", UP, place], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    before = os.environ.get("SLURM_CONF")
    found = re.search(r"export SLURM_CONF=(\S+)", done.stdout)
    assert found, done.stdout
    os.environ["SLURM_CONF"] = found[1]
    try:
        yield Cluster(place)
    finally:
        subprocess.run(["bash", DOWN, place], check=False, timeout=120)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _worker() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody has on loopback; each worker of pytest has a range of its own."""
    start = 17000 + 500 * _worker()
    for base in range(start, start + 500, 10):
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")
