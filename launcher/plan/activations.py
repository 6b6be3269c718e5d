"""What a micro-batch holds while it goes forward and back, found by running the model itself without memory for it.

The model is made of fake tensors, which have shapes and no content, and its forward and backward pass run as they do
in training. Every storage that an operation makes is counted for as long as it lives. What kernels take for themselves
inside is not seen.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from configs.memory.training import LARGE_BLOCK, NOTHING, Activations, Tensors

ATTENTION_DROPOUT = {"attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"}  # in configs


class ModelSize:
    """A model's tensors, and its activations at any micro-batch, each reckoned once."""

    def __init__(
        self,
        model: Any,
        *,
        kind: str = "causal",
        targets: float = 1.0,
        sequence_length: int,
        precision: str,
        checkpointing: bool,
        whole_logits: bool,
        on_gpu: bool = False,
    ) -> None:
        """
        Args:
            model: as transformers builds it, on the meta device.
            kind: of model, in `eval.scoring.models.KINDS`.
            targets: the part of a window's tokens that logits are made for.
            whole_logits: logits are more than head(hidden), so those of a micro-batch are held at once.
            on_gpu: attention that drops weights does not store them there; on CPU it does.
        """
        hf = model.config
        if on_gpu:
            hf = copy.deepcopy(hf)
            for name in ATTENTION_DROPOUT & set(vars(hf)):
                setattr(hf, name, 0.0)
        self.hf, self.sequence_length, self.precision = hf, sequence_length, precision
        self.kind, self.targets = kind, targets
        self.checkpointing, self.whole_logits = checkpointing, whole_logits
        self.tensors = _tensors(model)
        self.found: dict[int, Activations | None] = {}
        self.models: dict[Any, tuple[Any, Any]] = {}  # (fake mode, model), by dtype

    def activations(self, micro: int) -> Activations:
        """Of `micro` windows; `NOTHING` where the model cannot be run so (see `known`)."""
        if micro not in self.found:
            self.found[micro] = _run(self, micro)
        return self.found[micro] or NOTHING

    def between(self, micro: int) -> Activations:
        """Of `micro` windows, by a straight line between two that were found; as `activations` beyond them."""
        below = max((at for at, one in self.found.items() if one is not None and at <= micro), default=0)
        above = min((at for at, one in self.found.items() if one is not None and at >= micro), default=0)
        if not below or not above or below == above:
            return self.activations(micro)
        a, b, part = self.activations(below), self.activations(above), (micro - below) / (above - below)
        names = a.__dataclass_fields__
        return Activations(**{n: round(getattr(a, n) + part * (getattr(b, n) - getattr(a, n))) for n in names})

    def known(self, micro: int) -> bool:
        """Whether activations of `micro` windows could be found."""
        self.activations(micro)
        return self.found[micro] is not None


def _tensors(model: Any) -> Tensors:
    own = (sum(one.numel() for one in module.parameters(recurse=False)) for module in model.modules())
    return Tensors.of([one.numel() for one in model.parameters() if one.requires_grad], largest_module=max(own))


def _run(size: ModelSize, micro: int) -> Activations | None:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(size.precision, torch.float32)
    for kind in dict.fromkeys([dtype, torch.bfloat16]):
        try:
            found = _pass(size, micro, kind)
        except Exception:  # what a model's own code asks of fake tensors cannot be listed
            logging.getLogger(__name__).debug("no activations in %s", kind, exc_info=True)
            continue
        if kind is dtype:
            return found
        ratio = dtype.itemsize // kind.itemsize  # some kernels of experts have shapes for bf16 only
        return Activations(**{name: ratio * getattr(found, name) for name in found.__dataclass_fields__})
    return None


