"""Rank-groups as child processes: torchrun on this machine's loopback, in its own session, dying with `vernier`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

from configs.errors import ConfigError
from configs.parent import kill_with_parent
from configs.terminal import is_lent, lend_terminal

TERM_GRACE_S = 5.0
SAVE_PATIENCE_S = 600  # for ranks asked to stop: the save in flight, a step, a checkpoint, each with its fsync
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # without its handler the last two kill torchrun itself


def torchrun(
    module: str, arguments: list[str], *, nproc: int, threads: int, patience_s: int = int(TERM_GRACE_S)
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that starts `nproc` ranks of `python -m module` on this machine.

    Args:
        patience_s: torchrun hands a signal on to its ranks, and kills those that have not ended so many seconds later.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(nproc)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("--signals-to-handle", SIGNALS, "--shutdown-timeout", str(patience_s)),
        *("--module", module),
        *arguments,
    ]
    environment = _environment(threads)
    lend_terminal(environment)
    return command, environment


def mpirun(module: str, arguments: list[str], *, nproc: int, threads: int) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that starts `nproc` ranks of `python -m module` on this machine by MPI.

    Raises:
        ConfigError: there is no mpirun.
    """
    if shutil.which("mpirun") is None:
        raise ConfigError("--by: mpirun is not on this machine's PATH; install Open MPI or MPICH, or use torchrun")
    command = ["mpirun", "-n", str(nproc), sys.executable, "-m", module, *arguments]
    environment = _environment(threads)
    environment.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")  # more ranks than cores is the user's choice
    environment.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    return command, environment


def _environment(threads: int) -> dict[str, str]:
    """What every rank-group on this machine is started with."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a rank-group with its output appended to `log`.

    In a session of its own, so that Ctrl-C reaches `vernier` alone, which then asks for an orderly stop; and killed by
    the kernel if `vernier` dies without a word.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output: IO[bytes]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            # Lent to the ranks, see configs.terminal; mpirun would read from it.
            stdin=sys.stderr if is_lent(environment) else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )


def end(process: subprocess.Popen[bytes], grace_s: float = TERM_GRACE_S) -> None:
    """Ends a rank-group: SIGTERM to torchrun, and SIGKILL if it does not go. Its ranks die with it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, for an error that nobody else told."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
