"""What the evaluator writes to TensorBoard: in step order, into a folder that only it writes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.compare import compare_tables
from eval.tables import LossTable


class EvalBoard:
    """Scalars of the scored checkpoints of a run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(log_dir=str(folder))

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
        for name, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()
        return comparison

    def close(self) -> None:
        self.writer.close()
