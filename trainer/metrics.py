"""What a run tells while it trains: a line a step in `metrics.jsonl`, TensorBoard, `state.json`. Rank 0 only."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import VernierError
from configs.rundir import RunDir, read_jsonl
from configs.schema import Config
from configs.whole import write_atomic
from trainer.baseline import Baseline

HEARTBEAT_S = 2.0


def memory_gib() -> float:
    """Most memory this rank has held: on the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Metrics:
    """Writer of a run's step metrics. Going on from step N cuts what was written after it."""

    def __init__(
        self, run: RunDir, config: Config, *, step: int, parameters: int, check_current: Callable[[], None]
    ) -> None:
        """`check_current`: raises VernierError where another attempt holds the run; asked now and then."""
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.check_current = run, check_current
        lines = [line for line in read_jsonl(run.metrics) if line["step"] <= step]
        write_atomic(run.metrics, "".join(json.dumps(line) + "\n" for line in lines), durable=True)
        self.file = open(run.metrics, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        purge = step + 1 if run.train_board.is_dir() else None
        self.board: Any = SummaryWriter(log_dir=str(run.train_board), purge_step=purge)
        self._hparams(config, parameters)
        self.baseline = Baseline(config.baseline, config.steps) if config.baseline is not None else None
        if self.baseline is not None:
            self.baseline.catch_up(lines)
        self.told = 0.0
        self.ended = threading.Event()
        # From a thread, since a save or a scoring may take longer than others are ready to wait for a sign of life.
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _hparams(self, config: Config, parameters: int) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {
            "optimizer.lr": config.optimizer.lr,
            "batch.global": config.batch.global_,
            "sequence_length": config.sequence_length,
            "steps": config.steps,
            "seed": config.seed,
            "precision": str(config.precision),
            "zero.stage": config.zero.stage,
            "model": str(config.model.path or config.model.type),
            "parameters": parameters,
        }
        for summary in hparams(values, {"train/loss": 0.0}):
            self.board.file_writer.add_summary(summary)

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_S):
            self.run.beat()

    def add(self, line: dict[str, Any]) -> None:
        """Writes a step's line, and its scalars.

        Raises:
            VernierError: there is no room for it.
        """
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise VernierError(
                f"{self.run.metrics}: cannot be written ({error.strerror}), so training stops; "
                "once that is mended, the same command goes on from the last checkpoint"
            ) from None
        for key in ("loss", "auxiliary_loss", "lr", "grad_norm", "tokens_per_s", "step_s", "memory_gib"):
            if line.get(key) is not None:
                self.board.add_scalar(f"train/{key}", line[key], line["step"])
        if self.baseline is not None:
            for tag, value, step in self.baseline.add(line):
                self.board.add_scalar(f"train/{tag}", value, step)
        if time.monotonic() - self.told > HEARTBEAT_S:
            self.told = time.monotonic()
            self.check_current()
            self.run.write_state(None, step=line["step"])

    def flush(self) -> None:
        """Hands what was written to the system."""
        self.file.flush()
        self.board.flush()

    def sync(self) -> None:
        """Puts what was handed over on the disk, as it must be before a checkpoint commits."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.ended.set()
        self.file.close()
        self.board.close()


def write_manifest(run: RunDir, config: Config, facts: dict[str, Any]) -> None:
    """Says what made this run: versions, command, hardware, fingerprints."""
    import platform
    import subprocess
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    packages = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors")
    manifest = {
        "command": sys.argv,
        "commit": commit or None,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        **facts,
    }
    write_atomic(run.manifest, json.dumps(manifest, indent=1))
