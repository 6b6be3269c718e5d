"""Vernier from Python: five functions, which the command line's verbs are a thin skin over.

    from launcher.api import configs, prepare, train, score, compare

Each raises what the command would say: `configs.errors.VernierError`, of which `ConfigError` is about settings and
`DataError` about files. docs/python.md has an example.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.console import console
from configs.errors import VernierError
from configs.load import load_config, with_absolute_paths
from configs.run.directory import RunDir
from configs.schema import Config
from launcher.compare.options import Options
from launcher.compare.results import Result, compare_targets
from launcher.options import Resume

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Trained", "compare", "configs", "prepare", "score", "train"]


def configs(source: str | Path = "demo", *overrides: str) -> Config:
    """Settings of a YAML file or a shipped recipe, checked; paths in them are absolute. They do not change.

    Args:
        overrides: as on the command line, such as `"steps=100"` or `"optimizer.lr=3e-4"`.

    Raises:
        ConfigError: what is wrong, a line each.
    """
    return with_absolute_paths(load_config(str(source), list(overrides)))


def prepare(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Prepares the data and the reference set of a config, or finds them there; gives what `dataset.json` says.

    Args:
        fresh: anew; what is there moves to NAME.old-TIME.

    Raises:
        ConfigError: a setting or source is wrong, or what is there was prepared with other settings.
        DataError: the source holds too little, or what is there is damaged.
    """
    from launcher.prepare import prepare_data

    return prepare_data(config, fresh=fresh)


@dataclass(frozen=True)
class Trained:
    """Where a training stands that was made here: `state` is done, or stopped where it was asked to."""

    run: Path
    state: str
    step: int


def train(
    config: Config, *, fresh: bool = False, extend: bool = False, force_resume: bool = False, wait: bool = True
) -> Trained:
    """Trains on this machine to the end, or goes on with the run that is there; checkpoints are scored as configured.

    Ctrl-C stops it with a checkpoint. Ranks are processes of their own, so this works from a notebook too.

    Args:
        fresh: the old run moves to NAME.old-TIME.
        extend: go on beyond the steps that it was started with.
        force_resume: go on with settings that may not change.
        wait: until all snapshots are scored.

    Raises:
        ConfigError: what was found wrong before a rank started, a line each.
        VernierError: the training failed; why.
    """
    from launcher.train.command import run_train

    how = Resume(fresh=fresh, extend=extend, force=force_resume)
    run_train(config, how, wait=wait, console=_people())
    run = RunDir(config.run_dir)
    state = run.read_state()
    if state.get("state") == "failed":
        failure = state.get("failure") or {}
        raise VernierError(f"{run.path}: {failure.get('error') or 'the training failed'}")
    return Trained(run.path, "done" if state.get("state") == "done" else "stopped", int(state.get("step") or 0))


def score(
    models: Sequence[str | Path],
    reference: str | Path,
    *,
    nproc: int = 1,
    threads: int = 1,
    dtype: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Scores Hugging Face model directories on a reference set over a rank-group here.

    Args:
        dtype: fp32 or bf16; default fp32 on CPU, bf16 on GPU.
        out: folder of the loss tables; default that of the run which a snapshot belongs to, else `losses/` here.
        force: also what has its table.

    Returns:
        For each model `model`, `table` (its file), `loss` and `se` (nats per token, clustered by document), `samples`.

    Raises:
        ConfigError, DataError: usage, or a model that cannot be scored on this set. Nothing is scored then.
    """
    from launcher.eval import EvalOptions, settled
    from launcher.eval import score as score_models

    asked = settled(EvalOptions(nproc=nproc, threads=threads, dtype=dtype or "", force=force), Path(reference))
    paths, folder = [Path(model) for model in models], None if out is None else Path(out)
    return score_models(paths, Path(reference), asked, out=folder, console=_people())


def compare(*targets: str | Path, **options: Any) -> Result:
    """Compares loss tables, snapshots, `RUN@STEP`s or runs: two of them, three and more, or one run along its steps.

    Args:
        options: as the command's: `power="0.01%"`, `by="source"`, `changed=10`, `training=True`, …

    Returns:
        A result with `to_json()`, `show(console)`, `rows()` and `plot(folder)`; of a pair and of a run also `gated`,
        the comparison that the verdict is about (`gated.verdict`, `gated.difference.percent`).

    Raises:
        ConfigError, DataError: usage, or nothing that can be compared.
    """
    from launcher.compare.options import check_options

    wanted, asked = [str(target) for target in targets], Options(**options)
    check_options(wanted, asked)
    return compare_targets(wanted, asked)


def _people() -> Console:
    return console(sys.stderr, soft_wrap=True)
