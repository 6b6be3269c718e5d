"""DeepSpeed's ZeRO state as named flat fragments: the one place that reads and writes its internals.

Every stage is shown the same way: a fragment is a range of one parameter's flat fp32 values that this rank owns, with
the master weight and both Adam moments. So a checkpoint written at any stage and world size is read at any other.
Tested against DeepSpeed 0.19.8, which is pinned exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import ConfigError, VernierError

KINDS = ("master", "exp_avg", "exp_avg_sq")
_PREFIX = "lm."  # of `TrainableLM`; checkpoints and snapshots carry the model's own names


@dataclass(frozen=True)
class Fragment:
    """A range of a parameter that this rank owns. `key` is what DeepSpeed knows it by."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    parameter: Any


def own_name(name: str) -> str:
    """A parameter's name in the Hugging Face model."""
    return name.removeprefix(_PREFIX)


def trainable(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, parameter) of all trained parameters, tied ones once."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield own_name(name), parameter


def fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank owns. At stage 0, where all hold everything, parameters are dealt out in turn."""
    stage, rank, world = engine.zero_optimization_stage(), dist.get_rank(), dist.get_world_size()
    for index, (name, parameter) in enumerate(trainable(engine)):
        if stage == 3:
            part = parameter.ds_tensor.ds_numel  # padded to be equal on all ranks
            start = part * dist.get_rank(parameter.ds_process_group)
            length = min(part, parameter.ds_numel - start)
            if length > 0:
                yield Fragment(name, tuple(parameter.ds_shape), start, length, parameter)
        elif stage:
            mapping = parameter._hp_mapping
            if mapping is not None:
                at = mapping.lp_fragment_address
                yield Fragment(name, tuple(parameter.shape), at.start, at.numel, parameter)
        elif index % world == rank:
            yield Fragment(name, tuple(parameter.shape), 0, parameter.numel(), parameter)


def values(engine: Any, fragment: Fragment) -> dict[str, torch.Tensor]:
    """The fragment's fp32 values by kind, [length] each, which stand until the next update; not to be written to."""
    parameter = fragment.parameter
    if engine.zero_optimization_stage() == 3:
        found = {kind: _stage3_part(engine, parameter, kind) for kind in KINDS}
    else:
        found = _views(engine, parameter)
    return {kind: tensor.detach().flatten()[: fragment.length] for kind, tensor in found.items()}


def _stage3_part(engine: Any, parameter: Any, kind: str) -> torch.Tensor:
    """Stage 3: this rank's part, padded, where it lies; a copy where DeepSpeed keeps it on a disk."""
    key = None if kind == "master" else kind
    part, group = engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )
    if not engine.optimizer._swappable_optimizer_subgroup(group):
        return part
    copied: torch.Tensor = part.clone()
    engine.optimizer._release_swap_buffers(group)
    return copied


def master_view(engine: Any, fragment: Fragment) -> torch.Tensor:
    """The fragment's fp32 master weights, [length]: later updates are seen through it. Also before the first.

    Raises:
        ConfigError: DeepSpeed was told to keep them on a disk.
    """
    parameter, stage = fragment.parameter, engine.zero_optimization_stage()
    if stage == 0:
        found = _stage0_master(engine, parameter)
    elif stage == 3:
        found, group = engine.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
        if engine.optimizer._swappable_optimizer_subgroup(group):
            raise ConfigError(
                "ema.decay: does not go with deepspeed.zero_optimization.offload_optimizer on nvme; "
                "use zero.offload=cpu, or ema.decay=null"
            )
    else:
        found = parameter._hp_mapping.hp_fragment
    flat: torch.Tensor = found.detach().view(-1)[: fragment.length]
    return flat


