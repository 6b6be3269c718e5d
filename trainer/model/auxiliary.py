"""What a model adds to its language loss by itself, such as the balance of a router's load over experts.

Nothing of it is computed here: the model's own forward pass is asked, with a language loss of nothing. It is found out
by trying, never by a list of models, so that no part of a loss is passed over without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from configs.errors import ConfigError
from eval.scoring.losses import evaluating, positions

ALIKE = 1e-5  # of a loss: two sums of the same fp32 numbers
ADDING = ("loss", "coef", "smooth", "mtp", "nextn", "ngram")  # in names of fields that change a loss


def no_language_loss(*given: Any, **named: Any) -> torch.Tensor:
    """Stands where a model has its language loss: what it returns as its loss is then what it adds.
    A zero, fp32 []."""
    logits = named["logits"] if "logits" in named else given[0]
    return torch.zeros((), dtype=torch.float32, device=logits.device)


@contextmanager
def loss_function(lm: Any, function: Any) -> Iterator[None]:
    """Within it, a model takes `function` for its language loss, where its code lets it."""
    before = vars(lm).get("_loss_function")
    lm._loss_function = function
    try:
        yield
    finally:
        del lm._loss_function
        if before is not None:
            lm._loss_function = before


def added_loss(
    lm: Any, ids_BT: torch.Tensor, *, keep: int = 0, position_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the model adds to its mean loss over this micro-batch: fp32 scalar; logits [B, keep or T, V])."""
    with loss_function(lm, no_language_loss):
        own = positions(position_BT) | ({"logits_to_keep": keep} if keep else {})
        out = lm(input_ids=ids_BT, labels=ids_BT, use_cache=False, **own)
    return out.loss, out.logits


@contextmanager
def hidden_states_of(decoder: Any) -> Iterator[list[torch.Tensor]]:
    """Within it, the last hidden states [B, T, H] of each pass through a decoder are put into the list."""
    found: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    hook = decoder.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def adds_loss(lm: Any) -> bool:
    """Whether a causal LM adds anything to its language loss while it trains.

    Raises:
        ConfigError: its loss is something else than a language loss and what is added to it; cannot be trained here.
    """
    vocab_size = int(lm.config.get_text_config().vocab_size)
    device = next(lm.parameters()).device
    ids_BT = torch.arange(1, 17, device=device).view(2, 8) % vocab_size
    own = lm.loss_function
    asked: list[torch.Tensor] = []

    def instead(*given: Any, **named: Any) -> torch.Tensor:
        asked.append(own(*given, **named))
        return no_language_loss(*given, **named)

    try:
        with evaluating(lm, training=True), torch.random.fork_rng(devices=[]), loss_function(lm, instead):
            out = lm(input_ids=ids_BT, labels=ids_BT, use_cache=False)
            loss, logits = out.loss, out.logits
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError):
        return False  # it takes no labels: it has no loss of its own
    if loss is None or logits is None:
        return False
    logits_BTV = logits.float()
    language = asked[0] if asked else loss
    # Most shift labels by one; some (bart, xlm) take them as targets.
    shifted = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    plain = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten())
    if not torch.isfinite(language):
        return False  # its losses will be refused
    if min(abs(float(language - one)) for one in (shifted, plain)) > ALIKE * (1 + abs(float(language))):
        raise ConfigError(
            f"model: the loss of a {lm.config.model_type} is {float(language):.5g} by its own code and "
            f"{float(shifted):.5g} by its logits, so something would not be trained{suspects(lm.config)}"
        )
    return bool(asked) and float(loss) != 0.0


def suspects(config: Any) -> str:
    """The fields of a model's config that may be why its loss is not what its logits say, in words."""
    described = config.get_text_config().to_dict()
    named = [
        f"model.{name}={value}"
        for name, value in described.items()
        if any(part in name for part in ADDING) and isinstance(value, int | float) and value
    ]
    return f"; set to 0 what it could be: {', '.join(named[:6])}" if named else "; take another type"
