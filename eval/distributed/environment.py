"""What the environment tells a process of its rank-group: its rank, how many there are, and where rank 0 listens.

torchrun, mpirun and srun each say it in variables of their own; managed platforms start one of them, or set torchrun's.
Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from configs.console import is_supervised
from configs.errors import VernierError
from configs.ports import RANK_PORTS
from configs.process import began

PORT = "29500"  # torchrun's own default
SCONTROL_S = 20.0
WORDS = 512  # bytes that a rank tells the others by MPI: a host's name, an address
CLOCK_S = 0.05  # to which a process's start is known


@dataclass(frozen=True)
class RankIdentity:
    """This process among its peers, and who says so."""

    by: str
    rank: int
    world: int
    local_rank: int
    local_world: int


@dataclass(frozen=True)
class Meeting:
    """Who this process is, and where its rank-group meets."""

    told: RankIdentity
    address: str = ""
    port: str = ""
    source: str = ""

    def line(self) -> str:
        """For people: `rank 0 of 4, told by srun; address 10.0.0.1:23456 from scontrol`."""
        told = self.told
        if not told.by:
            return "rank 0 of 1, started alone"
        line = f"rank {told.rank} of {told.world}, told by {told.by}"
        return f"{line}; address {self.address}:{self.port} from {self.source}" if self.address else line


@dataclass(frozen=True)
class Launcher:
    """What starts ranks, and the variables by which it tells each who it is.

    Attributes:
        rank, world, local_rank, local_world: names of variables. It is this launcher where the first two are set, and
            all of `marks`.
    """

    name: str
    rank: str
    world: str
    local_rank: str
    local_world: str
    marks: tuple[str, ...] = ()


# The order counts: mpirun and torchrun are started inside Slurm's jobs, where Slurm's variables stand as well, and the
# mpirun of MPICH and Intel (Hydra) starts one process a node by srun where it can.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", ("TORCHELASTIC_RUN_ID",)),
    Launcher("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("MPI_LOCALRANKID",)),
    Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",  # not in a batch script itself
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",  # of every node: `tasks_per_node`
    ),
)


def told_by(environment: Mapping[str, str]) -> RankIdentity:
    """Who the environment says this process is; a process started alone is rank 0 of 1, told by "".

    Raises:
        VernierError: a variable is no number; or it is one of several, and nothing here tells which.
    """
    for launcher in LAUNCHERS:
        if all(name in environment for name in (launcher.rank, launcher.world, *launcher.marks)):
            try:
                return _told(launcher, environment)
            except (ValueError, IndexError) as error:
                raise VernierError(f"the environment's variables of this rank make no sense: {error}") from None
    for name in ("PMI_RANK", "PMIX_RANK"):  # of aprun, PALS, prun: each of their ranks would take itself to be alone
        if name in environment:
            raise VernierError(
                f"{name} is set, so this may be one rank of several, but not where they meet; start them by torchrun, "
                "mpirun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )
    return RankIdentity("", 0, 1, 0, 1)


def _told(launcher: Launcher, environment: Mapping[str, str]) -> RankIdentity:
    rank, world = int(environment[launcher.rank]), int(environment[launcher.world])
    here = environment.get(launcher.local_world, "")
    if launcher.local_world == "SLURM_STEP_TASKS_PER_NODE" and here:
        here = str(tasks_per_node(here)[int(environment.get("SLURM_NODEID", "0"))])
    return RankIdentity(launcher.name, rank, world, int(environment.get(launcher.local_rank, "0")), int(here or world))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form, a number a node: `2(x3),1` is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts


def first_of(nodelist: str) -> str:
    """The first name of Slurm's short form: `gpu[003-009,12],login1` is gpu003."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def place_of(told: RankIdentity, environment: Mapping[str, str]) -> tuple[str, str, str]:
    """(address, port, where they are from) of rank 0, the same on every rank.

    Raises:
        VernierError: nothing tells it.
    """
    port = environment.get("MASTER_PORT")
    if "MASTER_ADDR" in environment:
        own = slurm_port(environment) if told.by == "srun" else PORT
        return environment["MASTER_ADDR"], port or own, "torchrun" if told.by == "torchrun" else "MASTER_ADDR"
    if told.by == "srun":
        address, source = _slurm_address(environment)
        return address, port or slurm_port(environment), source
    return _mpi_place(told)


