"""The model of a config, as far as a plan goes: its parameters, its activations, what a token computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, DataError
from configs.files.atomic import read_json
from configs.memory.step_time import Work

if TYPE_CHECKING:
    from configs.memory.scoring import ModelShapes
    from configs.schema import Config


@dataclass(frozen=True)
class Model:
    """The model that is to be trained, as far as memory goes."""

    name: str
    parameters: int
    notes: tuple[str, ...]
    built: Any = field(default=None, repr=False)  # on the meta device; None: transformers cannot build it
    shapes: ModelShapes | None = None  # of what is built


def find_model(config: Config, data: dict[str, Any] | None) -> Model:
    """The model's name and its trained parameters, tied ones once.

    Args:
        data: what `dataset.json` says; None where the data is not prepared yet.

    Raises:
        ConfigError: there is no such model, or it refuses its fields.
    """
    settings = config.model
    notes: list[str] = []
    if config.lora.r is not None:
        notes.append("lora: memory is reckoned as if all weights were trained; adapters take less")
    if settings.path is not None:
        home = settings.path
        if not (home / "config.json").is_file():
            from trainer.checkpoint.warm_start import find_step  # torch comes with it

            step = find_step(home)
            if step is None:
                raise ConfigError(
                    f"model.path: {home} has no config.json; expected a Hugging Face model directory or RUN@STEP"
                )
            home = step.home
        from eval.scoring.model_shapes import model_shapes, on_meta, stored_parameters
        from eval.scoring.models import read_config
        from trainer.model.build import kind_of

        name = str(read_json(home / "config.json").get("model_type") or settings.path.name)
        try:
            built = on_meta(read_config(home), kind_of(config))
        except (ConfigError, DataError):  # training would refuse it
            notes.append("transformers cannot build it: counted as stored in its safetensors files, attention left out")
            return Model(name, stored_parameters(home), tuple(notes))
        shapes = model_shapes(built)
        return Model(name, shapes.parameters, tuple(notes), built, shapes)
    facts = data
    if facts is None:
        facts = {"vocab_size": _expected_vocabulary(config), "eos_id": 0, "pad_id": 1}
        if "vocab_size" not in settings.fields:
            notes.append(
                f"{config.data_dir} is not prepared, so its vocabulary is taken to have {facts['vocab_size']:,} "
                f"entries ({'data.tokenizer' if config.data.tokenizer else 'data.vocab_size'})"
            )
    from eval.scoring.model_shapes import model_shapes, on_meta  # torch comes with it
    from trainer.model.build import hf_config, kind_of

    kind = kind_of(config)
    built = on_meta(hf_config(settings, facts, kind), kind)
    shapes = model_shapes(built)
    return Model(str(settings.type), shapes.parameters, tuple(notes), built, shapes)


@dataclass(frozen=True)
class Decay:
    """What weight decay pulls at, and what it does not: tensors, parameters, and a few names of each."""

    tensors: int
    parameters: int
    names: tuple[str, ...]


def decay_of(model: Model, config: Config) -> tuple[Decay, Decay] | None:
    """(decayed, not decayed); None where transformers cannot build it.

    Raises:
        ConfigError: a pattern of `optimizer.no_decay` that no parameter has.
    """
    if model.built is None:
        return None
    from trainer.engine.decay import alike, decay_groups  # torch comes with it

    groups = decay_groups(model.built, config.optimizer.no_decay)
    decayed, kept = (Decay(len(group), sum(p.numel() for p in group.values()), tuple(alike(group))) for group in groups)
    return decayed, kept


def work_of(model: Model, sequence_length: int) -> Work:
    """What a token of this model computes; of one that is not built, its parameters are all that is known."""
    if model.shapes is None:
        return Work(model.parameters, 0, 0, sequence_length)
    return Work.of(model.shapes, sequence_length)


def model_size(model: Model, config: Config, *, on_gpu: bool) -> Any:
    """The model's `ModelSize`, which finds its activations; None where transformers cannot build it."""
    if model.shapes is None:
        return None
    from launcher.plan.activations import ModelSize  # torch comes with it
    from trainer.model.build import kind_of

    return ModelSize(
        model.built,
        kind=kind_of(config),
        targets=config.objective.mask_ratio if config.objective.name == "masked" else 1.0,
        sequence_length=config.sequence_length,
        precision=config.precision or "fp32",
        checkpointing=config.gradient_checkpointing,
        whole_logits=model.shapes.whole_logits,
        on_gpu=on_gpu,
    )


def _expected_vocabulary(config: Config) -> int:
    """Entries of the tokenizer that the data will be prepared with."""
    if config.data.tokenizer is None:
        return config.data.vocab_size
    from eval.reference.tokenizer import open_tokenizer

    return open_tokenizer(config.data.tokenizer).vocab_size
