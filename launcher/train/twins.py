"""`vernier twin`: makes a run's twins, trains them one after another, and says what they come to differ by."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError, DataError
from configs.files.atomic import clear_unfinished, partial_path
from configs.files.json_lines import read_lines
from configs.load import dump_config, load_config
from configs.run.directory import RunDir, open_run, step_name
from configs.schema import Config
from launcher.options import Resume
from launcher.text import say, typed
from launcher.watch.next_command import say_next

LONGEST = 1000  # steps, where none are asked for
SCORED_AFTER = (50, 200, 1000)  # steps since the split at which twins are scored besides where their run is


@dataclass(frozen=True)
class TwinsAsked:
    """Twins of a run. `at`: the step that they start from, 0 being the weights it began with; `steps`: how many each
    makes, None: to the run's end, at most a thousand; `train`: not only their folders are made."""

    count: int = 2
    at: int = 0
    steps: int | None = None
    train: bool = True


def run_twin(path: Path, asked: TwinsAsked, *, console: Console) -> int:
    """Makes and trains the twins that are not there yet; gives the exit code.

    Raises:
        ConfigError: no such step to start from, or none left to make.
    """
    from launcher.train.command import run_train

    run = open_run(path)
    if run.twin.is_file():
        raise ConfigError(f"{path}: is a twin itself; name the run that it is of")
    config = load_config(run.config)
    at = _split(run, config, asked.at)
    end = min(config.steps, at + (asked.steps or LONGEST))
    for number in range(1, asked.count + 1):
        twin = _make(run, config, at, end, number)
        say(
            console,
            f"twin {number} of {asked.count}: {run.path.name} from step {at} to {twin.steps}, in {twin.run_dir}",
        )
        if not asked.train:
            say_next(console, f"train {typed(twin.run_dir / 'config.yaml')}")
            continue
        code = run_train(twin, Resume(extend=True), wait=True, console=console)
        if code != EXIT_DONE:
            return code
    if asked.train:
        _say_noise(run, console)
    return EXIT_DONE


def after_training(config: Config, code: int, *, console: Console) -> int:
    """Trains the twins that a run's settings ask for, once it is done; gives the exit code of it all."""
    run, asked = RunDir(config.run_dir), config.twins
    if code != EXIT_DONE or not asked.count or run.twin.is_file():
        return code
    kept = [step for step in (0, *run.whole_steps(run.checkpoints)) if step <= max(0, config.steps - asked.steps)]
    return run_twin(run.path, TwinsAsked(asked.count, kept[-1], config.steps - kept[-1]), console=console)


def _split(run: RunDir, config: Config, asked: int) -> int:
    """The step that twins start from, if the run still has it."""
    kept = [0, *run.whole_steps(run.checkpoints)]
    if asked not in kept:
        there = ", ".join(map(str, kept))
        raise ConfigError(
            f"--at: {run.path} has no checkpoint of step {asked}; it has {there} (0: the start). "
            "checkpoint.keep_every keeps more of them"
        )
    if asked >= config.steps:
        raise ConfigError(f"--at: step {asked} is the last of {run.path}; there is nothing to train after it")
    return asked


def _make(run: RunDir, config: Config, at: int, end: int, number: int) -> Config:
    """Makes the folder of a twin, whole or not at all, with the run's settings and its checkpoint; gives its settings.

    One that is there goes on, to its own end or, if that is later, to `end`.
    """
    twin = RunDir(run.twins / f"{step_name(at)}.{number}")
    settings = _settings(run, config, twin, at, end)
    if twin.twin.is_file():
        there = load_config(twin.config)
        return settings if there.steps < end else there
    try:
        run.twins.mkdir(exist_ok=True)
        clear_unfinished(run.twins, f".{twin.path.name}.*")
        made = RunDir(partial_path(twin.path))
        made.path.mkdir()
        made.twin.write_text(json.dumps({"of": str(run.path.resolve()), "at": at, "number": number}))
        made.config.write_text(dump_config(settings))
        if (run.path / "adapted.json").is_file():  # positions that were passed over are so again
            shutil.copy2(run.path / "adapted.json", made.path)
        if at:
            made.checkpoints.mkdir()
            source = run.checkpoints / step_name(at)
            shutil.copytree(source, made.checkpoints / step_name(at), copy_function=_link)
            lines = [line for line in read_lines(run.metrics)[0] if line["step"] <= at]
            made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.path.rename(twin.path)
    except OSError as error:
        raise DataError(f"{twin.path}: cannot be made ({error.strerror or error})") from None
    return settings


def _settings(run: RunDir, config: Config, twin: RunDir, at: int, end: int) -> Config:
    """The run's own, but for where the twin lies, where it ends, and what is kept and scored of it."""
    scored = sorted({*config.snapshot.at, *(at + after for after in SCORED_AFTER)})
    return load_config(
        run.config,
        [
            f"run.dir={json.dumps(str(twin.path.absolute()))}",
            f"steps={end}",
            f"schedule.steps={config.schedule.steps or config.steps}",
            "checkpoint.keep=1",
            "twins.count=0",
            f"snapshot.at={json.dumps([step for step in scored if step <= end])}",
        ],
    )


def _link(source: str, copy: str) -> None:
    """A second name for a file that nobody writes to again; a copy where the disk has no such thing."""
    with suppress(OSError):
        os.link(source, copy)
        return
    shutil.copy2(source, copy)


def _say_noise(run: RunDir, console: Console) -> None:
    from eval.compare.twins import noise_of_run

    found = noise_of_run(run.path)
    for one in found.rows:
        say(
            console,
            f"  {one.since} steps after step {one.at}: scores of {one.runs} runs differ by {one.percent:.3g} % (sd)",
        )
    for line in found.problems:
        say(console, f"  caution: {line}", "yellow")
    say_next(console, f"compare {typed(run.path)}")
