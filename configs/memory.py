"""How much memory a model takes, reckoned from its config's sizes alone: parameters, scoring, and where it can be held.

It reads a Hugging Face config as a dict and builds nothing, so it answers before any rank has started. docs/scoring.md
has the formulas in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from configs.errors import ConfigError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a number, by the dtype that settings name
MARGIN = 0.1  # of a device, left to the allocator's gaps, kernels' workspaces and the runtime
LEAST_CHUNK = 16  # targets whose logits are made at once, however large the vocabulary (eval/losses.py)


@dataclass(frozen=True)
class ModelShapes:
    """The sizes of a transformer that its memory hangs on. Parameters are counts, not bytes."""

    kind: str  # the config's model_type
    hidden: int
    layers: int
    vocabulary: int
    query: int  # width of all query heads together
    key: int  # width of all key heads together, and of all value heads
    intermediate: int  # width of the MLP, of one expert where there are several
    widths: int  # how many times `intermediate` the MLP keeps of a token at its fullest
    experts: int  # a token goes through; 0: one MLP for all
    embeddings: int  # parameters before the layers
    layer: int  # parameters of one layer
    head: int  # parameters after the layers, without a matrix that is the embeddings' own
    tied: bool  # the head multiplies by the embeddings' matrix
    stored_heads: int  # heads whose attention weights are stored (capped scores); 0: none are
    whole_logits: bool  # logits are more than head(hidden), so a sample's are held at once
    exact: bool  # parameters are those of transformers; else an estimate from the usual keys

    @property
    def parameters(self) -> int:
        return self.embeddings + self.layers * self.layer + self.head


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


@dataclass(frozen=True)
class _Gated:
    """How a family of the Llama kind departs from Llama: RMS norms, rotary positions, a gated MLP."""

    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    output_bias: bool | None = None
    norms: int = 2  # of the hidden width, a layer
    query_norm: Literal["", "head", "width"] = ""  # norms of queries and keys: of a head, or of all heads
    head_dim: int | None = None  # where the config has none; None: hidden width ÷ heads
    tied: bool = False


# Each is held against transformers' own count in tests/configs/test_memory.py.
_GATED = {
    "llama": _Gated(),
    "mistral": _Gated(),
    "granite": _Gated(),
    "phi3": _Gated(),
    "smollm3": _Gated(tied=True),
    "qwen2": _Gated(qkv_bias=True, output_bias=False),
    "qwen3": _Gated(query_norm="head", head_dim=128),
    "olmo2": _Gated(query_norm="width"),
    "gemma": _Gated(head_dim=256, tied=True),
    "gemma2": _Gated(norms=4, head_dim=256, tied=True),
    "gemma3_text": _Gated(norms=4, query_norm="head", head_dim=256, tied=True),
    "mixtral": _Gated(),
    "qwen3_moe": _Gated(query_norm="head"),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_FAMILIES = ("mixtral", "qwen3_moe")


class _Config:
    """A config's keys; what is missing is gathered, so that it can be said at once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.values = config
        self.kind = str(config.get("model_type") or "")
        self.missing: list[str] = []

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that has a value. A number above 0; 1 in place of what is missing."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"model config: {name}: {value!r}; expected a whole number above 0")
            return value
        if default is None:
            self.missing.append(" or ".join(names))
        return 1 if default is None else default

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        return default if value is None else bool(value)

    def check(self) -> None:
        if self.missing:
            raise ConfigError(
                f"model config: {', '.join(self.missing)} missing, so the memory of a {self.kind or 'nameless'} model "
                "cannot be reckoned; expected a Hugging Face config.json with its sizes written out"
            )


def model_shapes(config: Mapping[str, Any]) -> ModelShapes:
    """The sizes in a Hugging Face config (the content of `config.json`, or `PreTrainedConfig.to_dict()`).

    Counts are exact for llama, mistral, granite, phi3, smollm3, qwen2, qwen3, olmo2, gemma, gemma2, gemma3_text,
    mixtral, qwen3_moe, gpt2 and gpt_neox as causal LMs, and for bert as a masked LM. Any other type with the usual
    keys is taken for a Llama, which is about right, and is marked as not exact. Of a model with several parts the text
    part is counted.

    Raises:
        ConfigError: a size is missing or no number, or the model mixes experts in a way that is not known.
    """
    text = config.get("text_config")
    parts = isinstance(text, Mapping)
    keys = _Config(text if isinstance(text, Mapping) else config)
    if not keys.kind and parts:
        keys.kind = str(config.get("model_type") or "")
    make = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "bert": _bert}.get(keys.kind, _gated)
    found = make(keys, exact=not parts)
    keys.check()
    return found


