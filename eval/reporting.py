"""TensorBoard for whoever trains or scores: it only reports, so what goes wrong with it is said once, and no more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.schema import Config
from eval.tags import DESCRIPTIONS, LOSS

AGAIN_S = 60.0  # a disk that was full may have room by then


class Reporter:
    """A `SummaryWriter` that may fail, and is opened anew a while later."""

    def __init__(self, folder: Path, tell: Callable[[str], object], *, purge_step: int | None = None) -> None:
        """`tell`: told once what went wrong. `purge_step`: what was written from this step on is not to be shown."""
        self.folder, self.tell, self.purge_step = folder, tell, purge_step
        self.writer: Any = None
        self.told, self.next_try = False, 0.0
        self.described: set[str] = set()  # tags that this writer has written the description of

    def write(self, what: Callable[[Any], object]) -> None:
        """Has `what` done with the writer, if there is one."""
        if self.writer is None and time.monotonic() < self.next_try:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(log_dir=str(self.folder), purge_step=self.purge_step)
                self.purge_step = None
                self.described = set()
            what(self.writer)
        except Exception as error:  # of the disk, or of TensorBoard itself, whose thread hands on what it met
            self._give_up(error)

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Writes what is not None and finite under its tags, with what the tag shows the first time."""

        def write(writer: Any) -> None:
            for tag, value in values.items():
                if value is None or not math.isfinite(value):
                    continue
                if tag in self.described:
                    writer.add_scalar(tag, value, step)
                    continue
                self.described.add(tag)
                writer.file_writer.add_summary(_described(tag, value), step)

        self.write(write)

    def _give_up(self, error: Exception) -> None:
        left, self.writer = self.writer, None
        self.next_try = time.monotonic() + AGAIN_S
        with suppress(Exception):
            left.close()
        if not self.told:
            self.told = True
            why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.tell(f"{self.folder}: cannot be written ({why}); the board lacks what comes now, all else goes on")

    def flush(self) -> None:
        """Hands what was written to the system."""
        if self.writer is not None:
            self.write(lambda writer: writer.flush())

    def close(self) -> None:
        """Writes what is left."""
        if self.writer is not None:
            self.write(lambda writer: writer.close())


def _described(tag: str, value: float) -> Any:
    """A scalar as `SummaryWriter` writes it, with what its tag shows."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata

    about = create_summary_metadata(display_name=tag, description=DESCRIPTIONS.get(tag, ""))
    about.data_class = DATA_CLASS_SCALAR  # else TensorBoard's faster reader drops the description
    return Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=about)])


def write_hparams(writer: Any, config: Config, parameters: int | None) -> None:
    """Writes a run's settings for the tab HPARAMS, where the loss of the same folder stands beside them."""
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
        **({} if parameters is None else {"parameters": parameters}),
    }
    for summary in hparams(values, {LOSS: 0.0}):
        writer.file_writer.add_summary(summary)
