"""Model FLOPs utilisation (MFU): how much of what the devices could do at best goes into the model's own arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from configs.memory.step_time import Work
from configs.schema import Config

# Dense 16-bit tensor operations/s, from NVIDIA's data sheets; the first whose words a device's name has counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class Utilisation:
    """What a step's speed is held against."""

    work: Work
    ranks: int
    peak_flops: float  # operations/s of one rank's device

    def of(self, tokens_per_s: float) -> float:
        """MFU at so many tokens/s over all ranks, from 0 to 1.

        Chowdhery et al., "PaLM" (2022), appendix B: tokens/s × (6N + 12·L·H·Q·T) ÷ (ranks × peak). What is computed
        again for want of kept activations does not count.
        """
        return tokens_per_s * self.work.flops_a_token / (self.ranks * self.peak_flops)


def peak_flops(config: Config) -> float | None:
    """Operations/s of this rank's device at best: as `peak_flops` says, else by its name; None where not known."""
    if config.peak_flops is not None or config.precision == "fp32" or not torch.cuda.is_available():
        return config.peak_flops
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
