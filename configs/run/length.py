"""How long a run is, in people's words, as the numbers that training goes by: epochs, accumulation, hours.

Each is resolved once, where a config is read. Nothing of it is left for training to reckon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from configs.devices import gpu_count
from configs.errors import DataError
from configs.run.facts import read_dataset_facts
from configs.schema import Config


def training_windows(facts: dict[str, Any], config: Config) -> int:
    """Training windows of prepared data (`facts`: its `dataset.json`) as a config cuts or packs it."""
    train = facts["train"]
    if config.packing != "stream":
        return int(train["windows"])
    return max(0, (int(train["tokens"]) - 1) // config.sequence_length)


def planned_ranks(config: Config) -> int:
    """The training ranks that a config names, on all its nodes together; those of this machine where it names none."""
    launch = config.launch
    return launch.nodes * (launch.ranks_per_node or launch.gpus_per_node or config.nproc or gpu_count() or 1)


def with_lengths(config: Config) -> Config:
    """`config` with `batch.global` from its accumulation, and `steps` from its epochs where its data is prepared.

    What was given in the other words is null then. `steps` stays 0 while the data is not there.
    """
    batch = config.batch
    if batch.accumulation is not None:
        whole = batch.global_ or batch.micro * batch.accumulation * planned_ranks(config)
        batch = batch.model_copy(update={"global_": whole, "accumulation": None})
        config = config.model_copy(update={"batch": batch})
    if config.epochs is None:
        return config
    try:
        facts = read_dataset_facts(config.data_dir / "dataset.json")
    except DataError:
        return config
    steps = max(1, math.ceil(config.epochs * training_windows(facts, config) / config.batch.global_ - 1e-9))
    return config.model_copy(update={"steps": steps, "epochs": None})


def length_problems(config: Config) -> Iterator[str]:
    """What is missing, or given twice and not the same, a line each; for a config as it was written."""
    batch = config.batch
    if config.epochs is not None and config.steps:
        yield f"epochs: {config.epochs:g}, and steps: {config.steps} is given as well; give one of the two"
    if config.epochs is None and not config.steps:
        yield "steps: missing, or 0; give the optimizer steps, or epochs: the passes over the data"
    if batch.accumulation is None and not batch.global_:
        yield "batch.global: missing, or 0; give the windows of a step, or batch.accumulation: the micro-batches of one"
    if batch.accumulation is not None and batch.global_:
        ranks = planned_ranks(config)
        found = batch.micro * batch.accumulation * ranks
        if found != batch.global_:
            yield (
                f"batch.accumulation: {batch.accumulation} × batch.micro {batch.micro} × {ranks} ranks are {found} "
                f"windows a step, and batch.global is {batch.global_}; leave one of the two out"
            )
    if config.schedule.warmup_ratio is not None and config.schedule.warmup_steps:
        yield (
            f"schedule.warmup_ratio: {config.schedule.warmup_ratio:g}, and schedule.warmup_steps: "
            f"{config.schedule.warmup_steps} is given as well; give one of the two"
        )