def _heads(keys: _Config, hidden: int, head_dim: int | None) -> tuple[int, int, int]:
    """(width of a head, of all query heads, of all key heads)."""
    heads = keys.size("num_attention_heads")
    width = keys.size("head_dim", default=head_dim or max(1, hidden // heads))
    return width, heads * width, keys.size("num_key_value_heads", default=heads) * width


def _gated(keys: _Config, exact: bool) -> ModelShapes:
    family = _GATED.get(keys.kind, _Gated())
    hidden, vocabulary = keys.size("hidden_size", "n_embd", "d_model"), keys.size("vocab_size")
    head_dim, query, key = _heads(keys, hidden, family.head_dim)
    by_key = keys.flag("attention_bias", False)
    attention = hidden * (query + 2 * key) + query * hidden
    attention += (query + 2 * key) * (by_key if family.qkv_bias is None else family.qkv_bias)
    attention += hidden * (by_key if family.output_bias is None else family.output_bias)
    attention += {"": 0, "head": 2 * head_dim, "width": query + key}[family.query_norm]
    experts = _experts(keys)
    name = "moe_intermediate_size" if experts and keys.kind != "mixtral" else "intermediate_size"
    intermediate = keys.size(name, *(() if experts else ("ffn_dim", "n_inner")))
    mlp = 3 * hidden * intermediate + (2 * intermediate + hidden) * keys.flag("mlp_bias", False)
    if experts:
        mlp = experts * mlp + hidden * experts  # and what sends a token to its experts
    tied = keys.flag("tie_word_embeddings", family.tied)
    return ModelShapes(
        kind=keys.kind,
        hidden=hidden,
        layers=keys.size("num_hidden_layers", "n_layer"),
        vocabulary=vocabulary,
        query=query,
        key=key,
        intermediate=intermediate,
        widths=4 if experts or keys.kind == "phi3" else 3,  # 4: gate and up are made as one
        experts=keys.size("num_experts_per_tok") if experts else 0,
        embeddings=vocabulary * hidden,
        layer=attention + mlp + family.norms * hidden,
        head=hidden + (0 if tied else vocabulary * hidden),
        tied=tied,
        stored_heads=keys.size("num_attention_heads") if keys.values.get("attn_logit_softcapping") else 0,
        whole_logits=_changes_logits(keys),
        exact=exact and keys.kind in _GATED,
    )


def _experts(keys: _Config) -> int:
    """Experts of a layer; 0 where there is one MLP."""
    name = next((name for name in _EXPERTS if keys.values.get(name)), None)
    if name is None:
        if keys.kind in _EXPERT_FAMILIES:
            keys.missing.append(" or ".join(_EXPERTS[:2]))
        return 0
    every_layer = not keys.values.get("mlp_only_layers") and keys.values.get("decoder_sparse_step") in (None, 1)
    if keys.kind not in _EXPERT_FAMILIES or not every_layer:
        raise ConfigError(
            f"model config: {name}: {keys.values[name]!r} in a model of type {keys.kind or 'none'}; the memory of a "
            f"mixture of experts is known for {' and '.join(_EXPERT_FAMILIES)} with experts in every layer"
        )
    return keys.size(name)


def _changes_logits(keys: _Config) -> bool:
    """Whether logits are scaled or capped after the head (gemma2, granite, cohere)."""
    caps = (keys.values.get(name) for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    return any(cap not in (None, 1, 1.0) for cap in caps)


def _dense(hidden: int, intermediate: int) -> int:
    """Parameters of a layer with biases, two layer norms and a plain MLP."""
    attention = 4 * (hidden * hidden + hidden)
    return attention + 2 * hidden * intermediate + intermediate + hidden + 4 * hidden


def _plain(keys: _Config, hidden: int, intermediate: int, *, exact: bool, **sizes: Any) -> ModelShapes:
    return ModelShapes(
        kind=keys.kind,
        hidden=hidden,
        query=hidden,
        key=hidden,
        intermediate=intermediate,
        widths=4,  # of a tanh-GELU made in parts; fewer of others
        experts=0,
        stored_heads=0,
        whole_logits=False,
        exact=exact,
        **sizes,
    )


def _gpt2(keys: _Config, exact: bool) -> ModelShapes:
    hidden, vocabulary = keys.size("n_embd", "hidden_size"), keys.size("vocab_size")
    intermediate = keys.size("n_inner", default=4 * hidden)
    tied = keys.flag("tie_word_embeddings", True)
    return _plain(
        keys,
        hidden,
        intermediate,
        exact=exact,
        layers=keys.size("n_layer", "num_hidden_layers"),
        vocabulary=vocabulary,
        embeddings=(vocabulary + keys.size("n_positions", "max_position_embeddings")) * hidden,
        layer=_dense(hidden, intermediate),
        head=2 * hidden + (0 if tied else vocabulary * hidden),
        tied=tied,
    )


def _gpt_neox(keys: _Config, exact: bool) -> ModelShapes:
    hidden, vocabulary = keys.size("hidden_size"), keys.size("vocab_size")
    intermediate = keys.size("intermediate_size")
    tied = keys.flag("tie_word_embeddings", False)
    biases = 4 * hidden  # of queries, keys, values and what joins them
    return _plain(
        keys,
        hidden,
        intermediate,
        exact=exact,
        layers=keys.size("num_hidden_layers"),
        vocabulary=vocabulary,
        embeddings=vocabulary * hidden,
        layer=_dense(hidden, intermediate) - (0 if keys.flag("attention_bias", True) else biases),
        head=2 * hidden + (0 if tied else vocabulary * hidden),
        tied=tied,
    )


def _bert(keys: _Config, exact: bool) -> ModelShapes:
    hidden, vocabulary = keys.size("hidden_size"), keys.size("vocab_size")
    intermediate = keys.size("intermediate_size")
    tied = keys.flag("tie_word_embeddings", True)
    rows = vocabulary + keys.size("max_position_embeddings") + keys.size("type_vocab_size", default=2)
    transform = hidden * hidden + hidden + 2 * hidden  # of the masked-LM head, with its norm
    return _plain(
        keys,
        hidden,
        intermediate,
        exact=exact,
        layers=keys.size("num_hidden_layers"),
        vocabulary=vocabulary,
        embeddings=rows * hidden + 2 * hidden,
        layer=_dense(hidden, intermediate),
        head=transform + vocabulary + (0 if tied else vocabulary * hidden + vocabulary),  # untied: a second bias
        tied=tied,
    )


def scoring_memory(
    config: Mapping[str, Any],
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
    once, as `_activations` says; attention is taken to be torch's SDPA, which does not store its weights, unless the
    config caps its scores.
    logits = a chunk in fp32 and its log-probabilities; a chunk has max(16, logits_bytes / 4 / vocabulary) targets.
    Where logits are more than the head's product (`whole_logits`), one sample's are held besides, twice.

    Args:
        logits_bytes: what a chunk of fp32 logits may take (VERNIER_LOGITS_BYTES of eval/losses.py).
        shards: ranks that hold the weights together.

    Raises:
        ConfigError: as `model_shapes`; or an unknown dtype.
    """
    shapes, size = model_shapes(config), _bytes_of(dtype)
    rows = min(batch * sequence_length, max(LEAST_CHUNK, logits_bytes // (4 * shapes.vocabulary)))
    whole = 2 * sequence_length * shapes.vocabulary * size if shapes.whole_logits else 0
    outside = shapes.embeddings + shapes.head
    gathered = outside + max(outside, min(3, shapes.layers) * shapes.layer) if shards > 1 else 0
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
    values repeated for every head); scores in fp32 and their weights where attention stores them. MLP: gate, up and
    their product, or as many as `widths` says. Experts: the same for each expert that a token goes through, with its
    input, and what they add up to.
    """
    held, inner = 4 * size * shapes.hidden, shapes.intermediate
    norm = 3 * 4 * shapes.hidden
    attention = size * (5 * shapes.query + 2 * shapes.key) + shapes.stored_heads * sequence_length * (2 * 4 + 2 * size)
    mlp = size * shapes.widths * inner
    if shapes.experts:
        mlp = shapes.experts * (mlp + size * shapes.hidden) + size * shapes.hidden
    return held + max(norm, attention, mlp)


def placement(
    config: Mapping[str, Any],
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
    whole = scoring_memory(config, dtype, **asked)
    if whole.total <= usable:
        return "replicated"
    sharded = scoring_memory(config, dtype, **asked, shards=ranks) if ranks > 1 else whole
    if sharded.total <= usable and ranks > 1:
        return "sharded"
    at_two = scoring_memory(config, dtype, **asked, shards=2)
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
