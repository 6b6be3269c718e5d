"""Where the ranks of a job meet: an address that needs no name service, and a port of the job's own."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from dataclasses import dataclass

from configs.errors import VernierError
from configs.ports import RANK_PORTS

RETRY_S = 20.0  # between questions to a controller that did not answer
TRIES = 6
STRIDE = 4001  # shares no divisor with the number of ports, so all come up
_OWN = re.compile(r"127\..*|localhost(\..*)?|::1")  # an address that means whoever uses it


@dataclass(frozen=True)
class Meeting:
    """An address of the first node, a port there, and whether all nodes are this very machine."""

    address: str
    port: int
    here: bool


def meeting_of(nodes: str, job: int) -> Meeting:
    """Where the ranks on `nodes` (as Slurm lists them) meet.

    Raises:
        VernierError: Slurm knows no address of theirs, or one that only the first node could use.
    """
    for attempt in range(TRIES):  # a busy controller may not answer at once
        addresses = _addresses(nodes)
        first = _addresses(next(iter(_scontrol("hostnames", nodes).split()), nodes))
        if first:
            break
        if attempt + 1 < TRIES:
            time.sleep(RETRY_S)
    else:
        raise VernierError(f"{nodes}: scontrol show node tells no NodeAddr")
    address, here = first[0], _OWN.fullmatch(first[0]) is not None
    if here and len(set(addresses)) > 1:
        raise VernierError(
            f"{nodes}: Slurm has {address} for the first of several nodes, which the others cannot reach; "
            "its NodeAddr must be a name or address that they can"
        )
    return Meeting(address, free_port(job), here)


def free_port(job: int) -> int:
    """A port for the ranks to meet at: by the job's number, so that two jobs on a node do not ask for the same.

    Where that is taken, ones far from those of the jobs that were submitted next, which may be asking at this moment.

    Raises:
        VernierError: none is free.
    """
    for turn in range(len(RANK_PORTS)):
        port = RANK_PORTS[(job + turn * STRIDE) % len(RANK_PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed one hinders nobody
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise VernierError("no port is free on this node")


def _addresses(nodes: str) -> list[str]:
    return re.findall(r"NodeAddr=(\S+)", _scontrol("node", nodes))


def _scontrol(what: str, nodes: str) -> str:
    try:
        done = subprocess.run(["scontrol", "show", what, nodes], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise VernierError("scontrol is not on this node's PATH, so its ranks cannot learn where to meet") from None
    return done.stdout
