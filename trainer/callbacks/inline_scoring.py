"""Scoring between training steps by the training ranks: the same batches, code and tables as the separate evaluator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import DataError
from configs.run.directory import RunDir, step_name
from configs.schema import Config
from eval.distributed.ranks import Ranks
from eval.reference.set import load_reference
from eval.scoring.classify import ClassifyScorer
from eval.scoring.evaluator import RunScores
from eval.scoring.losses import Head, Scorer
from eval.scoring.masked import MaskedScorer, special_ids
from eval.scoring.models import DTYPES, auto_model
from eval.scoring.score import cpu_threads, score_reference, table_meta
from trainer.checkpoint.snapshot import dtype_of, weights_of
from trainer.engine import zero_state
from trainer.model.adapter import as_trained
from trainer.model.build import kind_of


class InlineScoring:
    """Scores the weights that are being trained.

    Where they are held in the very numbers that a snapshot has and scoring wants, the trained module itself is scored;
    else a copy in `eval.dtype`, filled from the weights each time.
    """

    waits_for_snapshots = True  # what is scored is what the snapshot holds

    def __init__(self, engine: Any, config: Config, hf: Any, ranks: Ranks) -> None:
        self.engine, self.config, self.ranks = engine, config, ranks
        self.run = RunDir(config.run_dir)
        self.dtype = config.eval.dtype or "fp32"
        self.reference = load_reference(config.reference_dir, check=ranks.local_rank == 0)
        held = next(engine.module.parameters()).dtype
        # Under amp ZeRO-3 gathers weights in 16 bits for its matrix products: not what the snapshot holds.
        sharded = config.zero.stage == 3
        rounded = config.precision == "amp" and sharded
        kind = kind_of(config)
        parts = engine.module.parts() if kind == "causal" else None
        plain_head = parts is not None and isinstance(parts[1], torch.nn.Linear)
        self.direct = held == DTYPES[self.dtype] == DTYPES[dtype_of(config)] and not rounded
        self.direct &= plain_head or not sharded
        model = engine.module.lm if self.direct else _empty_copy(config, hf, DTYPES[self.dtype], ranks.device)
        self.scorer: Any
        if kind == "causal":
            self.scorer = Scorer(
                model,
                self.reference.sequence_length,
                parts=parts if self.direct else None,
                device=ranks.device,
                gather_head=self._whole_head if self.direct and sharded else None,
            )
        elif kind == "classify":
            self.scorer = ClassifyScorer(model, self.reference, ranks.device)
        else:
            special = special_ids(self.reference.directory / "tokenizer")
            self.scorer = MaskedScorer(model, kind, self.reference, special, ranks.device)
        self.scores = RunScores(self.run, self.reference, self.dtype, config.stop_when) if ranks.is_rank_zero else None
        if self.scores is not None:
            self.scores.tell_untold()

    def on_snapshot(self, step: int, directory: Path) -> None:
        """Scores the weights after `step` updates, which are the ones held."""
        source = ""
        if self.ranks.is_rank_zero:  # who renamed it; on other nodes it may not be seen yet
            try:
                source = weights_of(directory)
            except DataError as error:
                self.run.add_event("not scored", str(error), step=step, rank=0)
        _, source = self.ranks.first_message(source)
        if source:
            self._score(step, source)

    def catch_up(self, step: int) -> None:
        """Scores the weights held, should a start before this one have left their snapshot without a score."""
        left = self.ranks.is_rank_zero and step in self.run.whole_steps(self.run.snapshots)
        if self.ranks.broadcast_int(int(left)):
            self.on_snapshot(step, self.run.snapshots / step_name(step))

    def _score(self, step: int, source: str) -> None:
        known = self.scores is not None and step in self.scores.scored()
        if self.ranks.broadcast_int(int(known)):
            return
        started = time.perf_counter()
        if not self.direct:
            self._fill()
        threads = self.config.eval.threads_per_rank
        meta = table_meta(
            self.reference,
            self.scorer.model,
            source=source,
            dtype=self.dtype,
            objective=self.reference.objective,
            label=step_name(step),
            step=step,
            threads=threads,
        )
        sharded = self.direct and self.engine.zero_optimization_stage() == 3
        # DeepSpeed's autocast is off here: scoring is without it, wherever it runs.
        with (
            cpu_threads(threads),
            torch.autocast(self.ranks.device.type, enabled=False),
            zero_state.called_directly(self.engine),
        ):
            table = score_reference(self.scorer, self.reference, self.ranks, meta, lockstep=sharded)
        if self.scores is not None:
            self.scores.add_or_refuse(step, table, time.perf_counter() - started)

    @contextmanager
    def _whole_head(self) -> Iterator[Head]:
        """The head for any number of calls: as a module, each would gather its weights from all ranks again."""
        head = self.engine.module.parts()[1]
        with zero_state.gathered(self.engine, list(head.parameters())):
            yield head

    @torch.no_grad()
    def _fill(self) -> None:
        """Copies the trained weights over, through the kind of number that the snapshot has."""
        through = DTYPES[dtype_of(self.config)]
        held = next(self.engine.module.parameters()).dtype
        from_masters = through == torch.float32 and (held != torch.float32 or self.config.precision == "amp")
        target = {**dict(self.scorer.model.named_parameters()), **dict(self.scorer.model.named_buffers())}
        for name, parameter in self.engine.module.named_parameters():
            own = zero_state.own_name(name)
            if from_masters and parameter.requires_grad:
                target[own].copy_(zero_state.master_weight(self.engine, parameter))
                continue
            with zero_state.gathered(self.engine, [parameter]):
                target[own].copy_(parameter.to(through))
        saved = set(self.scorer.model.state_dict())
        for name, buffer in self.engine.module.lm.named_buffers():
            if name in saved:
                target[name].copy_(buffer)

    def on_end(self, step: int) -> None:
        if self.scores is not None:
            self.scores.close()


def _empty_copy(config: Config, hf: Any, dtype: torch.dtype, device: torch.device) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = as_trained(config, auto_model(kind_of(config)).from_config(hf, dtype=dtype))
    return model.eval().requires_grad_(False).to(device)
