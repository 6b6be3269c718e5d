"""How much memory scoring takes, reckoned from a model's sizes alone, and where its weights can be held.

It is arithmetic and builds nothing; eval/scoring/model_shapes.py finds the sizes. docs/scoring.md has the formulas in
words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a number, by the dtype that settings name
MARGIN = 0.1  # of a device, left to the allocator's gaps, kernels' workspaces and the runtime
LEAST_CHUNK = 16  # targets whose logits are made at once, however large the vocabulary (eval/scoring/losses.py)


@dataclass(frozen=True)
class ModelShapes:
    """The sizes of a transformer that its memory hangs on (eval/scoring/model_shapes.py finds them)."""

    parameters: int  # numbers in its weights; tied ones count once
    active: int  # of them those that a token goes through: of experts only the ones it is sent to
    outside: int  # parameters before and after the layers
    layer: int  # parameters of the largest layer
    layers: int
    hidden: int
    vocabulary: int
    query: int  # width of all query heads together; 0: no attention
    key: int  # width of all key heads together, and of all value heads
    mlp: int  # numbers that the MLP keeps of a token at its fullest
    stored_heads: int  # heads whose attention weights are stored (attention without SDPA); 0: none are
    whole_logits: bool  # logits are more than head(hidden), so a sample's are held at once


@dataclass(frozen=True)
class ScoringMemory:
    """Bytes that one rank needs at most while it scores, by what they are for."""

    weights: int  # all of them, or a rank's shard
    gathered: int  # weights that are whole for a while on every rank when they are sharded
    activations: int  # of one forward pass without gradients
    logits: int  # of a chunk of targets, and what is made of them

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.activations + self.logits

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gathered layers": self.gathered,
            "activations": self.activations,
            "logits": self.logits,
        }
        said = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        return f"{gib(self.total)} ({said})"


def scoring_memory(
    shapes: ModelShapes,
    dtype: str,
    *,
    sequence_length: int,
    batch: int,
    logits_bytes: int = 64 << 20,
    shards: int = 1,
) -> ScoringMemory:
    """What one rank needs to score batches of `batch` samples of `sequence_length` targets.

    With e bytes a number and N = batch × sequence_length:
    weights = parameters · e / shards. gathered (only when sharded) = e · (embeddings and head, which stay, and the
    larger of them again and three layers: gathering goes through a buffer of the same size, and a layer is gathered
    while the one before works). activations = N · the most that a norm, the attention or the MLP of one layer keeps at
    once, as `_activations` says; torch's SDPA does not store attention's weights, other attention does.
    logits = a chunk in fp32 and its log-probabilities; a chunk has max(16, logits_bytes / 4 / vocabulary) targets.
    Where logits are more than the head's product (`whole_logits`), one sample's are held besides, twice.

    Args:
        logits_bytes: what a chunk of fp32 logits may take (VERNIER_LOGITS_BYTES of eval/scoring/losses.py).
        shards: ranks that hold the weights together.

    Raises:
        ConfigError: an unknown dtype.
    """
    size = _bytes_of(dtype)
    rows = min(batch * sequence_length, max(LEAST_CHUNK, logits_bytes // (4 * shapes.vocabulary)))
    whole = 2 * sequence_length * shapes.vocabulary * size if shapes.whole_logits else 0
    inside = min(3, shapes.layers) * shapes.layer
    gathered = shapes.outside + max(shapes.outside, inside) if shards > 1 else 0
    return ScoringMemory(
        weights=-(-shapes.parameters * size // shards),
        gathered=gathered * size,
        activations=batch * sequence_length * _activations(shapes, size, sequence_length),
        logits=rows * shapes.vocabulary * (4 + 4) + whole,
    )


def _activations(shapes: ModelShapes, size: int, sequence_length: int) -> int:
    """Bytes a token at the fullest moment of a layer's forward pass without gradients.

    Throughout: the embeddings, the layer's input, the residual and the normed input. Norm: its fp32 copies besides.
    Attention: queries, keys and values, and up to four more of the queries' width (turning positions, or keys and
    values repeated for every head); scores in fp32 and their weights where attention stores them. MLP: as many as
    `mlp` says.
    """
    held = 4 * size * shapes.hidden
    norm = 3 * 4 * shapes.hidden
    attention = size * (5 * shapes.query + 2 * shapes.key) + shapes.stored_heads * sequence_length * (2 * 4 + 2 * size)
    return held + max(norm, attention, size * shapes.mlp)


def placement(
    shapes: ModelShapes,
    dtype: str,
    *,
    sequence_length: int,
    batch: int,
    device_bytes: int,
    ranks: int,
    logits_bytes: int = 64 << 20,
    shared_host: bool = False,
) -> Literal["replicated", "sharded"]:
    """Where a model's weights go for scoring: whole on every rank where one holds it, else in shards over the ranks.

    Args:
        device_bytes: what one rank has to itself: a GPU's memory, or the host's free memory ÷ ranks on CPU. A tenth of
            it is left free.
        shared_host: ranks share one host's memory, so more of them do not bring more.

    Raises:
        ConfigError: not even shards fit; says what a rank needs, what there is, and how many ranks would do.
    """
    asked = {"sequence_length": sequence_length, "batch": batch, "logits_bytes": logits_bytes}
    usable = int(device_bytes * (1 - MARGIN))
    whole = scoring_memory(shapes, dtype, **asked)
    if whole.total <= usable:
        return "replicated"
    sharded = scoring_memory(shapes, dtype, **asked, shards=ranks) if ranks > 1 else whole
    if sharded.total <= usable and ranks > 1:
        return "sharded"
    at_two = scoring_memory(shapes, dtype, **asked, shards=2)
    left = usable - (at_two.total - at_two.weights)
    if shared_host:
        what_would_do = "more ranks on this machine would have less memory each: take more machines, or one with more"
    elif left > 0:
        what_would_do = f"{max(2, -(-whole.weights // left)):,} ranks would do"
    else:
        what_would_do = (
            f"no number of ranks would do, since what each needs besides its shard is "
            f"{gib(at_two.total - at_two.weights)}; take a larger device, or a reference set with a smaller "
            f"reference.batch (now {batch})"
        )
    raise ConfigError(
        f"model: scoring in {dtype} needs {sharded} a rank on {ranks} rank{'s' if ranks > 1 else ''}, and a rank has "
        f"{gib(device_bytes)}, of which {MARGIN:.0%} stays free; {what_would_do}"
    )


def gib(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _bytes_of(dtype: str) -> int:
    if dtype not in BYTES:
        raise ConfigError(f"dtype: {dtype!r}; expected one of {', '.join(BYTES)}")
    return BYTES[dtype]
