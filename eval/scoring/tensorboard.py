"""What the evaluator writes to TensorBoard: in step order, into a folder that only it writes to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import VernierError
from configs.files.atomic import read_json
from configs.load import load_config
from configs.run.directory import RunDir
from eval.compare.pair import compare_tables
from eval.reporting import Reporter, write_hparams
from eval.tables import NATS, LossTable, unit_of
from eval.tags import ACCURACY, CHANGE, DIFFERENCES, HIGH, LOSS, LOW, PERPLEXITY, WIN_RATE

BINS = 60
# A histogram is drawn between its extremes: a few samples far out would leave one bar of all others.
CUT = 0.005


class EvalBoard:
    """Scalars, their bands in folders beside, and histograms of the scored checkpoints of a run."""

    def __init__(self, folder: Path, tell: Callable[[str], None] = print, run: RunDir | None = None) -> None:
        """`run`: whose settings stand in the tab HPARAMS."""
        self.reporter = Reporter(folder, tell)
        if run is not None:
            self.reporter.write(lambda writer: _of_run(writer, run))
        # What goes wrong with a folder beside is said of this one, since they lie on one disk.
        self.bands = [Reporter(folder.with_name(f"{folder.name}{end}"), lambda _: None) for end in (LOW, HIGH)]

    def add(self, step: int, table: LossTable, before: LossTable | None, looks: int) -> dict[str, Any]:
        """Writes a table's loss with its error band and its paired change; gives what it wrote.

        Args:
            looks: comparisons of the run that share α.
        """
        against = table if before is None else before
        comparison = compare_tables(against, table, looks=looks).to_json()
        loss, error = comparison["b"]["loss"], comparison["b"]["se"]
        scalars = {
            LOSS: loss,
            PERPLEXITY: math.exp(min(loss, 700.0)) if unit_of(table) == NATS else None,
            ACCURACY: None if table.correct is None else float(table.correct.sum() / table.tokens.sum()),
        }
        bands: list[dict[str, float | None]] = [{LOSS: loss - 1.96 * error}, {LOSS: loss + 1.96 * error}]
        if before is not None:
            difference = comparison["difference"]
            scalars |= {CHANGE: difference["percent"], WIN_RATE: difference["win_rate"]}
            for band, bound in zip(bands, difference["ci95_percent"], strict=True):
                band[CHANGE] = bound
        paired = before is not None and comparison["paired_by"] == "sample"
        changes_N = differences_percent(before, table) if before is not None and paired else None
        for reporter, band in zip(self.bands, bands, strict=True):  # first: by the loss itself a step counts as shown
            reporter.scalars(band, step)
            reporter.flush()
        self.reporter.scalars(scalars, step)

        def write(writer: Any) -> None:
            if changes_N is not None:
                writer.add_histogram(DIFFERENCES, changes_N, step, bins=BINS)
            writer.flush()

        self.reporter.write(write)
        return comparison

    def close(self) -> None:
        for reporter in (self.reporter, *self.bands):
            reporter.close()


def _of_run(writer: Any, run: RunDir) -> None:
    """Writes the settings of a run as it was last started; nothing where they cannot be read."""
    try:
        config = load_config(run.config)
        parameters = read_json(run.manifest).get("parameters") if run.manifest.is_file() else None
    except VernierError:
        return
    write_hparams(writer, config, parameters)


def last_shown(folder: Path) -> int:
    """The newest step that has its loss in a folder of TensorBoard's; -1 where none has.

    A record that a kill has cut ends its file. `eval/loss` is what earlier versions wrote.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.tensorflow_stub.errors import DataLossError

    last = -1
    for path in folder.glob("events.out.tfevents.*"):
        try:
            for event in LegacyEventFileLoader(str(path)).Load():
                if any(value.tag in (LOSS, "eval/loss") for value in event.summary.value):
                    last = max(last, int(event.step))
        except DataLossError:
            pass
    return last


def differences_percent(a: LossTable, b: LossTable) -> NDArray[np.float64]:
    """Each sample's change of loss per token in percent of A's mean loss, [N], for a histogram.

    What lies beyond the outer half percent on either side is set to its border.
    """
    mean = float(a.loss.sum()) / float(a.tokens.sum(dtype=np.int64))
    change_N = 100 * (b.loss - a.loss) / a.tokens / mean
    ordered_N, out = np.sort(change_N), int(CUT * len(change_N))
    return np.clip(change_N, ordered_N[out], ordered_N[-1 - out])
