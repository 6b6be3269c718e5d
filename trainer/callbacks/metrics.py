"""What a run tells while it trains: a line a step in `metrics.jsonl`, TensorBoard, `state.json`. Rank 0 only."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch

from configs.errors import VernierError
from configs.files.atomic import write_atomic, write_json
from configs.files.json_lines import read_jsonl, read_lines, sealed_line
from configs.files.opening import open_to_write
from configs.run.directory import RunDir
from configs.schema import Config
from configs.secret_names import shown_command
from eval.reporting import Reporter, write_hparams
from eval.tags import HIGH, LOW, OF_STEP
from trainer.callbacks.baseline import Baseline

HEARTBEAT_S = 2.0


def memory_gib() -> float:
    """Most memory this rank has held: on the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def lines_up_to(run: RunDir, step: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to a step that are as they were written."""
    return _up_to(step, read_jsonl(run.metrics, strict=False))


def _up_to(step: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]


def _keep_damaged(run: RunDir, wrong: list[str]) -> None:
    """Copies a metrics file with damaged lines away, which are about to be cut, and tells of them."""
    if not wrong:
        return
    run.quarantine.mkdir(exist_ok=True)
    places = (run.quarantine / f"{run.metrics.name}.{number}" for number in count(1))
    place = next(p for p in places if not p.exists())
    shutil.copyfile(run.metrics, place)
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    told = f"{wrong[0]}{more}: the curve has a hole; the file as it was is {run.quarantine.name}/{place.name}"
    run.add_event("damaged", told, rank=0)


class Metrics:
    """Writer of a run's step metrics. Going on from step N cuts what was written after it."""

    def __init__(
        self, run: RunDir, config: Config, *, step: int, parameters: int, check_current: Callable[[], None]
    ) -> None:
        """`check_current`: raises VernierError where another attempt holds the run; asked now and then."""
        self.run, self.check_current = run, check_current
        found, wrong = read_lines(run.metrics)
        lines = _up_to(step, found)
        _keep_damaged(run, wrong)
        write_atomic(run.metrics, "".join(map(sealed_line, lines)), durable=True)
        appended = open_to_write(run.metrics, os.O_WRONLY | os.O_APPEND)
        self.file = os.fdopen(appended, "a", buffering=1, encoding="utf-8")  # lives as long as the run
        purge = step + 1 if run.train_board.is_dir() else None

        def board(end: str, tell: Callable[[str], object]) -> Reporter:
            folder = run.train_board.with_name(f"{run.train_board.name}{end}")
            return Reporter(folder, tell, purge_step=purge)

        self.board = board("", lambda told: run.add_event("not shown", told, rank=0))
        self.bands = {end: board(end, lambda _: None) for end in (LOW, HIGH)}  # on the same disk
        if config.eval.placement == "none":  # else the evaluator writes them, beside the reference loss
            self.board.write(lambda writer: write_hparams(writer, config, parameters))
        self.baseline = Baseline(config.baseline, config.steps) if config.baseline is not None else None
        if self.baseline is not None:
            self.baseline.catch_up(lines)
        self.told = 0.0
        self.ended = threading.Event()
        # From a thread, since a save or a scoring may take longer than others are ready to wait for a sign of life.
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_S):
            self.run.beat()

    def on_step_end(self, line: Mapping[str, Any]) -> None:
        """Writes a step's line, and its scalars.

        Raises:
            VernierError: there is no room for it.
        """
        with self._needed():
            self.file.write(sealed_line(dict(line)))
        self.board.scalars({tag: line.get(key) for key, tag in OF_STEP.items()}, line["step"])
        for tag, value, step, band in self.baseline.add(line) if self.baseline is not None else ():
            (self.bands[band] if band else self.board).scalars({tag: value}, step)
        if time.monotonic() - self.told > HEARTBEAT_S:
            self.told = time.monotonic()
            self.check_current()
            self.run.write_state(None, step=line["step"])

    def flush(self) -> None:
        """Hands what was written to the system."""
        with self._needed():
            self.file.flush()
        for board in (self.board, *self.bands.values()):
            board.flush()

    def sync(self) -> None:
        """Puts what was handed over on the disk, as it must be before a checkpoint commits."""
        os.fsync(self.file.fileno())

    @contextmanager
    def _needed(self) -> Iterator[None]:
        """A run without its metrics could not be gone on with exactly: what cannot be written ends the training."""
        try:
            yield
        except OSError as error:
            raise VernierError(
                f"{self.run.metrics}: cannot be written ({error.strerror}), so training stops; "
                "once that is mended, the same command goes on from the last checkpoint"
            ) from None

    def on_end(self, step: int) -> None:
        self.ended.set()
        with self._needed():
            self.file.close()
        for board in (self.board, *self.bands.values()):
            board.close()


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
        "command": shown_command(sys.argv),
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
    write_json(run.manifest, manifest)
