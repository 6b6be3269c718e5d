"""`vernier plan`: what a run would need, before it is started."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from configs.console import waiting
from configs.errors import EXIT_DONE, ConfigError
from configs.load import load_config, resolve
from configs.schema import Config
from launcher.plan.estimate import Given, make_plan
from launcher.watch.next_command import say_next


def run_schedule(source: str, overrides: list[str], console: Console) -> int:
    """Draws the learning rate of a config, as text and as a PNG in this folder.

    Raises:
        ConfigError: the settings are wrong, or how many steps there are is not known.
    """
    config = load_config(source, overrides)
    check_steps(config)
    from launcher.plan.schedule import draw_schedule

    draw_schedule(config, Path(f"{config.name}-schedule.png"), console)
    return EXIT_DONE


def check_steps(config: Config) -> None:
    """Refuses a config whose steps follow from data that is not there.

    Raises:
        ConfigError: so it is.
    """
    if not config.steps:
        raise ConfigError(
            f"epochs: {config.epochs:g}, and how many steps those are follows from the data, which is not in "
            f"{config.data_dir}; run `vernier prepare CONFIG` first, or give steps"
        )


def run_plan(source: str, overrides: list[str], *, json_out: bool, console: Console, given: Given | None = None) -> int:
    """Reckons what a config would take, and prints it.

    Raises:
        ConfigError: the settings are wrong, or the model's size cannot be told from them.
    """
    config = load_config(source, overrides)
    check_steps(config)
    if config.precision is None and config.launch.gpus_per_node:  # as it will be where the ranks are
        config = config.model_copy(update={"precision": "bf16"})
    with waiting("loading the libraries, and measuring what is not known"):
        from eval.scoring.models import quiet_libraries  # torch comes with it

        with quiet_libraries():
            plan = make_plan(resolve(config), given or Given())
    if json_out:
        from launcher.plan.report import to_json

        json.dump(to_json(plan), sys.stdout, indent=2)
        print()
    else:
        from launcher.plan.report import print_plan

        print_plan(plan, console)
        say_next(console, f"{'launch' if config.launch.nodes > 1 else 'train'} {shlex.join([source, *overrides])}")
    return EXIT_DONE