def _fake_model(size: ModelSize, dtype: Any) -> tuple[Any, Any]:
    """(fake mode, the model on fake CPU tensors): SDPA does not store its weights there, as on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from eval.scoring.models import auto_model
    from trainer.model.dropout import drops, recompute_contexts

    if dtype not in size.models:
        mode = FakeTensorMode()
        with mode:
            model = auto_model(size.kind).from_config(size.hf, dtype=dtype)
            model.train()
            if size.checkpointing:
                again = {"context_fn": recompute_contexts} if drops(model) else {}
                model.gradient_checkpointing_enable({"use_reentrant": False, **again})
        size.models[dtype] = mode, model
    return size.models[dtype]


def _pass(size: ModelSize, micro: int, dtype: Any) -> Activations:
    """One forward and backward pass."""
    import torch

    from trainer.model.dropout import WindowDropout

    with warnings.catch_warnings(), _one_sequence_a_window():
        warnings.simplefilter("ignore")
        mode, model = _fake_model(size, dtype)
        live = _live_storages([*model.parameters(), *model.buffers()])
        layers = model.get_decoder() if size.kind == "causal" else model.base_model
        handles = [parameter.register_post_accumulate_grad_hook(live.take_gradient) for parameter in model.parameters()]
        handles.append(layers.register_forward_hook(partial(_after_layers, live)))
        with mode:
            ids_BT = torch.zeros(micro, size.sequence_length, dtype=torch.long)
            with live:
                with (
                    torch.autocast("cpu", torch.bfloat16, enabled=size.precision == "amp"),
                    WindowDropout(model).windows(range(micro)),
                ):
                    loss = _loss(size, model, ids_BT)
                loss.backward()
        for handle in handles:
            handle.remove()
    return Activations(
        layers=live.layers,
        logits=max(0, live.at_head - live.layers),
        working=max(0, live.most - max(live.at_head, live.layers)),
        with_gradients=live.most_with_gradients,
        loose=live.most_loose,
        loose_with_gradients=live.most_loose_with_gradients,
    )


def _loss(size: ModelSize, model: Any, ids_BT: Any) -> Any:
    """The loss of some windows [B, T], made as in training."""
    import torch

    from eval.scoring.losses import training_loss
    from eval.scoring.masked import logits_at

    entropy = torch.nn.functional.cross_entropy
    if size.kind == "masked":
        rows, tokens = ids_BT.shape
        place = torch.arange(max(1, round(size.targets * tokens))).repeat(rows)
        row = torch.arange(rows).repeat_interleave(len(place) // rows)
        logits_NV = logits_at(model, model.base_model, ids_BT, None, row, place)
        return entropy(logits_NV.float(), ids_BT[row, place], reduction="sum")
    if size.kind == "classify":
        return model(input_ids=ids_BT).logits.float().sum()
    if size.whole_logits:
        logits = model(input_ids=ids_BT, use_cache=False).logits.float()
        return entropy(logits.flatten(0, 1), ids_BT.flatten(), reduction="sum")
    parts = model.get_decoder(), model.get_output_embeddings()
    return training_loss(parts, ids_BT, ids_BT, int(model.config.get_text_config().vocab_size))


@contextmanager
def _one_sequence_a_window() -> Iterator[None]:
    """Has transformers see that positions run on within a window, which it would read from the tensors' content.

    So no mask is made and SDPA is told that it is causal, as in training.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:
        yield
        return
    setattr(masking_utils, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


def _after_layers(live: Any, module: Any, given: Any, output: Any) -> None:
    """Notes what the layers have kept, and when the gradient of their output is there."""
    live.layers = live.now

    def gradient_is_there(gradient: Any) -> None:
        live.at_head = live.most

    output.last_hidden_state.register_hook(gradient_is_there)


def _live_storages(known: list[Any]) -> Any:
    """A dispatch mode that counts the bytes of living storages; those of `known` tensors are left out."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known = {tensor.untyped_storage()._cdata for tensor in known}
            self.sizes: dict[int, int] = {}
            self.now = self.now_loose = self.gradients = self.gradients_loose = 0
            self.layers = self.at_head = self.most = self.most_loose = 0
            self.most_with_gradients = self.most_loose_with_gradients = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._see(leaf.untyped_storage())
            self._look()
            return out

        def _see(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.known or key in self.sizes:
                return
            size = self.sizes[key] = storage.nbytes()
            self.now += size
            self.now_loose += size if size < LARGE_BLOCK else 0
            weakref.finalize(storage, self._gone, key)

        def _gone(self, key: int) -> None:
            size = self.sizes.pop(key, 0)
            self.now -= size
            self.now_loose -= size if size < LARGE_BLOCK else 0

        def _look(self) -> None:
            self.most, self.most_loose = max(self.most, self.now), max(self.most_loose, self.now_loose)
            both, loose = self.now + self.gradients, self.now_loose + self.gradients_loose
            self.most_with_gradients = max(self.most_with_gradients, both)
            self.most_loose_with_gradients = max(self.most_loose_with_gradients, loose)

        def take_gradient(self, parameter: Any) -> None:
            """Counts a finished gradient apart from activations."""
            size = parameter.grad.numel() * parameter.grad.element_size()
            self.gradients += size
            self.gradients_loose += size if size < LARGE_BLOCK else 0
            parameter.grad = None
            self._look()

    return Live()
