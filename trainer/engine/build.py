"""The DeepSpeed engine: its config derived from our settings, the optimizer, and the state that training needs of it.

What reaches into DeepSpeed's internals is in `trainer.engine.zero_state` alone.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from torch import nn

from configs.load import micro_batch
from configs.schema import Config
from configs.yaml.overrides import merged
from trainer.engine.decay import decay_groups


def import_deepspeed() -> Any:
    """DeepSpeed, imported quietly and kept from compiling anything.

    On CPU its first `init_distributed` builds a shared-memory op with g++; a build that is killed leaves a lock on
    which every later run hangs without a word. gloo needs no such op.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    # Every ZeRO optimizer imports Muon, which is compiled while it is imported: over a second, for what we do not use.
    compiler.compile = lambda: compiler.dummy_decorator
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def import_optimizers() -> None:
    """DeepSpeed with all that `make_engine` comes to import, for ranks that are forked."""
    import_deepspeed()
    import deepspeed.module_inject
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401


def deepspeed_config(config: Config, world: int, parameters: int) -> dict[str, Any]:
    """The whole DeepSpeed config: ours, with the user's `deepspeed:` merged in (what contradicts ours was refused)."""
    micro = micro_batch(config, world)
    # DeepSpeed allocates its buckets in full; one as large as the model is as large as helps.
    bucket = int(min(5e8, max(1e6, parameters)))
    ours: dict[str, Any] = {
        "train_batch_size": config.batch.global_,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.batch.global_ // (world * micro),
        "gradient_clipping": config.clip_grad_norm or 0.0,
        "steps_per_print": None,
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    zero = ours["zero_optimization"]
    if config.zero.stage > 0:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.zero.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket // 10}
    if config.zero.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    match config.precision:
        case "bf16":
            ours["bf16"] = {"enabled": True}
        case "fp16":
            ours["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
        case "amp":
            ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return merged(ours, config.deepspeed)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW over two groups, with weight decay and without: see `trainer.engine.decay`."""
    settings = config.optimizer
    decayed, kept = decay_groups(model, settings.no_decay)
    groups = [
        {"params": list(decayed.values()), "weight_decay": settings.weight_decay},
        {"params": list(kept.values()), "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def make_engine(config: Config, model: nn.Module, world: int) -> tuple[Any, dict[str, Any]]:
    """(DeepSpeed engine, its resolved config). `model` is a `TrainableLM` on the CPU, the same on every rank."""
    deepspeed = import_deepspeed()
    computed = {name: buffer.clone() for name, buffer in _computed_buffers(model)}
    settings = deepspeed_config(config, world, sum(p.numel() for p in model.parameters()))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(config, model),
        config=copy.deepcopy(settings),
        dist_init_required=False,
    )
    # DeepSpeed casts every buffer to 16 bits, rotary frequencies too; the model that is scored keeps them in fp32.
    for name, buffer in _computed_buffers(engine.module):
        buffer.data = computed[name].to(buffer.device)
    engine.train()
    return engine, settings


def _computed_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that no checkpoint holds, because the model computes them from its config."""
    saved = set(model.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]


def set_learning_rate(engine: Any, rate: float) -> None:
    """Sets the rate of the next update in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def grad_norm_before_step(engine: Any) -> torch.Tensor | None:
    """Norm of the averaged gradient where DeepSpeed will not tell it (plain fp32 and amp at stage 0), else None."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)
