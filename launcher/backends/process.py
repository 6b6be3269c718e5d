"""Rank-groups as child processes: by torch's agent or mpirun, in a session of their own, dying with `vernier`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from configs.console import is_lent
from configs.files.opening import open_to_write
from configs.process import kill_with_parent
from configs.secret_names import is_secret
from launcher.backends.agent import TERM_GRACE_S

# Who this process is, if it is itself a rank of something (a notebook's pod, say): not for ranks that it starts.
OWN_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
# What other machines' ranks are given of this environment.
CARRIED = re.compile(
    r"(NCCL|GLOO|UCX|FI|OMP|HF|TORCH|VERNIER|DS)_.*"
    r"|(CUBLAS_WORKSPACE_CONFIG|PYTHONSAFEPATH|PYTHONUNBUFFERED|TOKENIZERS_PARALLELISM)"
)
OURS_HERE = (
    "VERNIER_SSH_OPTIONS",
    "VERNIER_TERMINAL",
    "VERNIER_TERMINAL_ENCODING",
)  # about this machine and this terminal


class Started(Protocol):
    """A rank-group that was started: a process, or one on each machine."""

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


class Starter(Protocol):
    """Starts a run's rank-groups. Both methods give the process, whose output goes to files in `logs`."""

    @property
    def name(self) -> str: ...
    @property
    def training_log(self) -> str:
        """File in `logs` with the training's output; with `marked`, what ranks say to people is in it."""
        ...

    @property
    def marked(self) -> bool: ...
    @property
    def far(self) -> bool:
        """Whether ranks may be on other machines."""
        ...

    def train(self, arguments: list[str], logs: Path) -> Started: ...
    def score(self, arguments: list[str], logs: Path) -> Started: ...


def carried(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that ranks on other machines are given, none of which looks like a secret."""
    named = environment.items()
    names = (name for name, value in named if CARRIED.fullmatch(name) and not is_secret(name, value))
    return sorted(name for name in names if name not in OURS_HERE)


def rank_environment(threads: int | None) -> dict[str, str]:
    """What every rank-group is started with. `threads` None: what this machine has set for itself is left out."""
    return {
        **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        **({"OMP_NUM_THREADS": str(threads)} if threads is not None else {}),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a folder here that is named like a module of ours is not ours (Python 3.11)
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(command: list[str], environment: dict[str, str], log: Path, *, held: bool = False) -> subprocess.Popen[bytes]:
    """Starts a rank-group with its output appended to `log`.

    In a session of its own, so that Ctrl-C reaches `vernier` alone, which then asks for an orderly stop; and killed by
    the kernel if `vernier` dies without a word.

    Args:
        held: its stdin is a pipe, which ends when `vernier` does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output: IO[bytes]
    # Lent to the ranks, see configs.console; mpirun would read from it.
    stdin = sys.stderr if is_lent(environment) else subprocess.DEVNULL
    with os.fdopen(open_to_write(log, os.O_WRONLY | os.O_APPEND), "ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE if held else stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )


def end(process: Started, grace_s: float = TERM_GRACE_S) -> None:
    """Ends a rank-group: SIGTERM to torchrun, and SIGKILL if it does not go. Its ranks die with it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ask_to_stop(starter: Starter, process: Started, *, interrupt: bool) -> None:
    """Has the ranks stop with a checkpoint by a signal, where no file can be written."""
    if starter.name == "mpirun":  # it hands these on as they are; at SIGTERM it kills its ranks a second later
        process.send_signal(signal.SIGUSR1)
    else:
        process.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, for an error that nobody else told."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
