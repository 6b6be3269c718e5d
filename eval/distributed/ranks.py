"""The rank-group: who this process is among its peers, its threads, its process group.

Used by training and scoring alike. Nothing here knows what the ranks do.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from configs.errors import VernierError
from configs.run.last_words import shortened
from eval.distributed.environment import environment_ranks, local_world_size, meet, this_rank

WORDS = 512  # bytes that a rank may use to say what it found


class PeerFailure(VernierError):
    """This rank ends because another did, which has told why."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    control: Any  # process group of CPU tensors that waits as long as it takes

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def broadcast_int(self, value: int) -> int:
        """Rank 0's number, on every rank."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(box, src=0, group=self.control)
        return int(box.item())

    def free_bytes(self) -> int:
        """Memory that this rank may take: what its GPU has free, or its part of what this machine has."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return int(psutil.virtual_memory().available) // local_world_size()

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's CPU tensor [...], on every rank; shape and dtype are known to all."""
        dist.broadcast(tensor, src=0, group=self.control)
        return tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a CPU tensor [...]. Exact where no two ranks have the same place other than zero."""
        joined = tensor.to(self.device)
        dist.all_reduce(joined)
        return joined.cpu()

    def barrier(self) -> None:
        """Waits for every rank, on the CPU."""
        dist.all_reduce(torch.zeros(1), group=self.control)

    def all_true(self, good: bool) -> bool:
        """Whether `good` holds on every rank."""
        return self.sum_int(int(not good)) == 0

    def sum_int(self, value: int) -> int:
        """The sum of a number over ranks."""
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, group=self.control)
        return int(box.item())

    def first_message(self, words: str) -> tuple[int, str]:
        """(rank, what it says) of the lowest rank that says anything, on every rank; (-1, "") where none does."""
        rows = torch.zeros(self.world, WORDS, dtype=torch.int32)
        said = words.encode()[:WORDS]
        rows[self.rank, : len(said)] = torch.tensor(list(said), dtype=torch.int32)
        dist.all_reduce(rows, group=self.control)
        heard = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows.tolist()]
        return next(((rank, one) for rank, one in enumerate(heard) if one), (-1, ""))


def set_threads(threads: int) -> None:
    """Fixes the CPU threads of this rank: a sum cut over other threads has other last bits."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def set_determinism(on: bool) -> None:
    """Bit-reproducible kernels, at some cost in speed on GPUs (what Megatron-Core's deterministic mode sets)."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        torch.backends.cudnn.benchmark = False
    # Not use_deterministic_algorithms, which sets the same and imports the compiler for it: two seconds of each rank.
    torch.set_deterministic_debug_mode("error" if on else "default")


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's generators alike on every rank."""
    random.seed(seed)
    torch.manual_seed(seed)


def join(threads: int, *, timeout_s: float = 1800.0) -> Ranks:
    """Joins the process group that the environment describes: NCCL on GPUs, gloo on CPU.

    Who the others are: see `eval.distributed.environment`.

    Args:
        threads: CPU threads of this rank.
        timeout_s: longest wait in a collective of the work itself; the control group waits without bound.

    Raises:
        VernierError: the group could not be formed.
    """
    rank, world, local_rank = environment_ranks()
    set_threads(threads)
    on_gpu = torch.cuda.is_available()
    number = _gpu(rank, local_rank) if on_gpu else local_rank
    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    meet()
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", number)):
        os.environ[name] = str(value)  # DeepSpeed asks for them also where one process is all
    backend = "nccl" if on_gpu else "gloo"
    try:
        if world == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise VernierError(f"rank {rank} of {world}: could not join its rank-group: {shortened(str(error))}") from error
    # An idle evaluator waits in a broadcast for as long as training takes.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    return Ranks(rank, world, local_rank, device, control)


def _gpu(rank: int, local_rank: int) -> int:
    """Which of the GPUs that this process sees is its own."""
    seen = torch.cuda.device_count()
    if seen == 1 and this_rank().by == "srun":  # --gpus-per-task: every rank sees its own, and none but it
        return 0
    if local_rank >= seen:
        raise VernierError(f"rank {rank} wants GPU {local_rank}, this machine has {seen}; start fewer ranks")
    return local_rank


def leave() -> None:
    """Ends the process group, and MPI where it was started: mpirun takes a process that did not end it for dead."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()