def _views(engine: Any, parameter: Any) -> dict[str, torch.Tensor]:
    """Stages 0 to 2: the storage itself, so that what is written there is the state."""
    if engine.zero_optimization_stage() == 0:
        master = _stage0_master(engine, parameter)
        state = _adam(engine).state[master]
        return {"master": master.data.view(-1), **{k: state[k].view(-1) for k in KINDS[1:]}}
    mapping = parameter._hp_mapping
    # Not `mapping.optim_fragment`: with several parameter groups DeepSpeed links the moments of the first only.
    state = _adam(engine).state[_flat_partitions(engine)[mapping.param_group_index]]
    at = mapping.hp_fragment_address
    moments = {k: state[k].view(-1).narrow(0, at.start, at.numel) for k in KINDS[1:]}
    return {"master": mapping.hp_fragment.view(-1), **moments}


def _adam(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrapper (stage 0 in fp32 has no wrapper)."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_partitions(engine: Any) -> list[Any]:
    """Stages 1 to 3: the flat fp32 tensors that the torch optimizer steps."""
    for attribute in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    raise VernierError(f"DeepSpeed optimizer {type(engine.optimizer).__name__} is not one that Vernier can save")


def _stage0_master(engine: Any, parameter: Any) -> Any:
    """Stage 0: the fp32 copy that a 16-bit wrapper keeps, else the parameter itself."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return parameter
    for halves, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                return master
    raise VernierError("a parameter is missing from DeepSpeed's 16-bit optimizer")


def _stepped(engine: Any) -> list[Any]:
    """Tensors that key the torch optimizer's state on this rank."""
    if engine.zero_optimization_stage():
        return _flat_partitions(engine)
    return [_stage0_master(engine, parameter) for _, parameter in trainable(engine)]


def adam_step(engine: Any) -> float:
    """How many updates Adam has made, which its bias correction needs.

    Raises:
        VernierError: it differs between parameters.
    """
    counts = {float(_adam(engine).state[t]["step"]) for t in _stepped(engine) if t.numel()}
    if len(counts) != 1:
        raise VernierError(f"Adam's step counts differ between parameters: {sorted(counts)}")
    return counts.pop()


Lookup = Callable[[str, str, int, int], torch.Tensor]


def restore(engine: Any, lookup: Lookup, step: float) -> None:
    """Puts master weights and moments back, then makes the weights from the masters.

    Args:
        lookup: (kind, parameter name, flat start, length) → fp32 tensor of that length.
        step: Adam's update count.
    """
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    for tensor in _stepped(engine):  # Adam makes its state at the first step; it must be there to be filled
        _adam(engine).state[tensor] = {
            "step": torch.tensor(step, dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor.data),
            "exp_avg_sq": torch.zeros_like(tensor.data),
        }
    if stage == 0:
        for name, parameter in trainable(engine):  # every rank holds everything
            for kind, view in _views(engine, parameter).items():
                view.copy_(lookup(kind, name, 0, parameter.numel()))
    elif stage == 3:
        _restore_stage3(engine, lookup)
    else:
        optimizer._lazy_init_hp_params_optimizer_state()
        for fragment in fragments(engine):
            for kind, view in _views(engine, fragment.parameter).items():
                view.data.copy_(lookup(kind, fragment.name, fragment.start, fragment.length))
    _weights_from_masters(engine)


def _restore_stage3(engine: Any, lookup: Lookup) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    for fragment in fragments(engine):
        for kind in KINDS:
            padded = torch.zeros(fragment.parameter.ds_tensor.ds_numel)
            padded[: fragment.length] = lookup(kind, fragment.name, fragment.start, fragment.length)
            padded = padded.to(fragment.parameter.ds_tensor.device)
            if kind == "master":
                safe_set_local_fp32_param(fragment.parameter, padded)
            else:
                safe_set_local_optimizer_state(fragment.parameter, padded, kind)


@torch.no_grad()
def _weights_from_masters(engine: Any) -> None:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # lets go of gathered parameters
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()  # gathers again those that stay
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for halves, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master.data)


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's own counts."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS}


def restore_counters(engine: Any, found: dict[str, int], accumulation: int) -> None:
    """Sets DeepSpeed's counts; `micro_steps` must stand at a boundary of the accumulation in use now."""
    for name in _COUNTERS:
        if name in found:
            setattr(engine, name, int(found[name]))
    engine.micro_steps = engine.global_steps * accumulation


