"""Whether a node can import what ranks import: in a process of its own, which may crash or hang.

Versions that are installed say nothing about files that are cut short, or a library that is missing on one node.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE
from configs.process import end_at_once, kill_with_parent

SHOWN = 300  # characters of an error


def import_facts(run: Path, patience_s: float) -> dict[str, Any]:
    """`error`: the last line of what importing ended with; `slow_s`: it has not ended for so long. Else neither."""
    command = [sys.executable, "-m", "launcher.preflight.imports", str(run / "train-config.yaml")]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=patience_s,
            check=False,
            preexec_fn=kill_with_parent,
        )
    except subprocess.TimeoutExpired:
        return {"slow_s": round(patience_s)}
    if done.returncode == EXIT_DONE:
        return {}
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        said.append(f"ended by signal {-done.returncode}")
    return {"error": (said or [f"exit code {done.returncode}"])[-1][:SHOWN]}


def main(arguments: list[str]) -> int:
    """Imports as ranks that train do, the model's class included."""
    from launcher.backends.agent import import_model, model_types_of, modules_of, one_thread

    with one_thread():
        for name in ("torch", "transformers.models.auto.modeling_auto", "deepspeed", *modules_of("trainer")):
            import_module(name)
        for kind in model_types_of(tuple(arguments)):
            import_model(kind)
    return EXIT_DONE


if __name__ == "__main__":
    end_at_once(main(sys.argv[1:]))
