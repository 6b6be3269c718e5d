"""How long `vernier --help` takes to answer, beside a bare Python that starts and ends."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
GOAL_S = 0.3


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Prints the medians of interleaved rounds."""
    commands = {
        "vernier --help": [sys.executable, "-m", "launcher.cli", "--help"],
        "vernier train --help": [sys.executable, "-m", "launcher.cli", "train", "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            found[name].append(seconds(command))
    for name, times in found.items():
        print(f"{name:<22} {statistics.median(times):.3f} s (from {min(times):.3f} to {max(times):.3f})")
    print(f"goal: vernier --help under {GOAL_S} s")


if __name__ == "__main__":
    main()