def loss_scale_state(engine: Any) -> dict[str, float]:
    """fp16: the numbers of the dynamic loss scaler; else empty."""
    if not engine.fp16_enabled():
        return {}
    holder = _loss_scaler(engine)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {n: float(getattr(holder, n)) for n in names if hasattr(holder, n)}


def restore_loss_scale(engine: Any, found: dict[str, float]) -> None:
    """fp16: puts the dynamic loss scaler back."""
    holder = _loss_scaler(engine)
    for name, value in found.items():
        if hasattr(holder, name):  # stage 0 has no hysteresis
            setattr(holder, name, value if name == "cur_scale" else int(value))


def _loss_scaler(engine: Any) -> Any:
    """Whatever holds the loss scale: at stages 1 to 3 a scaler, at stage 0 the wrapper's record."""
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def refuse_update(engine: Any) -> None:
    """Makes the next `engine.step()` at a boundary drop its gradient, as DeepSpeed does with one that is not finite.

    Weights, moments and Adam's count stay, DeepSpeed counts a skipped step, `was_step_applied()` is False. The loss
    scale of fp16 stays too, unless the gradient is found to be not finite. For every rank alike.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "loss_scaler"):  # stages 1 to 3 ask `overflow` right after they have set the scale by it
        scale = optimizer._update_scale
        _once(optimizer, "_update_scale", lambda overflow: scale(True) if overflow else _overflow(optimizer))
    elif hasattr(optimizer, "overflow_checker"):  # 16 bits at stage 0
        check = optimizer.overflow_checker.check

        def found() -> bool:
            if not check():
                _once(optimizer, "_update_scale", lambda overflow: None)
            return True

        _once(optimizer.overflow_checker, "check", found)
    elif hasattr(optimizer, "clear_hp_grads"):  # bf16 at stage 1 with gradients accumulated in fp32

        def drop_16_bit() -> None:
            _overflow(optimizer)
            optimizer._global_grad_norm = float("inf")  # the engine clears the gradients

        _once(optimizer, "step", drop_16_bit)
    else:  # a torch optimizer, which does not know of overflow; the engine looks for the attribute all the same

        def make() -> Any:
            del optimizer.overflow
            return optimizer.step()

        def drop() -> None:
            _overflow(optimizer)
            _once(optimizer, "step", make)

        _once(optimizer, "step", drop)


def _overflow(optimizer: Any) -> None:
    optimizer.overflow = True


def _once(holder: Any, name: str, function: Callable[..., Any]) -> None:
    """Puts `function` in the place of a method, for one call."""

    def called(*args: Any) -> Any:
        delattr(holder, name)  # the class's own is seen again
        return function(*args)

    setattr(holder, name, called)


def gathered(engine: Any, parameters: list[Any]) -> Any:
    """A context in which these parameters are whole on every rank (a collective at stage 3)."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3)


@contextmanager
def called_directly(engine: Any) -> Iterator[None]:
    """Inside it `engine.module` may be called without its engine, at ZeRO-3 too.

    A module's own weights are gathered by its hooks. Those of another module which it reaches into (Mamba's mixer
    takes `self.conv1d.weight`) are gathered where they are looked up, and only while the engine says that it is in a
    forward pass, as `DeepSpeedEngine._forward_prologue` does.
    """
    holders: list[Any] = [m._parameters for m in engine.module.modules() if hasattr(m._parameters, "_in_forward")]
    for holder in holders:
        holder._in_forward = True
    try:
        yield
    finally:
        for holder in holders:
            holder._in_forward = False


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 holds only a part here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def master_weight(engine: Any, parameter: Any) -> torch.Tensor:
    """The whole fp32 master of a parameter, on every rank (a collective at stages 1 to 3)."""
    if engine.zero_optimization_stage() == 0:
        return _stage0_master(engine, parameter).detach()
    from deepspeed.utils import safe_get_full_fp32_param

    found: torch.Tensor = safe_get_full_fp32_param(parameter)
    return found.view(full_shape(parameter))
