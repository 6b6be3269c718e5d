"""Every setting that a user may write, one pydantic model a concern; the text at each field is its documentation.

Unknown keys are refused (with the nearest known one named, see `configs.load`). Nothing here imports torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from configs.training import (
    NAME_PATTERN,
    PACKINGS,
    BatchSettings,
    Count,
    EmaSettings,
    Fraction,
    GuardSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Positive,
    Precision,
    ScheduleSettings,
    Settings,
    StageSettings,
    StopSettings,
    TwinSettings,
    ZeroSettings,
    seconds_of,
    section_of,
)

__all__ = [
    "NAME_PATTERN",
    "PACKINGS",
    "BatchSettings",
    "Config",
    "Count",
    "DataSettings",
    "EmaSettings",
    "EvalSettings",
    "Fraction",
    "GuardSettings",
    "LaunchSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "Positive",
    "Precision",
    "ReferenceSettings",
    "ScheduleSettings",
    "Settings",
    "StageSettings",
    "StopSettings",
    "TwinSettings",
    "ZeroSettings",
    "seconds_of",
    "section_of",
]


class RunSettings(Settings):
    dir: Path | None = Field(None, description="directory of the run; default runs/NAME")


class DataSettings(Settings):
    dir: Path | None = Field(None, description="directory of the prepared data; default data/NAME")
    source: str | list[str] = Field(
        "python-stdlib",
        description="python-stdlib; files or folders of .txt .md .py … .jsonl .csv .parquet .arrow; a saved data set",
    )
    text_field: str = Field("text", description="column that holds the text, where the source has columns")
    prompt_field: str | None = Field(
        None, description="column that holds a prompt to the text: context, neither trained on nor scored"
    )
    messages_field: str = Field(
        "messages", description="instruct: column of conversations, unless prompt_field and text_field are a turn each"
    )
    tools_field: str | None = Field(None, description="instruct: column of the tools that a conversation may call")
    label_field: str = Field("label", description="classify: column of labels")
    packing: Literal["stream", "documents", "none"] | None = Field(
        None,
        description="stream: documents end to end, cut into windows; documents: whole ones, several a window, none "
        "seeing another; none: one a window; default stream, of instruct documents, of classify none",
    )
    max_bytes: Positive | None = Field(None, description="take documents, in random order, up to this many bytes")
    tokenizer: Path | None = Field(None, description="directory of a Hugging Face tokenizer; trained here when absent")
    characters: bool = Field(False, description="the tokenizer that is trained here has characters for tokens")
    vocab_size: Annotated[int, Field(ge=257)] = Field(8192, description="entries of the tokenizer that is trained here")


class ReferenceSettings(Settings):
    documents: Positive | None = Field(None, description="of the set; null: all that max_fraction allows, to 20,480")
    max_fraction: Fraction = Field(0.05, description="no more than this part of all tokens becomes reference set")
    max_windows: Positive | None = Field(
        None, description="a document counts with at most so many windows; null: as few as make 20,480 samples, to 16"
    )
    batch: Positive = Field(16, description="samples a batch; part of the set, so that it never changes a loss")
    block_samples: Positive = Field(256, description="a block is whole documents with at least this many samples")
    min_shared_run: Positive = Field(50, description="documents that share so many consecutive tokens stay on one side")


class ModelSettings(Settings):
    """`path` of a Hugging Face model directory, or `type` with that model's own config fields."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    path: Path | None = Field(None, description="Hugging Face model directory with safetensors to start from")
    type: str | None = Field(None, description="a Hugging Face model type (llama, gpt2, qwen3, …) with random weights")

    @model_validator(mode="after")
    def one_of_path_and_type(self) -> ModelSettings:
        if (self.path is None) == (self.type is None):
            raise ValueError("give either path (a model directory) or type (with the fields of its config)")
        if self.path is not None and self.fields:
            raise ValueError(f"path brings its own config.json; remove {', '.join(sorted(self.fields))}")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The model's own config fields, as given."""
        return dict(self.model_extra or {})


class CheckpointSettings(Settings):
    every: Positive = Field(1000, description="steps between checkpoints (to go on from)")
    keep: Positive = Field(2, description="newest checkpoints that stay")
    keep_every: Positive | None = Field(None, description="checkpoints at multiples of so many steps stay as well")
    background: bool = Field(True, description="write checkpoints and snapshots from a copy while training goes on")


class SnapshotSettings(Settings):
    every: Positive = Field(1000, description="steps between snapshots (to score and to use)")
    at: list[Count] = Field(default_factory=list, description="further steps to take a snapshot at")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="default: as the precision keeps weights")
    keep: Positive | None = Field(
        None, description="newest snapshots that stay, with the best and all that are not scored yet; null: all"
    )
    keep_every: Positive | None = Field(None, description="with keep: snapshots at multiples of so many steps stay too")


class EvalSettings(Settings):
    placement: Literal["separate", "het", "inline", "none"] = Field(
        "separate",
        description="separate: an own rank-group (on Slurm an own job) watches the run; het: as a part of one "
        "heterogeneous job; inline: the training ranks score",
    )
    reference: Path | None = Field(None, description="reference set; default the one beside the training data")
    dtype: Literal["fp32", "bf16"] | None = Field(None, description="default fp32 on CPU, bf16 on GPU")
    weights: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="whole on every eval rank, sharded over them, or by what a device holds (placement: separate)",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(1800.0, description="longest wait of eval ranks for one another")
    nproc: Positive = Field(1, description="ranks of the eval rank-group (a node)")
    nodes: Positive = Field(1, description="nodes of the eval rank-group, under `vernier launch`")
    threads_per_rank: Positive = Field(1, description="CPU threads of a scoring rank; fixed, since they change bits")

    @property
    def is_beside(self) -> bool:
        """Whether a rank-group of its own scores, beside the training ranks."""
        return self.placement in ("separate", "het")


