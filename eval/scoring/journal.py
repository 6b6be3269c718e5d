"""What a rank-group has scored of a table so far, kept beside the table's place until it is whole.

A killed scoring loses seconds, and goes on at any number of ranks: a batch's losses hang on the batch and the weights
alone. Losses are kept as they are (fp64), so the finished table has the same bits as one that was made in one go.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.files.atomic import open_as_folder
from eval.tables import POSITION_BINS, LossTable

FLUSH_S = float(os.environ.get("VERNIER_JOURNAL_S", "5"))  # what a death may cost
KEYS = ("reference", "model", "objective", "dtype", "weights", "attention", "hardware", "threads", "versions")


@dataclass
class Scores:
    """Losses in the making, a row a sample: `sums` f64 [N, 1 + 16] (loss, by position), `counts` i32 [N, 2 + 16]
    (times scored, targets hit, targets by position). Rows that nobody scored yet are zero."""

    sums: torch.Tensor
    counts: torch.Tensor

    def has(self) -> torch.Tensor:
        """bool [N]: which samples have been scored."""
        return self.counts[:, 0] > 0

    def put(self, at: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Sets the rows `at` (int64) that have no losses yet."""
        new = ~self.has()[at]
        self.sums[at[new]], self.counts[at[new]] = sums[new], counts[new]


def no_scores(samples: int) -> Scores:
    """Nothing scored yet."""
    return Scores(
        torch.zeros(samples, 1 + POSITION_BINS, dtype=torch.float64),
        torch.zeros(samples, 2 + POSITION_BINS, dtype=torch.int32),
    )


def scores_of_table(table: LossTable) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(sums [N, 1 + positions], counts [N, 2 + positions]) of a table's samples; None for one that lacks what only some
    tables have."""
    if table.correct is None or table.position_loss is None or table.position_tokens is None:
        return None
    ones = torch.ones(len(table), dtype=torch.int32)
    return (
        torch.cat([torch.from_numpy(table.loss)[:, None], torch.from_numpy(table.position_loss)], 1),
        torch.cat(
            [torch.stack([ones, torch.from_numpy(table.correct)], 1), torch.from_numpy(table.position_tokens)], 1
        ),
    )


def scoring_key(meta: dict[str, Any]) -> str:
    """Equal for two scorings whose losses may be put together: by what their metadata says of how they are made."""
    said = json.dumps({key: meta.get(key) for key in KEYS}, sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()


def folder_of(table: Path) -> Path:
    """Where the journal of a table lies."""
    return table.with_name(f".{table.name}.scoring")


def clear(table: Path) -> None:
    """Removes the journal of all ranks: its losses are in the table, or of no use."""
    shutil.rmtree(folder_of(table), ignore_errors=True)


def _digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of what a file of the journal holds."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


class Journal:
    """The batches that this rank has scored, on disk every few seconds in files that appear whole."""

    def __init__(self, table: Path, meta: dict[str, Any], rank: int) -> None:
        self.folder = folder_of(table)
        self.key = scoring_key(meta)
        self.stem = f"{os.getpid()}-{time.time_ns()}-{rank}"
        self.files = 0
        self.rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.flushed = time.monotonic()

    def read(self, into: Scores) -> None:
        """Puts in what earlier attempts left; what is not of this scoring, or not readable, is passed over."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if not path.is_file():
                continue
            try:
                with safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("key") != self.key:
                        continue
                    samples, sums, counts = (file.get_tensor(name) for name in ("samples", "sums", "counts"))
                    told = (file.metadata() or {}).get("digest")
            except (SafetensorError, OSError):
                continue
            if told != _digest(samples, sums, counts):  # a bit has turned: these are scored again
                continue
            fits = samples.numel() and int(samples.max()) < len(into.sums) and int(samples.min()) >= 0
            if fits and sums.shape[1] == into.sums.shape[1] and bool((counts[:, 0] == 1).all()):
                into.put(samples, sums, counts)

    def add(self, samples: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Notes a batch; writes what was noted every FLUSH_S seconds."""
        self.rows.append((samples, sums, counts))
        if time.monotonic() - self.flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes what was noted since the last time."""
        self.flushed = time.monotonic()
        if not self.rows:
            return
        samples, sums, counts = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        path = self.folder / f"{self.stem}-{self.files:06d}.safetensors"
        part = path.with_suffix(".part")
        metadata = {"key": self.key, "digest": _digest(samples, sums, counts)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"samples": samples, "sums": sums, "counts": counts}, part, metadata=metadata)
            open_as_folder(part)
            part.rename(path)
        except (OSError, SafetensorError):  # a full disk: kept for the next time; only a death would cost more
            return
        self.files += 1
        self.rows = []
