"""The model to train: its Hugging Face config checked against data and settings, its weights made or read."""

from __future__ import annotations

import copy
import difflib
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError
from configs.schema import Config, ModelSettings
from eval.distributed.ranks import environment_ranks, seed_everything
from eval.scoring.masked import positions
from eval.scoring.model_shapes import on_meta
from eval.scoring.models import (
    KINDS,
    auto_model,
    check_loaded,
    check_model,
    makes,
    quantization,
    quiet_libraries,
    sees_the_future,
)
from trainer.checkpoint.adapter_files import base_of
from trainer.checkpoint.warm_start import check_step, find_step, load_masters
from trainer.engine.decay import check_patterns
from trainer.model.adapter import as_trained
from trainer.model.auxiliary import adds_loss
from trainer.model.dropout import drops, recompute_contexts
from trainer.model.effects import check_fields, check_losses, fields_read, run_once, without_effect

WIDEST_TRIED = 1536  # one layer of this takes half a second
MOST_TRIED = 20_000_000  # parameters of a model that is tried as a whole


def hf_config(settings: ModelSettings, facts: dict[str, Any], kind: str = "causal") -> Any:
    """The Hugging Face config that the settings describe.

    Args:
        facts: of the prepared data (`vocab_size`, `eos_id`), which fill in what the settings leave open.
        kind: of model, in `eval.scoring.models.KINDS`.

    Raises:
        ConfigError: unknown model type or field, or a combination that the config class refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    called = KINDS[kind][1]
    if settings.path is not None:
        step = find_step(settings.path)
        if step is None:
            check_model(settings.path)
        else:
            check_step(step, hashes=environment_ranks()[2] == 0)  # by the first rank of each node
        home = settings.path if step is None else step.home
        try:
            config = AutoConfig.from_pretrained(home, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ConfigError(f"model.path: {settings.path}: {str(error).strip().splitlines()[0]}") from None
        if not makes(kind, config.model_type):
            raise ConfigError(f"model.path: {settings.path} is a {config.model_type}, which is no {called}")
        return with_labels(config, facts) if kind == "classify" else config
    named = str(settings.type)
    if not makes(kind, named):
        near = difflib.get_close_matches(named, [name for name in CONFIG_MAPPING if makes(kind, name)], n=3)
        raise ConfigError(
            f"model.type: {named!r} is no {called} that transformers knows"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    method = quantization(settings.fields)
    if method is not None:
        raise ConfigError(f"model.quantization_config: {method}; quantized weights are not trained; leave it out")
    fields = {"vocab_size": facts["vocab_size"], **settings.fields}
    default = CONFIG_MAPPING[named]()
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"model.{key}: {named} has no such field" + (f"; did you mean {near[0]}?" if near else "")
            )
    for key in ("bos_token_id", "eos_token_id"):
        if key in known:
            fields.setdefault(key, facts["eos_id"])
    if getattr(default, "pad_token_id", None) is not None:
        # A default beyond a small vocabulary would be an index error; what is fed to a causal LM is never padded.
        fields.setdefault("pad_token_id", None if kind == "causal" else facts.get("pad_id"))
    try:
        made = AutoConfig.for_model(named, **fields)
        return with_labels(made, facts) if kind == "classify" else made
    except Exception as error:  # each config class raises its own kinds
        cause = error.__cause__ or error
        raise ConfigError(f"model: {named} refuses these fields: {str(cause).strip().splitlines()[0]}") from None


def with_labels(hf: Any, facts: dict[str, Any]) -> Any:
    """A classifier's config with the labels and the padding of the data in `facts`, as far as it knows them."""
    labels = facts.get("labels")
    if labels is not None:
        kinds = {"single": "single_label_classification", "several": "multi_label_classification"}
        hf.problem_type = kinds.get(labels["problem"], "regression")
        names = labels["names"] or ["LABEL_0"]
        hf.id2label, hf.label2id = dict(enumerate(names)), {name: at for at, name in enumerate(names)}
    if getattr(hf, "pad_token_id", None) is None:  # a decoder's head looks at the last token that is none
        hf.pad_token_id = facts.get("pad_id") if facts.get("pad_id") is not None else facts["eos_id"]
    return hf