def slurm_port(environment: Mapping[str, str]) -> str:
    """A port that other jobs and other steps on the same nodes do not take, as far as numbers go round."""
    job = int(environment.get("SLURM_JOB_ID", "0"))
    step = int(environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID") or 0)
    return str(RANK_PORTS[(13 * job + step) % len(RANK_PORTS)])


def _slurm_address(environment: Mapping[str, str]) -> tuple[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if environment.get("SLURM_STEP_NUM_NODES") == "1" or not nodes:
        return "127.0.0.1", "srun (one node)"
    first = first_of(nodes)
    if _resolves(first):  # before scontrol: its server is not to be asked by every rank of a thousand
        return first, "Slurm's node list"
    address = _node_address(first)
    if address and _resolves(address):
        return address, "scontrol"
    batch_node = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if batch_node:
        return batch_node, "SLURM_LAUNCH_NODE_IPADDR"
    raise VernierError(
        f"the name of the first node, {first}, does not resolve, and scontrol tells no address; "
        "set MASTER_ADDR to an address of that node"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _node_address(node: str) -> str | None:
    command = ["scontrol", "show", "node", node, "--oneliner"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if found else None


def outward_address() -> str:
    """The address of this machine from which it speaks to others; loopback where it has no network. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: an address that nobody has
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def load_mpi() -> Any:
    """mpi4py's MPI, which it starts.

    Raises:
        VernierError: it is not installed, or finds no MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0]
        raise VernierError(
            f"ranks were started without MASTER_ADDR and MASTER_PORT, and MPI cannot find them ({said}); "
            "set both, or install it: pip install 'vernier-lm[mpi]'"
        ) from None
    return MPI


def _mpi_place(told: RankIdentity) -> tuple[str, str, str]:
    """A free port of rank 0's machine, told to all by MPI."""
    communicator = load_mpi().COMM_WORLD
    if communicator.size != told.world:
        raise VernierError(
            f"rank {told.rank}: the launcher says {told.world} ranks, MPI {communicator.size}; "
            "is mpi4py built for the MPI whose mpirun started it?"
        )
    hosts = _told_to_all(communicator, socket.gethostname())
    port = ""
    if len(set(hosts)) == 1:
        address = "127.0.0.1"
    else:  # as others see it: on its own machine a host's name often means loopback
        own_view = "" if hosts[communicator.rank] == hosts[0] else _address_of(hosts[0])
        seen = _told_to_all(communicator, own_view)
        address = next((one for one in seen if one and not one.startswith("127.")), "") or outward_address()
    if communicator.rank == 0:
        with socket.socket() as probe:
            probe.bind((address if address.startswith("127.") else "", 0))
            port = str(probe.getsockname()[1])
    address, port = _told_to_all(communicator, f"{address} {port}")[0].split()
    return address, port, "MPI"


def _told_to_all(communicator: Any, words: str) -> list[str]:
    """What each rank says, on every rank, by buffers: mpi4py's lower-case methods unpickle what comes."""
    own = bytearray(words.encode()[:WORDS].ljust(WORDS, b"\0"))
    heard = bytearray(WORDS * communicator.size)
    communicator.Allgather(own, heard)
    pieces = (heard[at : at + WORDS] for at in range(0, len(heard), WORDS))
    return [bytes(piece).rstrip(b"\0").decode(errors="replace") for piece in pieces]


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


@cache
def this_rank() -> RankIdentity:
    """Who this process is. Asked once: what follows puts torchrun's variables into the environment."""
    return told_by(os.environ)


@cache
def meet() -> Meeting:
    """Who this process is and where rank 0 listens; sets MASTER_ADDR and MASTER_PORT to that.

    Raises:
        VernierError: nothing tells where.
    """
    told = this_rank()
    if told.world == 1 and "MASTER_ADDR" not in os.environ:
        return Meeting(told)
    meeting = Meeting(told, *place_of(told, os.environ))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting.address, meeting.port
    return meeting


def forget() -> None:
    """Has this process ask anew: it was forked, and is another rank than its parent was."""
    this_rank.cache_clear()
    meet.cache_clear()


def start_began() -> float:
    """When this rank-group was started, in seconds since the epoch: what a run's state says from before is not of it.

    0 where whoever started it has cleared that: `vernier`, or a job's script.
    """
    if is_supervised():
        return 0.0
    alone = this_rank().by not in ("torchrun", "mpirun", "srun")  # else they have one parent, the starter
    return began(os.getpid() if alone else os.getppid()) - CLOCK_S


def environment_ranks() -> tuple[int, int, int]:
    """(rank, world, local rank) of this process."""
    told = this_rank()
    return told.rank, told.world, told.local_rank


def local_world_size() -> int:
    """Ranks on this machine, where the launcher tells; else all."""
    return this_rank().local_world
