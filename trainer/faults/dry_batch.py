"""One micro-batch forward and backward before the optimizer is made: what does not fit is found in seconds.

On a model of its own with random weights, which is let go of: training's weights, gradients and random state are as if
it had not been. At ZeRO-3, where no rank holds all weights, and on CPU, where memory is not refused but taken by force,
the first step has to find out.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch

from configs.fault_injection import asked
from configs.load import micro_batch
from configs.memory.saving import training_state
from configs.run.directory import RunDir
from configs.schema import Config
from eval.distributed.ranks import PeerFailure, Ranks
from eval.scoring.models import auto_model, quiet_libraries
from trainer.faults.adaptations import (
    Adaptations,
    adapt,
    adapted,
    first_line,
    is_out_of_memory,
    less_memory,
    no_memory,
)
from trainer.faults.injected import forward_of
from trainer.model.adapter import as_trained
from trainer.model.build import checkpoint_activations, checkpoints_activations, kind_of
from trainer.objectives import objective_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fitted(given: Config, before: Adaptations, run: RunDir, ranks: Ranks, hf: Any) -> tuple[Config, Adaptations]:
    """The settings by which a step fits on every rank, and what was adapted for that. A collective.

    Args:
        given: as the user has them.
        before: what the run has adapted up to now.

    Raises:
        VernierError: nothing is left to adapt, or guards.on_out_of_memory is "fail".
        PeerFailure: so on the ranks that had room.
    """
    config = adapted(given, before)
    if not _can_be_tried(config, ranks):
        return config, before
    while True:
        error = _error_of(config, ranks, hf)
        if ranks.all_true(error is None):
            return config, before
        said = f"rank {ranks.rank} ran out of memory in a trial of step 1" if error is not None else ""
        _, said = ranks.first_message(said)
        next_try = less_memory(config, ranks.world, before, checkpoints=checkpoints_activations(hf, kind_of(config)))
        if next_try is None:
            if error is None:
                raise PeerFailure(said)
            raise no_memory(config, rank=ranks.rank, world=ranks.world, doing="making step 1") from error
        before, change = next_try
        if ranks.is_rank_zero:
            why = first_line(error) if error is not None else said
            adapt(run, config, ranks.world, before, f"{said}; going on with {change}", why, step=0, rank=0)
        config = adapted(given, before)


def _can_be_tried(config: Config, ranks: Ranks) -> bool:
    faults = asked()
    short = faults is not None and faults.windows is not None
    return config.zero.stage < 3 and (ranks.device.type == "cuda" or short)


def _error_of(config: Config, ranks: Ranks, hf: Any) -> Exception | None:
    """torch's error, should a micro-batch not fit beside what the optimizer will hold."""
    try:
        _try(config, ranks, hf)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # which would keep its tensors
    finally:
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return None


def _try(config: Config, ranks: Ranks, hf: Any) -> None:
    device, objective = ranks.device, objective_of(config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), quiet_libraries():
        with torch.device(device):
            lm = auto_model(kind_of(config)).from_config(copy.deepcopy(hf), dtype=DTYPES.get(str(config.precision)))
        lm = as_trained(config, lm).to(device)
        if config.gradient_checkpointing:
            checkpoint_activations(lm)
        model: Any = objective.module(lm)
        model.train()
        beside = torch.empty(_held_beside(model, config, ranks), dtype=torch.uint8, device=device)
        inputs = {name: t.to(device) for name, t in objective.dry(micro_batch(config, ranks.world)).items()}
        with torch.autocast(device.type, torch.bfloat16) if config.precision == "amp" else nullcontext():
            loss = forward_of(model, config)(inputs, -1)
        loss.backward()
        del beside


def _held_beside(model: Any, config: Config, ranks: Ranks) -> int:
    """Bytes that the optimizer will hold on the device. At stage 2 gradients go as they come, but for a rank's part."""
    state = training_state(
        sum(parameter.numel() for parameter in model.parameters()),
        precision=str(config.precision),
        stage=config.zero.stage,
        ranks=ranks.world,
        offload=config.zero.offload == "cpu",
        average=config.ema.decay is not None,
    )
    if config.zero.stage == 2:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
    if state.on_host:
        return 0
    return state.optimizer + state.average + (state.gradients if config.zero.stage == 2 else 0)