def check_model_settings(config: Config, facts: dict[str, Any], tokenizer_fingerprint: str) -> Any:
    """The Hugging Face config, after it was found to fit the data and the settings.

    Raises:
        ConfigError: what does not fit, and what to change.
    """
    kind = kind_of(config)
    if config.lora.r is not None:
        base_of(config)
    hf = hf_config(config.model, facts, kind)
    text = hf.get_text_config()
    problems = []
    if text.vocab_size < facts["vocab_size"]:
        problems.append(
            f"model.vocab_size: {text.vocab_size:,} is smaller than the tokenizer's vocabulary "
            f"({facts['vocab_size']:,}); raise it, or prepare the data with a smaller data.vocab_size"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and config.sequence_length > longest:
        problems.append(
            f"sequence_length: {config.sequence_length} is longer than the model's max_position_embeddings ({longest})"
        )
    if config.gradient_checkpointing and not checkpoints_activations(hf, kind):
        problems.append(
            f"gradient_checkpointing: {hf.model_type} has none in transformers; leave it out, and lower batch.micro or "
            "raise zero.stage where memory is short"
        )
    home = _home(config.model.path)
    if home is not None and (home / "tokenizer.json").is_file():
        from eval.reference.set import tokenizer_fingerprint as fingerprint_of

        if fingerprint_of(home) != tokenizer_fingerprint:
            problems.append(
                f"model.path: {config.model.path} has another tokenizer than the data; "
                f"prepare the data with data.tokenizer={home}"
            )
    if problems:
        raise ConfigError(*problems)
    built = as_trained(config, on_meta(hf, kind))  # refuses what transformers cannot build
    check_patterns([name for name, p in built.named_parameters() if p.requires_grad], config.optimizer.no_decay)
    if kind == "masked":
        check_positions(config, built)
    if config.packing == "documents":
        check_keeps_apart(hf, small=sum(p.numel() for p in built.parameters()) <= MOST_TRIED)
    if kind == "causal":
        check_looks_back(config, hf)
        if config.model.fields and environment_ranks()[2] == 0:
            check_effects(config.model, facts, hf)
    return hf


def kind_of(config: Config) -> str:
    """The kind of model that a config trains, in `eval.scoring.models.KINDS`."""
    return {"instruct": "causal"}.get(config.objective.name, config.objective.name)


@torch.no_grad()
def check_keeps_apart(hf: Any, *, small: bool = True) -> None:
    """Refuses a model in which packed documents would see one another: one layer of it is tried, by each node's first
    rank. What cannot be run so is left to the ranks.

    Args:
        small: it may be tried as a whole, where it is not to be had with one layer.

    Raises:
        ConfigError: they would; and what to do.
    """
    if environment_ranks()[2] != 0:
        return
    model = None
    for make in (_one_layer, _random) if small else (_one_layer,):
        with suppress(Exception):  # each model class raises its own kinds; if neither can be, the ranks will say
            model = model or make(hf).eval()
    if model is None:
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 9)[None] % vocabulary
    other = torch.cat([(ids[:, :4] + 1) % vocabulary, ids[:, 4:]], dim=1)
    position = torch.arange(4).repeat(2)[None]
    try:
        a, b = (model(input_ids=one, position_ids=position, use_cache=False).logits[0, 4:] for one in (ids, other))
    except TypeError:  # it takes no positions, so it cannot be told
        a, b = torch.zeros(1), torch.ones(1)
    except Exception:  # what is wrong with it the ranks will say
        return
    # What is masked out is exactly nothing; a state that is carried may be small in a model at random.
    if not torch.allclose(a, b, rtol=1e-6, atol=1e-7 * float(a.abs().max())):
        raise ConfigError(
            f"data.packing: documents: in a {hf.model_type} a document sees those before it in its window, since it "
            "carries a state from token to token; use data.packing: none"
        )


def check_positions(config: Config, model: Any) -> None:
    """Refuses a masked LM that has no positions for a window with CLS and SEP.

    Raises:
        ConfigError: it has not; what would do.
    """
    takes, fed = positions(model), config.sequence_length + 2
    if takes is not None and takes < fed:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} and CLS and SEP are {fed} tokens, the model takes {takes}; "
            f"use {takes - 2}, or raise model.max_position_embeddings by {fed - takes}"
        )


def checkpoints_activations(hf: Any, kind: str = "causal") -> bool:
    """Whether transformers can checkpoint the activations of this type of model."""
    return bool(auto_model(kind)._model_mapping[type(hf)].supports_gradient_checkpointing)


def check_effects(settings: ModelSettings, facts: dict[str, Any], hf: Any) -> None:
    """Refuses fields under `model:` that change nothing in training; as far as that is found without much memory.

    Raises:
        ConfigError: which, and why; or the model's loss is one that is not trained here.
    """
    others = {}
    for name in settings.fields:
        with suppress(ConfigError):  # without it there is no such model: it has an effect
            rest = {key: value for key, value in settings.fields.items() if key != name}
            others[name] = hf_config(ModelSettings(type=settings.type, **rest), facts)
    check_fields(settings.fields, hf, others)
    try:
        with fields_read(hf) as read:
            model = on_meta(hf)
            small = sum(p.numel() for p in model.parameters()) <= MOST_TRIED
            if small:
                model = _random(hf)
            run_once(model)  # of a larger one without numbers
    except Exception:  # what a model's own code asks of tensors without numbers cannot be listed
        return
    idle = without_effect(settings.fields, read, hf, others)
    if idle:
        raise ConfigError(
            *(f"model.{name}: a {hf.model_type} never reads it, so it has no effect; leave it out" for name in idle)
        )
    if small:  # else the ranks will say
        check_losses(settings.fields, hf.model_type, adds=adds_loss(model))


