"""What `vernier plan` takes for the speed of a rank: what is given, what the run has measured, or a trial here."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, VernierError
from configs.load import load_config
from configs.memory.step_time import AGAIN, Work
from configs.run.directory import RunDir
from configs.run.last_words import tail_lines

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
    sending: tuple[int, int] | None = None  # (ranks, ZeRO stage) whose sending is in the figure; None: nobody's


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
    """From the last steps that the run has made, on as many ranks as the very last: what they sent counts as computing.

    What was computed again for want of kept activations counts too, as it does in `configs.memory.step_time.step_time`.
    """
    if not run.metrics.is_file() or not run.config.is_file():
        return None
    try:
        config = load_config(run.config)
    except VernierError:  # of another version
        return None
    lines = [line for line in tail_lines(run.metrics, count=200) if line.get("tokens_per_s") and line.get("ranks")]
    ranks = int(lines[-1]["ranks"]) if lines else 0
    rates = [float(line["tokens_per_s"]) / ranks for line in lines if line["ranks"] == ranks and line["step"] > 1]
    if len(rates) < LEAST_STEPS:
        return None
    again = AGAIN if config.gradient_checkpointing else 1.0
    flops = statistics.median(rates) * work.flops_a_token * again
    source = f"from {len(rates)} steps of {run.path.name}, with what they spent on sending"
    return Speed(flops, source, (ranks, config.zero.stage))


def _trial(config: Config, *, on_gpu: bool) -> Speed | None:
    """By multiplying here; None where that cannot be done, as on a GPU that is full or somebody else's alone."""
    try:
        return _multiplied(config, on_gpu=on_gpu)
    except RuntimeError:  # torch's, of CUDA's errors; out of memory among them
        return None


def _multiplied(config: Config, *, on_gpu: bool) -> Speed | None:
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
    """Bytes of the smallest GPU here; None where there is none, or it cannot be asked."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        properties: list[Any] = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # somebody else's alone
        return None
    return min(int(one.total_memory) for one in properties)