# What Slurm takes for a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")


class LaunchSettings(Settings):
    """A run's jobs, under `vernier launch`. What belongs to a site rather than a run is in its profile."""

    nodes: Positive = Field(1, description="nodes to train on")
    ranks_per_node: Positive | None = Field(
        None, description="training ranks a node; default launch.gpus_per_node, else nproc, else 1"
    )
    gpus_per_node: Count | None = Field(None, description="GPUs to ask for; default the site's, else none")
    cpus_per_rank: Positive | None = Field(None, description="default the site's, else threads_per_rank")
    memory: str | None = Field(None, description="host memory a node, as Slurm takes it (64G; 0: all of it)")
    time: str = Field("24:00:00", description="time limit of a job, as Slurm takes it: 2-12:00:00, 12:00:00, 90")
    signal_s: Positive = Field(300, description="seconds before the time limit at which it stops with a checkpoint")
    requeue_limit: Count = Field(5, description="times in a row that it is queued again without a new checkpoint")
    preflight: bool = Field(True, description="check the nodes before the ranks start")
    board: bool = Field(False, description="TensorBoard on the first node, found by `vernier status`")
    start: Literal["fork", "exec"] = Field(
        "fork", description="ranks of a node: forked once all is imported, or exec'd, where forks make trouble"
    )

    @field_validator("time")
    @classmethod
    def time_is_slurms(cls, value: str) -> str:
        if not _SLURM_TIME.fullmatch(value):
            raise ValueError("should be minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        return value

    @field_validator("memory")
    @classmethod
    def memory_is_slurms(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+[KMGT]?", value):
            raise ValueError("should be a number with K, M, G or T behind it, such as 64G")
        return value


class Config(Settings):
    """All settings of a run. `configs.load.load_config` reads one from YAML."""

    name: str = Field(..., description="of the run and its data set")
    seed: Count = 0
    steps: Count = Field(0, description="optimizer steps")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="in place of steps: passes over the training data, which has to be prepared"
    )
    max_time: str | None = Field(
        None, description="e.g. 3h, 90m, 1h30m: a run that has trained for so long ends as if that were its last step"
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="tokens of a window (context length); each is predicted from those before it"
    )
    precision: Precision | None = Field(None, description="default fp32 on CPU, bf16 on GPU")
    deterministic: bool | None = Field(None, description="default true on CPU, false on GPU")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="null: no clipping")
    gradient_checkpointing: bool = False
    freeze: list[str] = Field(
        default_factory=list, description="patterns of parameters that are not trained, e.g. '*embed_tokens*'"
    )
    nproc: Positive | None = Field(None, description="ranks on this machine; default its GPUs, else 1")
    threads_per_rank: Positive | None = Field(None, description="CPU threads a training rank; default cores ÷ nproc")
    peak_flops: Annotated[float, Field(gt=0)] | None = Field(
        None, description="operations/s of a rank's device at best, for MFU; default known for many GPUs in 16 bits"
    )
    callbacks: list[str] = Field(
        default_factory=list, description="classes of your own called around steps: module:Class or FILE.py:Class"
    )
    callbacks_may_fail: bool = Field(False, description="true: one that raises is left out, with a caution")
    baseline: Path | None = Field(
        None,
        description="a run with the same data, seed and batch; "
        "TensorBoard shows the paired difference of training losses against it",
    )

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    reference: ReferenceSettings = ReferenceSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    model: ModelSettings
    batch: BatchSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: LoraSettings = LoraSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    zero: ZeroSettings = ZeroSettings()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="anything else of DeepSpeed's, passed through")
    checkpoint: CheckpointSettings = CheckpointSettings()
    snapshot: SnapshotSettings = SnapshotSettings()
    twins: TwinSettings = TwinSettings()
    stop_when: StopSettings = StopSettings()
    guards: GuardSettings = GuardSettings()
    ema: EmaSettings = EmaSettings()
    eval: EvalSettings = EvalSettings()
    launch: LaunchSettings = LaunchSettings()

    @field_validator("steps", mode="before")
    @classmethod
    def null_steps_are_open(cls, value: Any) -> Any:
        return 0 if value is None else value

    @field_validator("max_time")
    @classmethod
    def max_time_is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds_of(value):
            raise ValueError("should be a time such as 3h, 90m, 1h30m or 2d")
        return value

    @field_validator("name")
    @classmethod
    def name_is_a_folder(cls, value: str) -> str:
        if not NAME_PATTERN.fullmatch(value):
            raise ValueError("use up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit")
        return value

    @property
    def packing(self) -> str:
        """How documents come into windows."""
        return self.data.packing or PACKINGS[self.objective.name][0]

    @property
    def run_dir(self) -> Path:
        return self.run.dir or Path("runs") / self.name

    @property
    def data_dir(self) -> Path:
        return self.data.dir or Path("data") / self.name

    @property
    def reference_dir(self) -> Path:
        return self.eval.reference or self.data_dir / "reference"
