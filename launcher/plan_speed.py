"""What `vernier plan` takes for the speed of a rank: what is given, what the run has measured, or a trial here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError
from configs.rundir import RunDir
from configs.step_time import Work
from launcher.run_facts import tail_lines

if TYPE_CHECKING:
    from configs.schema import Config

ATTAINED = 0.5  # of what one large multiplication does, where nothing better is known
TRIAL_S = 0.4
LEAST_STEPS = 4
UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{letter}I": 1024**power for power, letter in enumerate("KMGT", start=1)}


@dataclass(frozen=True)
class Speed:
    """Floating-point operations/s that a rank attains while it computes, and where the figure is from."""

    flops: float
    source: str


def find_speed(config: Config, work: Work, given: float | None, *, on_gpu: bool) -> Speed | None:
    """The speed of a rank; None where it is for GPUs and there is none here to try.

    Raises:
        ConfigError: a given speed is no positive number.
    """
    if given is not None:
        if not 0 < given < float("inf"):
            raise ConfigError(f"--flops: {given}; expected operations/s of a rank, such as 2e14")
        return Speed(given, "as given")
    return _of_run(RunDir(config.run_dir), work) or _trial(config, on_gpu=on_gpu)


def _of_run(run: RunDir, work: Work) -> Speed | None:
    """From the steps that the run has made: what it sends counts as computing."""
    if not run.metrics.is_file():
        return None
    lines = tail_lines(run.metrics, count=200)
    rates = [
        float(line["tokens_per_s"]) / int(line["ranks"])
        for line in lines
        if line.get("tokens_per_s") and line.get("ranks") and line["step"] > 1
    ]
    if len(rates) < LEAST_STEPS:
        return None
    flops = statistics.median(rates) * work.flops_a_token
    return Speed(flops, f"from {len(rates)} steps of {run.path.name}, with what they spent on sending")


def _trial(config: Config, *, on_gpu: bool) -> Speed | None:
    import torch

    here = torch.cuda.is_available()
    if on_gpu and not here:
        return None
    device = "cuda" if here else "cpu"
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(str(config.precision), torch.bfloat16)
    if not here:
        torch.set_num_threads(config.threads_per_rank or 1)
    side = 8192 if here else 768
    a = torch.ones(side, side, device=device, dtype=dtype)
    times: list[float] = []
    end = time.perf_counter() + TRIAL_S
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        if here:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    flops = 2 * side**3 / statistics.median(times)
    kind = torch.cuda.get_device_name() if here else f"{torch.get_num_threads()} CPU threads"
    return Speed(ATTAINED * flops, f"{ATTAINED:.0%} of what a multiplication does here on {kind} ({flops:.2g})")


def read_size(text: str, option: str) -> int:
    """Bytes of a size as people write it: 80GiB, 24G, 512MB.

    Raises:
        ConfigError: it is none.
    """
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].upper()
    unit = unit if unit == "B" else unit.removesuffix("B")
    try:
        size = float(number) * UNITS[unit or "B"]
        if not 0 < size < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(f"{option}: {text!r}; expected a size such as 80GiB, 24G or 512MB") from None
    return int(size)


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU here; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties: list[Any] = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return min(int(one.total_memory) for one in properties)
