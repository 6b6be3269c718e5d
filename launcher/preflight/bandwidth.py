"""How fast nodes exchange data: neighbours in a ring two by two, which tells whose link is slow, and all together.

An all-reduce alone is as slow as its slowest member for everybody.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from datetime import timedelta
from typing import Any

Facts = dict[str, Any]
EXCHANGE_S = 30.0  # for all of it; a link that is dead costs as much
ROUNDS = 3  # round the ring; the median of so many samples of a pair
SAMPLE_S = 0.15
CPU_BYTES = 4 << 20
GPU_BYTES = 64 << 20
REDUCTIONS = 8


def rings(count: int, *, one_after_another: bool) -> list[list[tuple[int, int]]]:
    """The pairs of neighbours of a ring, in groups of which no two pairs share a node."""
    if count < 2:
        return []
    pairs = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    if one_after_another:
        return [[pair] for pair in pairs]
    last = [pairs.pop()] if count % 2 and count > 2 else []
    groups = [pairs[0::2], pairs[1::2], last]
    return [group for group in groups if group]


def exchange_within(*asked: Any, limit_s: float = EXCHANGE_S + 2, **options: Any) -> Facts:
    """`exchange_facts` in a thread, which is left to itself where it does not come back within so many seconds.

    NCCL's own limit begins when it has connected, and what it cannot connect to it waits for without one. The process
    is to end by `configs.process.end_at_once`.
    """
    found: list[Facts] = []

    def exchange() -> None:
        try:
            found.append(exchange_facts(*asked, **options))
        except Exception as error:  # one that nobody thought of: it is told like the others
            found.append({"error": f"{type(error).__name__}: {error}"[:300]})

    thread = threading.Thread(target=exchange, daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else {"error": f"no answer within {limit_s:.0f} s"}


def exchange_facts(
    store: Any,
    members: list[int],
    names: list[str],
    rank: int,
    local_rank: int | None,
    *,
    look: int,
    one_after_another: bool,
) -> Facts:
    """Bytes a second with each neighbour (`pairs`, by name) and in an all-reduce of all (`all_reduce`).

    Args:
        store: torch's, which all members reach.
        members: ranks that take part, ascending; `rank` is one of them.
        names: of the nodes, by rank.
        look: the how manieth exchange by this store it is.
        one_after_another: nodes share a machine: one pair at a time.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", (local_rank or 0) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # A link that is dead is to be an error here, not the end of this process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    elif os.environ.get("MASTER_ADDR", "").startswith(("127.", "localhost")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    own = members.index(rank)
    facts: Facts = {"backend": "nccl" if on_gpu else "gloo", "pairs": {}}
    try:
        dist.init_process_group(
            str(facts["backend"]),
            store=dist.PrefixStore(f"exchange/{look}", store),
            rank=own,
            world_size=len(members),
            timeout=timedelta(seconds=EXCHANGE_S),
        )
        content = torch.zeros((GPU_BYTES if on_gpu else CPU_BYTES) // 4, device=device)
        dist.all_reduce(content)  # connects all
        rates: dict[str, list[float]] = {}
        for group in rings(len(members), one_after_another=one_after_another) * ROUNDS:
            for first, second in group:
                if own in (first, second):
                    other = second if own == first else first
                    rate = _pair(content, other, leads=own == first)
                    rates.setdefault(names[members[other]], []).append(rate)
            dist.all_reduce(torch.zeros(1, device=device))
        facts["pairs"] = {name: round(statistics.median(found)) for name, found in rates.items()}
        facts["all_reduce"] = round(_all_reduce(content, len(members)))
        dist.destroy_process_group()
    except (RuntimeError, ValueError, dist.DistError) as error:
        facts["error"] = str(error).strip().splitlines()[0][:300]
    return facts


def _pair(content: Any, other: int, *, leads: bool) -> float:
    """Bytes a second between two, there and back, over the time on the wall. The one who leads says when it ends."""
    import torch
    import torch.distributed as dist

    begun, count = time.monotonic(), 0
    while True:
        if leads:
            content[0] = float(count == 0 or time.monotonic() - begun < SAMPLE_S)
            goes_on = bool(content[0])
            dist.send(content, other)
            dist.recv(content, other)
        else:
            dist.recv(content, other)
            goes_on = bool(content[0])
            dist.send(content, other)
        count += 1
        if not goes_on:
            break
    if content.is_cuda:
        torch.cuda.synchronize(content.device)
    return 2 * count * content.nbytes / (time.monotonic() - begun)


def _all_reduce(content: Any, count: int) -> float:
    """The bandwidth of each link that an all-reduce of a ring amounts to.

    Bytes a second times 2 (n − 1) / n, as in "Performance" of the documentation of NVIDIA's nccl-tests.
    """
    import torch
    import torch.distributed as dist

    if content.is_cuda:
        torch.cuda.synchronize(content.device)
    begun = time.monotonic()
    for _ in range(REDUCTIONS):
        dist.all_reduce(content)
    if content.is_cuda:
        torch.cuda.synchronize(content.device)
    return REDUCTIONS * content.nbytes * 2 * (count - 1) / count / (time.monotonic() - begun)
