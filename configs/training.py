"""What a training is told: objective, batch, optimizer, schedule, guards; and the base of all settings.

`configs.schema` puts these together with the rest. Nothing here imports torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Precision = Literal["fp32", "amp", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

# A run's or data set's name becomes a folder, a TensorBoard run and (later) a job name.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, and settings do not change once they are read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings model that a field holds, if it is a section."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


# How documents may come into the windows of an objective; the first is what they do unless the settings say otherwise.
PACKINGS = {
    "causal": ("stream", "documents", "none"),
    "masked": ("stream",),
    "instruct": ("documents", "none"),
    "classify": ("none",),
}
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)(?:m|min))?(?:(\d+)s?)?")


def seconds_of(time: str) -> int | None:
    """Seconds of a time such as 3h, 90m, 1h30m, 2d or 3600; None where it is none."""
    found = _TIME.fullmatch(time.replace(" ", ""))
    if found is None or not time.strip():
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


class ObjectiveSettings(Settings):
    """What is learnt, and by which loss; one file each under trainer/objectives/."""

    name: Literal["causal", "masked", "instruct", "classify"] = Field(
        "causal",
        description="causal: each token from those before it; masked: hidden tokens from both sides; instruct: what "
        "the assistant says in conversations; classify: a label of each text",
    )
    mask_ratio: Fraction = Field(0.15, description="masked: the part of a window's tokens that is asked for")
    whole_words: bool = Field(False, description="masked: all tokens of a word are asked for, or none")
    problem: Literal["single", "several", "regression"] = Field(
        "single", description="classify: one label a text, several of them, or a number"
    )
    labels: list[str] | None = Field(None, description="classify: all there may be, in order; null: those in the data")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="classify: balanced: rare labels count for more in training, each as much as any other"
    )


class BatchSettings(Settings):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    global_: Count = Field(0, alias="global", description="windows (sequences) of one optimizer step, over all ranks")
    micro: Positive = Field(8, description="most windows a rank takes at once; accumulation follows")
    accumulation: Positive | None = Field(
        None, description="in place of global: micro-batches of a rank in a step; global = micro × these × ranks"
    )


class OptimizerSettings(Settings):
    name: Literal["adamw", "adam"] = Field("adamw", description="adamw (decoupled weight decay) or adam")
    lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices only, not on norms and biases")
    no_decay: list[str] = Field(
        default_factory=list, description="patterns of further parameters without weight decay, e.g. '*embed_tokens*'"
    )


class LoraSettings(Settings):
    """Adapters of low rank that are trained in place of the weights (Hu et al., arXiv 2106.09685), by peft."""

    r: Positive | None = Field(None, description="their rank; null: the weights themselves are trained")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="they count alpha ÷ r; default alpha = 2·r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | list[str] = Field(
        "all-linear", description="last names of the layers that get one, e.g. [q_proj, v_proj]; all-linear: each"
    )


class StageSettings(Settings):
    """A stage of a schedule in stages."""

    steps: Positive = Field(..., description="how long it is")
    to: Annotated[float, Field(ge=0)] = Field(..., description="learning rate ÷ peak at its end")
    shape: Literal["linear", "cosine"] = Field("linear", description="of the way there")


class ScheduleSettings(Settings):
    name: Literal[
        "cosine",
        "linear",
        "constant",
        "wsd",
        "inverse_sqrt",
        "polynomial",
        "cyclical",
        "cosine_restarts",
        "stages",
    ] = Field("cosine", description="see it drawn: vernier plan CONFIG --schedule")
    warmup_steps: Count = Field(0, description="steps of linear warm-up")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="in place of warmup_steps: the part of all steps that warms up"
    )
    min_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="last learning rate ÷ peak")
    steps: Positive | None = Field(None, description="that it is drawn over, if training shall end earlier; null: all")
    decay_ratio: Fraction | None = Field(None, description="wsd: the last part of all steps, which decays; default 0.1")
    power: Annotated[float, Field(gt=0)] | None = Field(None, description="polynomial: its power; default 2")
    cycles: Positive | None = Field(None, description="cyclical, cosine_restarts: how many; default 4")
    stages: list[StageSettings] | None = Field(
        None, description="stages: one after the other, each {steps, to, shape}; to: rate ÷ peak at its end"
    )


class ZeroSettings(Settings):
    stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO: shard 1 optimizer, 2 + gradients, 3 + weights")
    offload: Literal["none", "cpu"] = Field("none", description="cpu: optimizer state lives in host memory")


class TwinSettings(Settings):
    """Twins that `vernier train` trains on its ranks once a run is done; see `vernier twin`."""

    count: Count = Field(0, description="twins that measure training noise, once a run of `vernier train` is done")
    steps: Positive = Field(200, description="steps each makes, up to the run's last; that checkpoint is kept for them")


class EmaSettings(Settings):
    decay: Fraction | None = Field(
        None, description="e.g. 0.999: snapshots also hold the moving average of the weights (in ema/); null: none"
    )


class GuardSettings(Settings):
    non_finite: Positive = Field(
        3, description="batches in a row without a finite gradient, after which training goes back and passes over them"
    )
    spike_z: Annotated[float, Field(gt=0)] | None = Field(
        8.0, description="a loss so many robust standard deviations above recent steps is a spike; null: not looked for"
    )
    spike_steps: Annotated[int, Field(ge=16)] = Field(128, description="recent steps that a loss is held against")
    on_spike: Literal["log", "skip"] = Field("log", description="skip: make no update (the host waits for each loss)")
    on_out_of_memory: Literal["adapt", "fail"] = Field(
        "adapt", description="adapt: halve the micro-batch, then checkpoint activations, and go on"
    )
    hang_s: Annotated[float, Field(ge=1)] = Field(
        900.0, description="seconds without a sign of progress after which training ends, naming the rank that hangs"
    )


class StopSettings(Settings):
    """When a run ends before its last step, by its scores on the reference set."""

    gain_below: str | None = Field(
        None, description="e.g. 0.1%: once the gain over the last `looks` scores is below it, error and all"
    )
    looks: Annotated[int, Field(ge=2)] = Field(3, description="scores over which gain_below looks back")
    patience: Positive | None = Field(
        None, description="once so many scores are not below the best; by their means alone, so often wrong"
    )

    @field_validator("gain_below")
    @classmethod
    def gain_is_percent(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(\.\d+)? ?%", value):
            raise ValueError("should be percent, such as 0.1%")
        return value

    @property
    def margin(self) -> float | None:
        """`gain_below` in percent."""
        return None if self.gain_below is None else float(self.gain_below.rstrip(" %"))

    @property
    def asked(self) -> bool:
        return self.gain_below is not None or self.patience is not None
