"""Finds settings under `model:` that would change nothing in training: accepted, they would be believed to be at work.

It is found out by trying: the model is built and run once, and what it reads of its config is watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from configs.errors import ConfigError

# What is of another's concern, and what to say instead.
OTHERWISE = {
    "dtype": "use precision",
    "torch_dtype": "use precision",
    "return_dict": "leave it out",
    "output_attentions": "leave it out",
    "output_hidden_states": "leave it out",
}
SIZES = ("_size", "_dim")  # of parts that a model may lack, as one of experts alone lacks a plain MLP: harmless
FOR_LATER = ("use_cache", "architectures", "transformers_version", "name_or_path")  # of whoever takes a snapshot
LOSSES = ("loss", "output_router_logits")  # in names of fields that change what is trained


def check_fields(fields: Mapping[str, Any], config: Any, others: Mapping[str, Any]) -> None:
    """Refuses fields that a setting of ours decides. `others`: for each the config as it would be without it.

    Raises:
        ConfigError: a line each.
    """
    problems = [
        f"model.{name}: {value} has no effect in training; {OTHERWISE[name]}"
        for name, value in fields.items()
        if name in OTHERWISE and name in others and getattr(others[name], name, None) != getattr(config, name, None)
    ]
    if problems:
        raise ConfigError(*problems)


def check_losses(fields: Mapping[str, Any], kind: str, *, adds: bool) -> None:
    """Refuses fields that ask for a further loss where the model as it is has none. `adds`: as `TrainableLM` found.

    Raises:
        ConfigError: a line each, and what would switch it on.
    """
    if adds:
        return
    asked = {name: value for name, value in fields.items() if value and any(part in name for part in LOSSES)}
    switch = "set model.output_router_logits: true, or leave it out"
    if "output_router_logits" in asked:
        switch = "give it experts and a router_aux_loss_coef above 0, or leave it out"
    problems = [
        f"model.{name}: {value} adds nothing to the loss of this {kind}; {switch}" for name, value in asked.items()
    ]
    if problems:
        raise ConfigError(*problems)


def loss_is_off(hf: Any) -> bool:
    """Whether a model has experts and a coefficient for the loss of their router, which is switched off."""
    text = hf.get_text_config()
    experts = [getattr(text, name, 0) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    return (
        any(isinstance(count, int) and count > 1 for count in experts)
        and bool(getattr(text, "is_moe", True))
        and bool(getattr(text, "router_aux_loss_coef", 0))
        and getattr(text, "output_router_logits", None) is False
    )


@contextmanager
def fields_read(config: Any) -> Iterator[set[str]]:
    """Within it, the names of fields that are read of any config of this one's classes are put into the set."""
    read: set[str] = set()
    kinds = {type(config), type(config.get_text_config())}

    def watched(kind: Any) -> Any:
        look_up = kind.__getattribute__

        def look(self: Any, name: str) -> Any:
            read.add(name)
            return look_up(self, name)

        return look

    own = {kind: kind.__dict__.get("__getattribute__") for kind in kinds}
    for kind in kinds:
        kind.__getattribute__ = watched(kind)
    try:
        yield read
    finally:
        for kind, before in own.items():
            if before is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = before


def without_effect(fields: Mapping[str, Any], read: set[str], config: Any, others: Mapping[str, Any]) -> Sequence[str]:
    """Names of the fields that nothing has read, that differ from their defaults, and from which nothing follows.

    Args:
        others: for each field the config as it would be without it.
    """
    names = getattr(config, "attribute_map", {})
    seen = {names.get(name, name) for name in read}
    described = config.to_dict()
    out = []
    for name in fields:
        own = names.get(name, name)
        if own in seen or own in FOR_LATER or own.endswith(("_token_id", *SIZES)) or name not in others:
            continue
        without = others[name].to_dict()
        if without.get(own) != described.get(own) and _but(described, own) == _but(without, own):
            out.append(name)
    return out


def _but(described: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key != name}


def run_once(model: Any) -> None:
    """One forward pass as training makes it and one as scoring does, of a few tokens."""
    device = next(model.parameters()).device
    ids_BT = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.train()
        with suppress(TypeError, ValueError):  # it takes no labels
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
        model.eval()
        model(input_ids=ids_BT, use_cache=False)
