"""`vernier export`: a checkpoint of a run as a Hugging Face model directory of its own, with a model card.

Adapters are added to their base model's weights, unless they are wanted as they are.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from configs.errors import EXIT_DONE, ConfigError, DataError
from configs.files.atomic import MANIFEST, begin, verify
from configs.load import load_config
from configs.run.directory import RunDir, step_name

CARD = """\
# {name}

A snapshot of the run `{run}` after step {step}, trained with [Vernier](https://pypi.org/project/vernier-lm/).

| | |
|---|---|
| objective | {objective} |
| trained from | {start} |
| reference loss | {loss} |
| weights | {weights} |

The loss is the mean over a frozen reference set, with its standard error by document. How this checkpoint compares with
others of the run: `vernier compare {run}`.
"""


def run_export(source: str, out: Path, *, adapter: bool) -> int:
    """Writes the directory `out`; whole or not at all.

    Args:
        source: RUN (its best scored snapshot, else the last) or RUN@STEP.
        adapter: adapters stay what they are, in place of being added to the base's weights.

    Raises:
        ConfigError: there is no such run or snapshot, or `out` is there.
        DataError: the snapshot is damaged, or its base is not the one that it was trained beside.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out: {out} is there already; name a directory that is not")
    run, step, loss = _chosen(source)
    snapshot = run.snapshots / step_name(step)
    manifest = verify(snapshot, "snapshot")
    part = begin(out)
    try:
        adapted = (snapshot / "adapter_config.json").is_file()
        merges = adapted and not adapter
        if merges:
            _merged(run, snapshot, part)
        else:
            shutil.copytree(snapshot, part, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        config = load_config(run.config)
        what = f"an adapter of rank {config.lora.r}" if adapted else "all"
        (part / "README.md").write_text(
            CARD.format(
                name=config.name,
                run=run.path.name,
                step=step,
                objective=config.objective.name,
                start=config.model.path or f"scratch ({config.model.type})",
                loss=loss or "not scored",
                weights=f"{what}, {manifest['dtype']}{', added to those of the base' if merges else ''}",
            )
        )
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    print(f"step {step} of {run.path} is in {out}")
    return EXIT_DONE


def _chosen(source: str) -> tuple[RunDir, int, str]:
    """(run, step, its loss in words)."""
    name, at, number = source.rpartition("@")
    run = RunDir(Path(name if at else source))
    if not run.config.is_file():
        raise ConfigError(f"export: {run.path} is not a run directory (it has no config.yaml)")
    steps = run.whole_steps(run.snapshots)
    if not steps:
        raise ConfigError(f"export: {run.path} has no snapshot yet")
    from eval.compare.along_run import compare_run

    losses = {}
    try:
        found = compare_run(run.path)
        losses = {p.step: f"{p.side.loss:.4f} ± {p.side.se:.4f} {found.unit}" for p in found.checkpoints}
        best = found.best.step
    except DataError:  # nothing is scored
        best = steps[-1]
    step = best if not at else int(number) if number.isdigit() else None
    if step is None or step not in steps:
        raise ConfigError(f"export: {run.path} has no snapshot of step {number or step}; it has {_few(steps)}")
    return run, step, losses.get(step, "")


def _few(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]])


def _merged(run: RunDir, snapshot: Path, part: Path) -> None:
    from eval.reference.tokenizer import copy_tokenizer_files
    from eval.scoring.models import load_checked, quiet_libraries
    from trainer.model.build import kind_of

    with quiet_libraries():
        model = load_checked(kind_of(load_config(run.config)), snapshot, "fp32", False)
        model.save_pretrained(part)
    copy_tokenizer_files(snapshot, part)
