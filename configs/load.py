"""Reads settings: YAML with `extends`, `key=value` overrides, defaults filled in, and every problem said at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.devices import gpu_count
from configs.errors import ConfigError
from configs.files.paths import path_problems
from configs.run.length import length_problems, with_lengths
from configs.schema import PACKINGS, Config, LoraSettings, section_of
from configs.secret_names import holds_secret, names_secret, without_secrets
from configs.yaml.other_names import answer
from configs.yaml.overrides import apply_overrides, sections, settings_merged
from configs.yaml.scalars import as_declared
from configs.yaml.text import as_written, dump_yaml, parse_mapping

SHIPPED = Path(__file__).parent

# DeepSpeed keys that Vernier sets itself, and the setting to use in their place.
OWNED_BY_US = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global and batch.micro",
    "optimizer": "optimizer.name and its neighbours",
    "scheduler": "schedule.name and its neighbours",
    "gradient_clipping": "clip_grad_norm",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
    "zero_optimization.cpu_offload": "zero.offload",
    "zero_optimization.cpu_offload_params": "zero.offload",
    "zero_optimization.offload_param": "zero.offload",
    "tensorboard": "vernier writes TensorBoard itself",
}


# Schedules that a setting is for.
SCHEDULES_OF = {
    "decay_ratio": ("wsd",),
    "power": ("polynomial",),
    "cycles": ("cyclical", "cosine_restarts"),
    "stages": ("stages",),
}


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that `name` means: a path, a file beside the one that names it, or a shipped recipe's name.

    Raises:
        ConfigError: there is no such file or recipe.
    """
    given = Path(name)
    candidates = [given if beside is None or given.is_absolute() else beside / given]
    if given.parent == Path(".") and given.name.removesuffix(".yaml") in recipes():
        candidates.append(recipes()[given.name.removesuffix(".yaml")])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"config: {name} is not a file; give a YAML file or one of the recipes: {', '.join(recipes())}")


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    found = [*SHIPPED.glob("*.yaml"), *(SHIPPED / "recipes").glob("*.yaml")]
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def read_mapping(path: Path, _below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a YAML file, those of the recipes that it `extends` merged in beneath.

    Raises:
        ConfigError: the file cannot be read, or extends itself.
    """
    if path.resolve() in _below:
        raise ConfigError(f"{path}: extends itself by way of {_below[-1]}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} cannot be read: {error}") from None
    mapping = parse_mapping(text, str(path))
    parent = mapping.pop("extends", None)
    if parent is None:
        return mapping
    base = read_mapping(find_config(str(parent), beside=path.parent), (*_below, path.resolve()))
    for given, other in (("epochs", "steps"), ("steps", "epochs")):  # either says how long a run is
        if mapping.get(given) is not None and other not in mapping:
            base.pop(other, None)
    return settings_merged(base, mapping)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file or shipped recipe, overridden, checked for kind and sense.

    Raises:
        ConfigError: one line a problem, all that were found.
    """
    mapping = apply_overrides(read_mapping(find_config(source)), overrides)
    # A section with all its lines commented out reads as null, and says nothing.
    mapping = {key: value for key, value in mapping.items() if value is not None or key not in sections()}
    try:
        config = Config.model_validate(as_declared(mapping, Config))
    except ValidationError as error:
        raise ConfigError(*_problems(error)) from None
    problems = [*_secrets(config), *length_problems(config)]
    if not problems:
        config = with_lengths(config)
        problems = [*_contradictions(config)]
    if problems:
        raise ConfigError(*problems)
    return config


def _secrets(config: Config) -> Iterator[str]:
    """Settings that hold a secret: they would be copied into the run's folder. No value is shown."""
    for key, text in _texts(config.model_dump(mode="json", by_alias=True)):
        # Models have fields such as pad_token and num_key_value_heads; what DeepSpeed's are called is not ours.
        named = key.startswith("deepspeed.") and names_secret(key.rpartition(".")[2])
        if text and (named or holds_secret(text)):
            yield (
                f"{key}: looks like a secret, which would be copied into the run's folder; set it in the environment "
                "of the ranks, and leave it out here"
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in settings; those of a list have the list's key."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, key)
    elif isinstance(value, str):
        yield key, value


def _problems(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        value = item.get("input")
        if item["type"] == "extra_forbidden":
            there = answer(key)
            yield f"{key}: unknown key{f'; in Vernier: {there}' if there else _nearest(key)}"
        elif item["type"] == "missing":
            yield f"{key}: missing; it must be set"
        elif item["type"] == "string_type" and value is None:
            yield f"{key}: is null or empty, and should be text; write '' for empty text, 'null' for that word"
        else:
            said = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            shown = "" if isinstance(value, (dict, list)) else f" {without_secrets(as_written(value))}"
            yield f"{key or 'config'}:{shown} {said}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All setting names in dotted form: `optimizer`, `optimizer.lr`, …"""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        section = section_of(field.annotation)
        if section is not None:
            yield from known_keys(section, key + ".")


def _nearest(key: str) -> str:
    known, leaf = list(known_keys()), key.rpartition(".")[2]
    # A right name in the wrong section (`lr` for `optimizer.lr`), else one that is written like it.
    near = [k for k in known if k != key and k.rpartition(".")[2] == leaf][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in known], n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else "; `vernier init` writes a config with all keys"


def _contradictions(config: Config) -> Iterator[str]:
    """What does not add up, as far as the settings alone can tell."""
    if config.nproc is not None and "LOCAL_WORLD_SIZE" not in os.environ:  # torchrun has its own say on that
        yield from batch_problems(config, config.nproc)
    if config.schedule.warmup_steps > config.steps and config.steps:
        yield (
            f"schedule.warmup_steps: {config.schedule.warmup_steps} is longer than the training (steps: {config.steps})"
        )
    yield from _schedule_problems(config)
    late = [step for step in config.snapshot.at if step > config.steps and config.steps]
    if late:
        yield f"snapshot.at: {late[0]} is after the last step (steps: {config.steps})"
    if config.lora.r is not None and config.model.path is None:
        yield "lora.r: an adapter is to a model that is there; set model.path, or leave lora out"
    if config.lora.r is None and config.lora != LoraSettings():
        yield "lora.r: missing; give the rank of the adapters, or leave lora out"
    if config.stop_when.asked and config.eval.placement == "none":
        yield "stop_when: goes by scores, and eval.placement is none; use separate or inline"
    possible = PACKINGS[config.objective.name]
    if config.packing not in possible:
        yield (
            f"data.packing: {config.packing} does not go with objective.name: {config.objective.name}; "
            f"use {' or '.join(possible)}"
        )
    if config.objective.name in ("masked", "classify") and config.data.prompt_field is not None:
        yield f"data.prompt_field: has no meaning with objective.name: {config.objective.name}; leave it out"
    if config.zero.offload == "cpu" and config.zero.stage == 0:
        yield "zero.offload: cpu needs zero.stage 1, 2 or 3, and zero.stage is 0"
    flat = set(_flat_keys(config.deepspeed))
    for key in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.deepspeed.get(key, {}), dict):
            yield f"deepspeed.{key}: {as_written(config.deepspeed[key])} should be a mapping of DeepSpeed's settings"
    for key, ours in OWNED_BY_US.items():
        if key in flat:
            yield f"deepspeed.{key}: set by Vernier; use {ours} instead"
    for key in ("max_position_embeddings", "n_positions"):
        longest = config.model.fields.get(key)
        if isinstance(longest, int) and config.sequence_length > longest:
            yield f"sequence_length: {config.sequence_length} is longer than model.{key} ({longest})"


def _schedule_problems(config: Config) -> Iterator[str]:
    """Settings of a schedule that have no effect with its name, or that it lacks."""
    schedule = config.schedule
    for key, names in SCHEDULES_OF.items():
        if getattr(schedule, key) is not None and schedule.name not in names:
            yield f"schedule.{key}: has no effect with schedule.name: {schedule.name}; it is of {', '.join(names)}"
    if schedule.name == "stages" and not schedule.stages:
        yield "schedule.stages: missing; give a list such as [{steps: 1000, to: 1.0}, {steps: 500, to: 0.1}]"


def _flat_keys(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")


def batch_problems(config: Config, world: int) -> Iterator[str]:
    """Says why `batch.global` cannot be cut over `world` ranks, if so."""
    total = config.batch.global_
    if total % world:
        below, above = total // world * world, (total // world + 1) * world
        batches = " or ".join(str(b) for b in (below, above) if b)
        ranks = [w for w in range(1, total + 1) if total % w == 0]
        near = sorted(sorted(ranks, key=lambda w: abs(w - world))[:2])
        yield (
            f"batch.global: {total} is not divisible by {world} ranks; "
            f"nearest batches that are: {batches}; nearest rank counts: {', '.join(map(str, near))}"
        )


def micro_batch(config: Config, world: int) -> int:
    """Windows a rank takes at once: the largest divisor of its share of the batch not above `batch.micro`."""
    share = config.batch.global_ // world
    return max(m for m in range(1, min(config.batch.micro, share) + 1) if share % m == 0)


def pass_words(windows: int, config: Config) -> str:
    """How many steps one pass over so many training windows is, and how many passes a run's steps are."""
    a_pass = -(-windows // config.batch.global_)
    return f"one pass is {a_pass:,} steps, {config.steps:,} steps are {config.steps / max(1, a_pass):.3g} passes"


def resolve(config: Config, *, nproc: int | None = None, elsewhere: bool = False) -> Config:
    """`config` with every default that depends on the machine filled in and every path made absolute.

    `nproc`: ranks on this machine where the launcher fixed them already (torchrun by hand). `elsewhere`: the ranks will
    run on other machines, so that nothing is refused for what this one lacks.
    """
    gpus = gpu_count()
    ranks = nproc or config.nproc or gpus or 1
    out = with_absolute_paths(config)
    out = out.model_copy(
        update={
            "nproc": ranks,
            "threads_per_rank": config.threads_per_rank or _threads(ranks),
            "precision": config.precision or ("bf16" if gpus else "fp32"),
            "deterministic": config.deterministic if config.deterministic is not None else gpus == 0,
            "eval": out.eval.model_copy(update={"dtype": config.eval.dtype or ("bf16" if gpus else "fp32")}),
        }
    )
    problems = [*_path_problems(config, elsewhere=elsewhere), *batch_problems(out, ranks)]
    if config.precision == "fp16" and gpus == 0 and not elsewhere:
        problems.append("precision: fp16 needs a GPU and none is visible; use fp32 (or bf16, slow on most CPUs)")
    if problems:
        raise ConfigError(*problems)
    return out


def _path_problems(config: Config, *, elsewhere: bool) -> Iterator[str]:
    source = [config.data.source] if isinstance(config.data.source, str) else config.data.source
    named = [
        ("run.dir", config.run_dir),
        ("data.dir", config.data_dir),
        *(("data.source", Path(one).expanduser()) for one in source),
        ("data.tokenizer", config.data.tokenizer),
        ("model.path", config.model.path),
        ("eval.reference", config.eval.reference),
        ("baseline", config.baseline),
    ]
    told: set[str] = set()
    for key, path in named:
        for problem in path_problems(key, path, elsewhere=elsewhere) if path is not None else ():
            if problem.partition(": ")[2] not in told:
                told.add(problem.partition(": ")[2])
                yield problem


def _threads(ranks: int) -> int:
    """CPU threads of each of so many ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    several = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    other = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")  # who starts ranks inside a task
    if own.isdigit() and several and not any(name in os.environ for name in other):
        return max(1, min(cores, int(own)))  # srun's tasks are the ranks: these cores are shared with no other
    return max(1, cores // ranks)


def with_absolute_paths(config: Config) -> Config:
    """`config` as it means the same from any directory; what hangs on the machine stays open."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": config.run_dir.absolute()}),
            "baseline": config.baseline and config.baseline.absolute(),
            "callbacks": [_absolute_class(one) for one in config.callbacks],
            "data": config.data.model_copy(
                update={
                    "dir": config.data_dir.absolute(),
                    "source": _absolute(config.data.source),
                    "tokenizer": config.data.tokenizer and config.data.tokenizer.absolute(),
                }
            ),
            "model": config.model.model_copy(update={"path": config.model.path and config.model.path.absolute()}),
            "eval": config.eval.model_copy(update={"reference": config.reference_dir.absolute()}),
        }
    )


def _absolute(source: str | list[str]) -> str | list[str]:
    """Sources as absolute paths; a name that is no path (python-stdlib) stays."""
    if isinstance(source, list):
        return [str(_absolute(one)) for one in source]
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _absolute_class(name: str) -> str:
    """FILE.py:Class with an absolute path; module:Class as it is."""
    place, _, kind = name.rpartition(":")
    return f"{Path(place).expanduser().absolute()}:{kind}" if place.endswith(".py") else name


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same settings, and PyYAML and other readers to the same values."""
    mapping = config.model_dump(mode="json", by_alias=True)
    mapping["model"] = {k: v for k, v in mapping["model"].items() if v is not None}
    return dump_yaml(mapping)


def leaves(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each setting; a list is one value."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""

    left = dict(leaves(a.model_dump(mode="json", by_alias=True)))
    right = dict(leaves(b.model_dump(mode="json", by_alias=True)))
    return {k: (left.get(k), right.get(k)) for k in {**left, **right} if left.get(k) != right.get(k)}


def is_named(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of `names`, or in a section that is named with a dot at its end (`eval.`)."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