def check_looks_back(config: Config, hf: Any) -> None:
    """Refuses a model that sees the token it is to predict, whose loss would mean nothing: one layer of it is tried.

    Raises:
        ConfigError: it does, or cannot be run at all; and what to do.
    """
    text = hf.get_text_config()
    switch = getattr(text, "is_decoder", None)  # of encoders that can be made to look back only
    width = getattr(text, "hidden_size", None)
    if switch is None and (not isinstance(width, int) or width > WIDEST_TRIED):
        return  # without the switch no type of transformers' causal LMs looks ahead; this is for a mistake of its own
    if environment_ranks()[2] != 0:
        return  # the first rank of a node tries it for all
    kind, where = f"model.type: {hf.model_type}", "model.is_decoder: true"
    if config.model.path is not None:
        kind, where = f"model.path: {config.model.path}", '"is_decoder": true in its config.json'
    what_to_do = f"set objective.name: masked, or {where} to train it as a causal LM"
    if switch:
        what_to_do = "take another type: a decoder such as llama or gpt2, or bert with is_decoder: true"
    try:
        model = _one_layer(hf)
        ahead = sees_the_future(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
        if switch and not ahead and not _takes(model, config.sequence_length):
            longest = next(n for n in range(config.sequence_length, -1, -1) if n == 0 or _takes(model, n))
            raise ConfigError(
                f"sequence_length: {config.sequence_length} is longer than the {longest} tokens that {hf.model_type} "
                f"takes with max_position_embeddings ({text.max_position_embeddings}); some are for no token"
            )
    except ConfigError:
        raise
    except Exception as error:  # each model class raises its own kinds
        if switch is None:
            return  # perhaps only as one layer; the ranks will say
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{kind} is an encoder that does not run as a causal LM ({said}); {what_to_do}") from None
    if ahead:
        raise ConfigError(f"{kind} sees the tokens after the one that it predicts, as encoders do; {what_to_do}")


def _takes(model: Any, length: int) -> bool:
    """Whether a model has positions for so many tokens: RoBERTa's kind numbers them from `pad_token_id` + 1 on."""
    ids = torch.full((1, length), 2, dtype=torch.int64)  # none of these is padding, at 0 or 1
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


def _one_layer(hf: Any) -> Any:
    """A model of this kind with one layer and few entries in its vocabulary (where it has these), at random, on the
    CPU."""
    small = copy.deepcopy(hf)
    text = small.get_text_config()
    text.vocab_size = min(text.vocab_size, 1024)
    with suppress(NotImplementedError):  # an encoder and a decoder, each with a number of its own
        text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        with suppress(AttributeError):  # Mamba's follow from the number of layers
            text.layer_types = text.layer_types[:1]
    return _random(small).eval()


def _random(hf: Any) -> Any:
    """A model at random, on the CPU, without a word of transformers'."""
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        return auto_model("causal").from_config(copy.deepcopy(hf), dtype=torch.float32)  # which writes to it


def _home(path: Path | None) -> Path | None:
    """The Hugging Face directory that `model.path` leads to."""
    step = find_step(path) if path is not None else None
    return path if step is None else step.home


def make_model(config: Config, hf: Any) -> Any:
    """The model in fp32 on the CPU, the same on every rank: random from `seed`, or read from `model.path`."""
    auto = auto_model(kind_of(config))
    seed_everything(config.seed)
    home = _home(config.model.path)
    if home is not None:
        model, info = auto.from_pretrained(
            home,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({"config": hf, "ignore_mismatched_sizes": True} if config.objective.name == "classify" else {}),
        )
        check_loaded(home, info, made_up=_head(model) if config.objective.name == "classify" else "")
        step = find_step(config.model.path) if config.model.path is not None else None
        if step is not None and step.checkpoint is not None:
            load_masters(model, step.checkpoint)
    else:
        model = auto.from_config(hf, dtype=torch.float32)
    as_trained(config, model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
        if config.lora.r is not None:  # else nothing that goes into a checkpointed layer asks for a gradient
            model.enable_input_require_grads()
    return model


def _head(model: Any) -> str:
    """Pattern of the names of a classifier's own weights, which a model that was trained for something else lacks."""
    return rf"(?!{re.escape(model.base_model_prefix)}\.)|{re.escape(model.base_model_prefix)}\.pooler\."


def checkpoint_activations(model: Any) -> None:
    """Has a model compute its activations again in the backward pass, with the same dropout."""
    again = {"context_fn": recompute_contexts} if drops(model) else {}
    model.gradient_checkpointing_enable({"use_reentrant": False, **again})
