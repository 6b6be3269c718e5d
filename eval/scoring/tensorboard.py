"""What the evaluator writes to TensorBoard: in step order, into a folder that only it writes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.compare.pair import compare_tables
from eval.reporting import Reporter
from eval.tables import LossTable

BINS = 60
# A histogram is drawn between its extremes: a few samples far out would leave one bar of all others.
CUT = 0.005
LAYOUT = {
    "paired": {
        title: ["Margin", [tag, f"{tag}_band/low", f"{tag}_band/high"]]
        for title, tag in (
            ("loss on the reference set, 95 %", "eval/loss"),
            ("paired change from the checkpoint before, %, 95 %", "eval/change_percent"),
        )
    }
}


class EvalBoard:
    """Scalars with their bands and histograms of the scored checkpoints of a run."""

    def __init__(self, folder: Path, tell: Callable[[str], None] = print) -> None:
        self.reporter = Reporter(folder, tell)
        self.reporter.write(lambda writer: writer.add_custom_scalars(LAYOUT))

    def add(self, step: int, table: LossTable, before: LossTable | None, look: int) -> dict[str, Any]:
        """Writes a table's loss with its error band and its paired change; gives what it wrote."""
        against = table if before is None else before
        comparison = compare_tables(against, table, look=look).to_json()
        loss, error = comparison["b"]["loss"], comparison["b"]["se"]
        scalars = {
            "eval/loss": loss,
            "eval/loss_band/low": loss - 1.96 * error,
            "eval/loss_band/high": loss + 1.96 * error,
            "eval/accuracy": None if table.correct is None else float(table.correct.sum() / table.tokens.sum()),
        }
        if before is not None:
            difference = comparison["difference"]
            low, high = difference["ci95_percent"]
            scalars |= {
                "eval/change_percent": difference["percent"],
                "eval/change_percent_band/low": low,
                "eval/change_percent_band/high": high,
                "eval/win_rate": difference["win_rate"],
            }
        paired = before is not None and comparison["paired_by"] == "sample"
        changes_N = differences_percent(before, table) if before is not None and paired else None

        def write(writer: Any) -> None:
            for name, value in scalars.items():
                if value is not None:
                    writer.add_scalar(name, value, step)
            if changes_N is not None:
                writer.add_histogram("eval/differences_percent", changes_N, step, bins=BINS)
            writer.flush()

        self.reporter.write(write)
        return comparison

    def close(self) -> None:
        self.reporter.close()


def last_shown(folder: Path) -> int:
    """The newest step that has its loss in a folder of TensorBoard's; -1 where none has.

    A record that a kill has cut ends its file.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.tensorflow_stub.errors import DataLossError

    last = -1
    for path in folder.glob("events.out.tfevents.*"):
        try:
            for event in LegacyEventFileLoader(str(path)).Load():
                if any(value.tag == "eval/loss" for value in event.summary.value):
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
