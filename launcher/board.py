"""`vernier board`: TensorBoard over runs, on loopback, with the line that reaches it from elsewhere."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from configs.errors import EXIT_DONE, ConfigError, DataError, VernierError
from launcher.processes import last_lines, start


def run_board(runs: list[Path], *, port: int | None, console: Console) -> int:
    """Serves the runs' TensorBoard folders until Ctrl-C; gives TensorBoard's exit code."""
    chosen = runs or sorted(p.parent for p in Path("runs").glob("*/tensorboard"))
    if not chosen:
        raise DataError("board: no runs under runs/; name one: vernier board RUN")
    for run in chosen:
        if not (run / "tensorboard").is_dir():
            raise DataError(f"board: {run} has no tensorboard/ folder; is it a run directory?")
    names = [run.absolute().name for run in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"board: two runs are named {max(names, key=names.count)}; show them one at a time")
    port = port or free_port()
    folder = Path(tempfile.mkdtemp(prefix="vernier-board-"))
    for name, run in zip(names, chosen, strict=True):
        (folder / name).symlink_to((run / "tensorboard").absolute())
    logdir = chosen[0] / "tensorboard" if len(chosen) == 1 else folder
    console.print(f"TensorBoard of {', '.join(names)}: http://127.0.0.1:{port}/", markup=False, soft_wrap=True)
    console.print("from your own machine, first:", markup=False)
    console.print(f"  {tunnel(port)}", markup=False, soft_wrap=True)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "5"]
    try:
        process = start(command, dict(os.environ), folder / "tensorboard.log")
        stop_with(process)
        code = process.wait()
        if code > 0:
            said = last_lines(folder / "tensorboard.log")
            raise VernierError(f"board: TensorBoard ended with exit code {code}\n{said}")
        return EXIT_DONE  # asked to stop
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stop_with(process: subprocess.Popen[bytes]) -> None:
    """Has Ctrl-C and SIGTERM end the process, also where a shell started us with Ctrl-C ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: process.terminate())


def tunnel(port: int) -> str:
    """The ssh line that makes the board on this host reachable from a laptop."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return f"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{host}"


def free_port() -> int:
    """A port that is free now; 6006, TensorBoard's own, where it can be had."""
    for wanted in (6006, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError("board: no free port; give one with --port")
