"""What a launch would start, as plain data: the rank-groups of a run, their nodes, ranks and commands.

Backends (`launcher.backends`) turn it into what they submit. Nothing is asked of the machine here: it launches, and
others run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from configs.errors import ConfigError
from configs.load import batch_problems, load_config, resolve, with_absolute_paths
from configs.run.directory import RunDir
from configs.schema import Config
from launcher.jobs.site import Site

SAVE_PATIENCE_S = 600  # for ranks asked to stop: the save in flight, a step, a checkpoint, each with its fsync

EARLY_S = 60  # man sbatch: a signal may come up to a minute earlier than asked


@dataclass(frozen=True)
class Component:
    """A rank-group: on each of `nodes` one torchrun with `ranks_per_node` ranks of `python -m module arguments`."""

    name: Literal["train", "eval"]
    module: str
    arguments: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_node: int
    threads: int | None  # CPU threads a rank; None: what its cores give, told there
    patience_s: int  # for ranks to end once they are asked to

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class JobPlan:
    """All rank-groups of a run. Paths are absolute."""

    config: Config  # paths absolute; what hangs on the machine of the ranks is left open
    site: Site
    work_dir: Path
    train: Component
    eval: Component | None  # None: nobody scores beside the training
    members: int = 0  # of a sweep whose folder is config.run_dir; 0: a single run
    at_once: int = 0  # members of a sweep that may run side by side; 0: all

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.run_dir)

    @property
    def components(self) -> Iterator[Component]:
        yield self.train
        if self.eval is not None:
            yield self.eval

    @property
    def het(self) -> bool:
        """Whether both rank-groups are parts of one heterogeneous job."""
        return self.eval is not None and self.config.eval.placement == "het"


def make_plan(source: str, overrides: list[str], site: Site, flags: tuple[str, ...] = ()) -> JobPlan:
    """The plan of a config.

    Args:
        flags: of `python -m trainer`, such as --extend.

    Raises:
        ConfigError: the settings are wrong, or do not add up over the ranks.
    """
    config = with_absolute_paths(load_config(source, overrides))
    return plan_of(config, site, flags)


def plan_of(config: Config, site: Site, flags: tuple[str, ...] = ()) -> JobPlan:
    """As `make_plan`, of settings that are read already.

    Raises:
        ConfigError: the settings do not add up over the ranks, or leave no time to train.
    """
    asked = config.launch
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else site.gpus_per_node or 0
    ranks = asked.ranks_per_node or gpus or config.nproc or 1
    if gpus and ranks > gpus:
        raise ConfigError(f"launch.ranks_per_node: {ranks} ranks on {gpus} GPUs a node; each rank needs one of its own")
    problems = list(batch_problems(config, asked.nodes * ranks))
    if problems:
        raise ConfigError(*problems)
    config = config.model_copy(update={"nproc": ranks})
    limit = time_limit_s(asked.time)
    if limit < asked.signal_s + EARLY_S:
        raise ConfigError(
            f"launch.signal_s: {asked.signal_s} s before a time limit of {limit} s leave no time to train (Slurm's "
            f"signal may come {EARLY_S} s early); set launch.signal_s below {max(1, limit - EARLY_S)}, or a longer "
            "launch.time"
        )
    run = RunDir(config.run_dir)
    cpus = asked.cpus_per_rank or site.cpus_per_rank
    train = Component(
        name="train",
        module="trainer",
        arguments=(*flags, str(run.path / "train-config.yaml")),
        nodes=asked.nodes,
        ranks_per_node=ranks,
        gpus_per_node=gpus,
        cpus_per_node=ranks * (cpus or config.threads_per_rank or 1),
        threads=config.threads_per_rank or cpus,
        patience_s=SAVE_PATIENCE_S,
    )
    scored_beside = config.eval.is_beside
    nproc, threads = config.eval.nproc, config.eval.threads_per_rank
    beside = replace(
        train,
        name="eval",
        module="eval",
        arguments=(str(run.path / "eval-config.yaml"),),
        nodes=config.eval.nodes,
        ranks_per_node=nproc,
        gpus_per_node=nproc if gpus else 0,
        cpus_per_node=nproc * max(cpus or 1, threads),
        threads=threads,
        patience_s=5,
    )
    return JobPlan(config, site, Path.cwd(), train, beside if scored_beside else None)


def time_limit_s(text: str) -> int:
    """Seconds of a time as Slurm takes it (man sbatch, --time)."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def as_checked(config: Config) -> Config:
    """Settings to hold against what is there. What hangs on the machine of the ranks is as the run has it already."""
    run = RunDir(config.run_dir)
    if config.precision is None and run.config.is_file():
        config = config.model_copy(update={"precision": load_config(run.config).precision})
    return resolve(config, elsewhere=True)
