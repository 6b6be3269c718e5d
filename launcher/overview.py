"""`vernier` alone: what is in this folder (runs, configs, prepared data), and what may be typed next."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from configs.console import printable
from configs.errors import VernierError
from configs.run.directory import RunDir
from configs.yaml.text import parse_mapping
from launcher.text import new_table, print_table, say, typed

SHOWN = 8  # runs, and configs
NEEDED = ("model", "batch", "steps")  # by what a YAML file is known as a config
READ = 1 << 20  # bytes; no config is longer


def print_overview(console: Console) -> bool:
    """Shows the newest runs and the configs here, with the next useful command; gives whether there are any."""
    from launcher.watch.next_command import next_command
    from launcher.watch.run_status import all_runs, facts_of

    runs = sorted(all_runs(), key=_changed, reverse=True)
    configs = _configs()
    if not runs and not configs:
        return False
    found = []
    for run in runs[:SHOWN]:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found.append(facts_of(run))
    if found:
        table = new_table()
        for heading in ("run", "stands", "step", "reference loss"):
            table.add_column(heading, justify="left" if heading in ("run", "stands") else "right")
        for facts in found:
            loss = "" if facts.reference_loss is None else f"{facts.reference_loss:.4f}"
            step = f"{facts.step:,}" if facts.steps is None else f"{facts.step:,}/{facts.steps:,}"
            table.add_row(Text(typed(Path(facts.run))), Text(printable(facts.words)), step, loss)
        print_table(table, console)
    if len(runs) > len(found):
        say(console, f"{len(runs) - len(found)} runs more: vernier status")
    for at, path in enumerate(configs[:SHOWN]):
        say(console, f"{'' if at else 'config':9}{typed(path)}")
    newest = found[0] if found else None
    commands = [] if newest is None else [next_command(newest)]
    if configs:
        commands.append(_of_config(configs[0]))
    for at, command in enumerate(commands):
        say(console, f"{'' if at else 'next':9}vernier {command}")
    say(console, f"{'all':9}vernier --help")
    return True


def _changed(run: RunDir) -> float:
    try:
        return run.state.stat().st_mtime
    except OSError:
        return 0.0


def _configs() -> list[Path]:
    """The configs here, the last changed first."""
    here = [path for folder in (Path(), Path("configs")) for path in folder.glob("*.y*ml") if path.is_file()]
    found = []
    for path in here:
        with suppress(OSError, ValueError, VernierError):
            if path.stat().st_size <= READ and all(key in parse_mapping(path.read_text(), str(path)) for key in NEEDED):
                found.append(path)
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _of_config(path: Path) -> str:
    """What follows for a config: its data is prepared first."""
    from configs.load import load_config

    with suppress(VernierError):
        config = load_config(str(path), [])
        return f"{'train' if config.data_dir.is_dir() else 'prepare'} {typed(path)}"
    return f"prepare {typed(path)}"
