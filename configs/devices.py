"""Which devices this machine offers, told without importing torch (which takes a second)."""

from __future__ import annotations

import os
from pathlib import Path


def gpu_count() -> int:
    """NVIDIA GPUs that a process started now would see; 0 on a CPU machine."""
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    listed = [d for d in visible.split(",") if d.strip() not in ("", "-1", "NoDevFiles")]
    return min(present, len(listed))
