"""A model whose weights are spread over the ranks: each reads its own part of every tensor from the safetensors files.

PyTorch's FSDP gathers a layer at a time for the forward pass and lets it go again. The embedding and the head, which
may share weights, stay gathered, since every batch needs them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from configs.errors import DataError
from eval.distributed.ranks import Ranks
from eval.scoring.losses import Scorer
from eval.scoring.model_shapes import repeated_layers
from eval.scoring.models import DTYPES, check_causal, read_config, weight_files, why

M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def sharded_scorer(
    directory: Path, dtype: str, sequence_length: int, ranks: Ranks, *, trust_remote_code: bool = False
) -> Scorer:
    """A scorer of the model in a checked directory, no rank of which ever holds the whole model. A collective.

    Its forward pass is one too: every rank must make equally many.

    Raises:
        DataError: its weights are named otherwise in the files than in the model, it has no list of layers, is no
            causal LM, or makes more of its logits than its output matrix does.
    """
    model = _described(directory, dtype, trust_remote_code)
    layers = repeated_layers(model)
    if not len(layers):
        raise DataError(f"{directory}: {type(model).__name__} has no list of layers to shard; use --weights replicated")
    scorer = Scorer(model, sequence_length, device=ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer.losses, mesh=mesh, reshard_after_forward=False)
    _load(scorer.losses, directory, dtype, ranks, mesh)
    _give_back_freed_memory(ranks)
    with torch.no_grad():
        check_causal(directory, model, lambda ids: scorer.losses(ids)[0], ranks.device)
        _, in_parts = scorer.losses(torch.arange(1, 9, device=ranks.device)[None])
    if not in_parts:  # scored a sample at a time, each of which is a collective: ranks would make unequally many
        raise DataError(
            f"{directory}: its logits are more than its output matrix's product, and such a model is not scored with "
            "sharded weights; use --weights replicated"
        )
    return scorer


def _give_back_freed_memory(ranks: Ranks) -> None:
    """On CPU, lets the C library return a gathered layer's memory at once; else the heap grows to the whole model."""
    if ranks.device.type == "cpu":
        with suppress(OSError, AttributeError):  # another C library: it may keep what it likes
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _described(directory: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The model with real buffers (some are computed, and in no file) and parameters that only have a shape."""
    from transformers import AutoModelForCausalLM

    config = read_config(directory, trust_remote_code=trust_remote_code)
    try:
        with _shapes_only():
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
    except Exception as error:  # each model class raises its own kinds
        raise DataError(f"{directory}: transformers cannot build it as a causal LM: {why(error)}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Parameters made inside have no storage."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _load(losses: torch.nn.Module, directory: Path, dtype: str, ranks: Ranks, mesh: Any) -> None:
    place = {}
    for path in weight_files(directory):
        with safe_open(path, "pt") as file:
            place.update(dict.fromkeys(file.keys(), path))
    prefix = "models.0."
    loaded: dict[int, torch.nn.Parameter] = {}
    state: dict[str, torch.Tensor] = {}
    # Tied weights have two names and one place: the second finds what the first loaded.
    for name, parameter in losses.named_parameters(remove_duplicate=False):
        if id(parameter) not in loaded and name.removeprefix(prefix) in place:
            found = _own_part(place[name.removeprefix(prefix)], name.removeprefix(prefix), dtype, ranks, directory)
            if found[1] != tuple(parameter.shape):
                raise DataError(f"{directory}: {name.removeprefix(prefix)} has shape {found[1]}, not its config's")
            loaded[id(parameter)] = torch.nn.Parameter(_distributed(*found, mesh), requires_grad=False)
        if id(parameter) in loaded:
            state[name] = loaded[id(parameter)]
    for name, buffer in losses.state_dict().items():
        if name not in state and not isinstance(buffer, DTensor) and name.removeprefix(prefix) in place:
            with safe_open(place[name.removeprefix(prefix)], "pt") as file:
                state[name] = file.get_tensor(name.removeprefix(prefix)).to(ranks.device)
    missing = losses.load_state_dict(state, assign=True, strict=False).missing_keys
    if missing:
        raise DataError(
            f"{directory}: its files have no tensor named {missing[0].removeprefix(prefix)}, which sharding needs; "
            "save it anew with transformers' save_pretrained, or use --weights replicated"
        )
    losses.to(ranks.device)


def _own_part(path: Path, name: str, dtype: str, ranks: Ranks, directory: Path) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(this rank's rows of a tensor, the whole's shape): rows are cut into equal runs, the last ones shorter."""
    with safe_open(path, "pt") as file:
        whole = file.get_slice(name)
        shape = tuple(whole.get_shape())
        if not shape:
            raise DataError(f"{directory}: {name} is a single number and cannot be sharded; use --weights replicated")
        rows = -(-shape[0] // ranks.world)
        start, stop = min(ranks.rank * rows, shape[0]), min((ranks.rank + 1) * rows, shape[0])
        return whole[start:stop].to(device=ranks.device, dtype=DTYPES[dtype], copy=True), shape


def _distributed(local: torch.Tensor, shape: tuple[int, ...], mesh: Any) -> DTensor:
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
