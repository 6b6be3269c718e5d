"""The rank-group: who this process is among its peers, its threads, its process group, its log.

Used by training and scoring alike. Nothing here knows what the ranks do.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from configs.errors import VernierError
from configs.terminal import lent_terminal


class StoppedByAnotherRank(VernierError):
    """This rank ends because another did, which has told why."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # CPU tensors, waits as long as it takes

    @property
    def first(self) -> bool:
        return self.rank == 0

    def broadcast_int(self, value: int) -> int:
        """Rank 0's number, on every rank."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(box, src=0, group=self.control)
        return int(box.item())

    def barrier(self) -> None:
        """Waits for every rank, on the CPU."""
        dist.all_reduce(torch.zeros(1), group=self.control)

    def agree(self, good: bool) -> bool:
        """Whether `good` holds on every rank."""
        box = torch.tensor([int(not good)], dtype=torch.int64)
        dist.all_reduce(box, group=self.control)
        return int(box.item()) == 0


def environment_ranks() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun tells them; a process started alone is rank 0 of 1."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def set_threads(threads: int) -> None:
    """Fixes the CPU threads of this rank: a sum cut over other threads has other last bits."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def set_determinism(on: bool) -> None:
    """Bit-reproducible kernels, at some cost in speed on GPUs (what Megatron-Core's deterministic mode sets)."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on)


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's generators alike on every rank."""
    random.seed(seed)
    torch.manual_seed(seed)


def join(threads: int, *, timeout_s: float = 1800.0) -> Ranks:
    """Joins the process group that the environment describes: NCCL on GPUs, gloo on CPU.

    Args:
        threads: CPU threads of this rank.
        timeout_s: longest wait in a collective of the work itself; the control group waits without bound.

    Raises:
        VernierError: the group could not be formed.
    """
    rank, world, local_rank = environment_ranks()
    for name, number in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", local_rank)):
        os.environ.setdefault(name, str(number))  # DeepSpeed asks for them also where one process is all
    set_threads(threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise VernierError(
                f"rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}; start fewer ranks"
            )
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    try:
        if world == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise VernierError(f"rank {rank} of {world}: could not join its rank-group: {error}") from error
    # An idle evaluator waits in a broadcast for as long as training takes.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return Ranks(rank, world, local_rank, device, control)


def leave() -> None:
    """Ends the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def log_to_file(path: Path) -> TextIO:
    """Sends this process's stdout and stderr, its libraries' too, to `path`; gives the stream to talk to people on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    console = lent_terminal() or os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console
