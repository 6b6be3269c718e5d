"""What one node can find out about itself: its versions, the shared folder, its clock, how fast it multiplies."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
UNKNOWN = "unknown"  # a commit: no repository, or git is missing or slow; no reason to call a node bad
PACKAGES = ("torch", "deepspeed", "transformers", "vernier-lm")
DIGESTED = ("*config.yaml", "jobs/*")  # what the ranks of a run are given
FOLDER_BYTES = 1 << 20
LOOKS = 5  # at the clock; the median of so many is not moved by one slow answer
ROUNDS = 6  # samples of speed, apart from each other: a node that stands still now and then shows in their sum
SAMPLE_S = 0.25
PAUSE_S = 0.03  # between samples: the turn of somebody else
CPU_SIZE = 512  # of the matrices: some milliseconds a product on a core
GPU_SIZE = 8192  # 1.1 TFLOP a product: milliseconds on a GPU of a data centre
TURN_PATIENCE_S = 60.0


def versions(run: Path) -> dict[str, str]:
    """What must be equal on all nodes, by name; what is not installed is called `missing`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["commit"] = _commit()
    found["config"] = config_digest(run)
    return found


def _commit() -> str:
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():  # installed: it may lie in somebody else's repository
        return UNKNOWN
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    return said.stdout.strip() or UNKNOWN


def config_digest(run: Path) -> str:
    """First digits of a SHA-256 over the settings and job scripts of a run, as this node reads them."""
    digest = hashlib.sha256()
    for pattern in DIGESTED:
        for path in sorted(run.glob(pattern)):
            try:
                content = path.read_bytes()
            except OSError as error:
                content = str(error.strerror).encode()
            digest.update(path.name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:12]


def folder_facts(folder: Path, node: str) -> Facts:
    """Writes, syncs, renames, reads and removes a file in the shared folder. Seconds; `error` where that fails."""
    content = os.urandom(FOLDER_BYTES)
    first, last = folder / f".{node}.{os.getpid()}.try", folder / f".{node}.{os.getpid()}.tried"
    begun = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(first, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(first, last)
    except OSError as error:
        return {"error": f"cannot be written ({error.strerror})"}
    try:
        if last.read_bytes() != content:
            return {"error": "gives back something else than was written to it"}
        last.unlink()
    except OSError as error:
        return {"error": f"cannot be read after a rename ({error.strerror})"}
    return {"seconds": round(time.monotonic() - begun, 4)}


def clock_facts(folder: Path, node: str) -> Facts:
    """How far this node's clock is behind the one that stamps files in the folder, in seconds, and how sure that is.

    On a network file system that is the server's, so clocks of nodes are held against one and the same.
    """
    path = folder / f".{node}.{os.getpid()}.clock"
    looks: list[tuple[float, float]] = []
    try:
        for look in range(LOOKS):
            before = time.time()
            with open(path, "wb") as file:
                file.write(b"%d" % look)
                file.flush()
                os.fsync(file.fileno())
                stamped = os.fstat(file.fileno()).st_mtime
            after = time.time()
            looks.append((stamped - (before + after) / 2, (after - before) / 2))
        path.unlink()
    except OSError as error:
        return {"error": error.strerror}
    return {
        "behind_s": round(statistics.median(behind for behind, _ in looks), 4),
        "within_s": round(statistics.median(within for _, within in looks), 4),
    }


@contextmanager
def turn(lock: Path | None) -> Iterator[bool]:
    """Waits until nobody else has its turn; whether it was had. Without a lock file nobody waits.

    The file is opened to read: a node whose folder is read-only takes its turns like the others. The kernel ends the
    turn of a process that dies.
    """
    descriptor = None
    try:
        descriptor = None if lock is None else os.open(lock, os.O_RDONLY)
    except OSError:
        lock = None
    try:
        yield descriptor is None or _taken(descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _taken(descriptor: int) -> bool:
    deadline = time.monotonic() + TURN_PATIENCE_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return False
        else:
            return True
    return False


def speed_facts(lock: Path | None, local_rank: int | None) -> Facts:
    """FLOP/s of matrix products, over all time that the samples took on the clock of the wall.

    A mean over time and not the best of many: what stops a process now and then is what is looked for.

    Args:
        lock: nodes that share a machine take turns at this file.
        local_rank: the GPU to take where several tasks share a machine; None: all.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    devices = [torch.device("cpu")]
    if on_gpu:
        count = torch.cuda.device_count()
        devices = [torch.device("cuda", i) for i in (range(count) if local_rank is None else [local_rank % count])]
    else:
        torch.set_num_threads(cpu_threads() if lock is None else 1)  # a part of a shared machine is not all of it
    size, dtype = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    matrices = [torch.randn(size, size, device=device, dtype=dtype) for device in devices]
    _products(matrices, 2)  # libraries set themselves up in the first
    counts, seconds = [0] * len(devices), [0.0] * len(devices)
    sample_s = SAMPLE_S if len(devices) == 1 else SAMPLE_S / 2
    for _ in range(ROUNDS):
        with turn(lock):
            for i, matrix in enumerate(matrices):
                begun = time.monotonic()
                while time.monotonic() - begun < sample_s:
                    _products([matrix], 4)
                    counts[i] += 4
                seconds[i] += time.monotonic() - begun
        time.sleep(PAUSE_S)
    speeds = [2 * size**3 * count / took for count, took in zip(counts, seconds, strict=True)]
    return {
        "flops": min(speeds),  # a rank-group goes at the pace of its slowest device
        "devices": [round(speed) for speed in speeds],
        "kind": torch.cuda.get_device_name(devices[0]) if on_gpu else platform.machine(),
        "threads": None if on_gpu else torch.get_num_threads(),
        "seconds": round(sum(seconds), 3),
    }


def _products(matrices: list[Any], count: int) -> None:
    import torch

    for matrix in matrices:
        for _ in range(count):
            product = matrix @ matrix
        if product.is_cuda:
            torch.cuda.synchronize(product.device)


def cpu_threads() -> int:
    """Threads that a task here may use: what OpenMP is told, else the cores that it may run on."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
