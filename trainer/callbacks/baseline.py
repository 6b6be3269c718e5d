"""The training losses of a run beside those of an earlier one on the same windows, while it trains. Rank 0 only.

For TensorBoard: what stands at the end is told by `vernier compare BASELINE RUN --training`.
"""

from __future__ import annotations

import json
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import ConfigError, DataError
from configs.files.opening import open_to_read
from configs.run.directory import RunDir
from configs.schema import Config
from eval.curves.pairing import pairing_of, pairing_of_run, pairing_problems
from eval.tags import BASELINE, BASELINE_MEAN, HIGH, LOW

REREAD_S = 5.0  # a baseline may still be training
TELL_STEPS = 10  # between points of the running mean
BLOCK_STEPS = 4
MOST_BLOCKS = 512  # then neighbours are joined, so that a point costs the same at any step
MOST_WAITING = 100_000  # steps that the baseline has not made yet


def check_baseline(config: Config, data: str) -> None:
    """Refuses a `baseline` whose steps cannot be paired with those of this run.

    Args:
        data: fingerprint of the training data of this run.

    Raises:
        ConfigError: why, in a line.
    """
    if config.baseline is None:
        return
    if config.baseline.resolve() == config.run_dir.resolve():
        raise ConfigError(f"baseline: {config.baseline} is this run itself; name another, or leave it out")
    try:
        theirs = pairing_of_run(config.baseline)
    except DataError as error:
        raise ConfigError(f"baseline: {error}") from None
    problems = pairing_problems(theirs, pairing_of(config, data, "this run"))
    if problems:
        raise ConfigError(
            f"baseline: the steps of {config.baseline} and of this run do not meet the same windows: "
            f"{'; '.join(problems)}; name a run that has these in common, or leave it out"
        )


class Point(NamedTuple):
    """A scalar for TensorBoard. `band`: LOW or HIGH where it is an edge of one."""

    tag: str
    value: float
    step: int
    band: str = ""


class RunningDifference:
    """Mean of a series that comes in by and by, with a band that holds at all times together.

    Kept as at most 512 block sums: when they are full, neighbours are joined and blocks are twice as long.
    """

    def __init__(self, steps: int) -> None:
        """`steps`: the length at which the band shall be narrowest."""
        self.steps, self.length = steps, BLOCK_STEPS
        self.sums: list[tuple[float, float]] = []  # of each block: (nats, targets)
        self.open, self.open_steps = (0.0, 0.0), 0

    def add(self, difference: float, targets: float) -> None:
        """`difference` in nats per target, of a batch of so many targets."""
        self.open = (self.open[0] + difference * targets, self.open[1] + targets)
        self.open_steps += 1
        if self.open_steps < self.length:
            return
        self.sums.append(self.open)
        self.open, self.open_steps = (0.0, 0.0), 0
        if len(self.sums) == MOST_BLOCKS:
            pairs = zip(self.sums[::2], self.sums[1::2], strict=True)
            self.sums, self.length = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs], 2 * self.length

    def mean(self) -> float:
        nats, targets = (sum(column) for column in zip(*self.sums, self.open, strict=True))
        return nats / targets if targets > 0 else math.nan

    def half(self) -> float | None:
        """Half the width of the 95 % band; None before 64 blocks, from which no error can be told.

        As `eval.statistics.long_run.running_half` over blocks, which are entries as good as steps; asymptotic, since ω
        is measured anew at each look.
        """
        # scipy is behind it, which a run without a baseline is spared
        from eval.statistics.long_run import LEAST, long_run_mean, running_half

        count = len(self.sums)
        if count < LEAST:
            return None
        nats_C, targets_C = np.array(self.sums).T
        narrowest = max(LEAST, self.steps / self.length)
        return float(running_half(long_run_mean(nats_C, targets_C), targets_C, [count], t_opt=narrowest)[-1])


class Baseline:
    """Pairs this run's steps with those of `run`, by their position in the data, as either comes in."""

    def __init__(self, run: Path, steps: int) -> None:
        self.path = RunDir(run).metrics
        self.running = RunningDifference(steps)
        self.paired, self.tokens, self.position = 0, 0, -1
        self.waiting: deque[tuple[int, int, float, float]] = deque(maxlen=MOST_WAITING)
        self.losses = array("d")  # by position; NaN where the batch was skipped
        self.offset, self.file, self.looked = 0, (0, 0), -math.inf

    def catch_up(self, lines: list[dict[str, Any]]) -> None:
        """Takes the lines of a run that goes on; what they show is in TensorBoard already."""
        for line in lines:
            self.add(line, tell=False)

    def add(self, line: Mapping[str, Any], *, tell: bool = True) -> list[Point]:
        """Takes a line of this run's metrics; gives what can be told now, also of steps that had to wait."""
        grown = (line["tokens"] - self.tokens) / max(1, line["position"] - self.position)  # in a line without targets
        targets = line.get("targets", grown)
        self.tokens, self.position = line["tokens"], line["position"]
        self.waiting.append((line["step"], line["position"], line["loss"], targets))
        if time.monotonic() - self.looked >= REREAD_S:
            self._read_on()
        out: list[Point] = []
        while self.waiting and self.waiting[0][1] < len(self.losses):
            step, position, loss, weight = self.waiting.popleft()
            difference = loss - self.losses[position]
            if math.isfinite(difference):  # else either made no update with this batch, or has diverged
                self.running.add(difference, weight)
                self.paired += 1
                out += self._points(step, difference) if tell else []
        return out

    def _points(self, step: int, difference: float) -> list[Point]:
        out = [Point(BASELINE, difference, step)]
        if self.paired % TELL_STEPS == 0:
            mean, half = self.running.mean(), self.running.half()
            out.append(Point(BASELINE_MEAN, mean, step))
            if half is not None:
                out.append(Point(BASELINE_MEAN, mean - half, step, LOW))
                out.append(Point(BASELINE_MEAN, mean + half, step, HIGH))
        return out

    def _read_on(self) -> None:
        """Reads the lines that the baseline has written since the last look."""
        self.looked = time.monotonic()
        try:
            with open_to_read(self.path) as file:
                about = os.fstat(file.fileno())
                if (about.st_dev, about.st_ino) != self.file or about.st_size < self.offset:
                    self.offset, self.file = 0, (about.st_dev, about.st_ino)  # it went on from a checkpoint
                    del self.losses[:]  # what it has not made again does not count
                file.seek(self.offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return  # moved away or not there yet: nothing to show, and no reason to end a training
        self.offset += len(whole + newline)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                position, loss = int(line["position"]), float(line["loss"])
            except (ValueError, KeyError, TypeError):
                continue
            if position >= len(self.losses):
                self.losses.extend([math.nan] * (position + 1 - len(self.losses)))
            self.losses[position] = loss
