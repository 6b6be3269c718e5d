"""What `vernier train` shows at the end: how the run's checkpoints compare, and where everything is."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console

from configs.rundir import RunDir


def print_scores(run: RunDir) -> None:
    """The table of the run's scores on stdout, and paths; nothing where none was scored."""
    from eval.along import compare_run
    from launcher.compare import print_run_table

    if not any(run.losses.glob("*/step-*.parquet")):
        return
    out = Console(highlight=False)
    print_run_table(compare_run(run.path), out)
    out.print(f"\nrun        {_shown(run.path)}", markup=False, soft_wrap=True)
    out.print(f"snapshots  {_shown(run.snapshots)}", markup=False, soft_wrap=True)
    out.print(f"losses     {_shown(run.losses)}", markup=False, soft_wrap=True)
    out.print(f"watch it   {_command()} board {_shown(run.path)}", markup=False, soft_wrap=True)


def _shown(path: Path) -> str:
    """A path as one would type it here, quoted for a shell."""
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def _command() -> str:
    """How one would type `vernier` here: after `make demo` the environment is not active."""
    own = Path(sys.executable).with_name("vernier")
    return _shown(own) if shutil.which("vernier") is None and own.is_file() else "vernier"
