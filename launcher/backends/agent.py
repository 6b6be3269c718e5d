"""`python -m launcher.backends.agent MODULE ARGUMENT…`: starts a node's ranks, hands on signals, ends all if one fails.

torch's own agent, which torchrun runs too, with two things of ours. What ranks import is imported once, and the ranks
are forked from there: a node with eight GPUs reads torch from its file system once, not ten times. And where all ranks
are on one machine their store listens on loopback alone; torchrun's listens everywhere, and it unpickles what it holds.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from configs.console import BESIDE, open_streams
from configs.errors import VernierError
from configs.log_stream import log_to_file
from configs.own import put_first_for_children
from configs.process import end_at_once

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # without a handler the last two would kill the agent itself
LOOPBACK = "127.0.0.1"
TERM_GRACE_S = 5.0
PEOPLE = 9  # the number of the stream to people where a shell opens a rank's log; it has but ten
# What a rank comes to import on its way, by the module that it runs; else each would import it for itself. (pyarrow
# imports pandas wherever it is installed.)
IMPORTED: dict[str, tuple[str, ...]] = {
    "trainer": ("trainer.run", "torch.utils.tensorboard", "eval.scoring.evaluator", "pandas"),
    "eval": ("eval.scoring.once", "eval.scoring.evaluator", "pandas"),
}


@dataclass(frozen=True)
class RankGroup:
    """The ranks of one node, `nproc` times `python -m module arguments`, of which other nodes may have more.

    `patience_s`: ranks that were handed a signal are killed so many seconds later. `start`: fork or exec.
    """

    module: str
    arguments: tuple[str, ...]
    nproc: int
    patience_s: int = int(TERM_GRACE_S)
    nodes: int = 1
    node_rank: int = 0
    address: str = LOOPBACK
    port: int = 0
    start: str = "fork"

    def command(self, python: str = sys.executable) -> list[str]:
        """The command line that starts the agent of this node."""
        meeting = ["--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)]
        meeting += ["--master-addr", self.address, "--master-port", str(self.port)]
        return [
            *(python, "-m", "launcher.backends.agent", *(meeting if self.nodes > 1 else ())),
            *("--nproc-per-node", str(self.nproc), "--shutdown-timeout", str(self.patience_s)),
            *(("--start", self.start) if self.start != "fork" else ()),
            *(self.module, *self.arguments),
        ]


def why_not_fork() -> str:
    """What forbids to fork ranks from this process, "" where nothing does."""
    if sys.platform != "linux":
        return f"{sys.platform} does not fork with its libraries loaded"
    if threading.active_count() > 1:
        return f"{threading.active_count()} threads are running"
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return "CUDA has been initialised"
    with suppress(OSError):
        if any(os.path.realpath(f"/proc/self/fd/{fd}") == "/dev/nvidia-uvm" for fd in os.listdir("/proc/self/fd")):
            return "CUDA's driver has been opened"
    try:
        multiprocessing.get_context("fork").Event()
    except OSError as error:
        return f"semaphores cannot be made ({error}); is /dev/shm there?"
    return ""


def import_once(module: str, model_types: tuple[str, ...] = ()) -> None:
    """Imports all that ranks of `module` need, and initialises nothing: no CUDA, no process group, no threads.

    Args:
        model_types: kinds of Hugging Face models (`llama`) whose class is wanted.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask for GPUs must not open one
    with one_thread():
        import_module("torch.distributed.elastic.agent.server.local_elastic_agent")
        for name in modules_of(module):
            with suppress(Exception):  # only sooner; the rank says what is missing or broken
                import_module(name)
        with suppress(Exception):
            if module == "trainer":
                from trainer.engine.build import import_optimizers

                import_optimizers()
            for kind in model_types:
                import_model(kind)


@contextmanager
def one_thread() -> Iterator[None]:
    """Has numeric libraries that are loaded meanwhile start no threads, then or later: none would live on in a fork.

    To be held around the first import of torch by whoever will fork ranks.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


def modules_of(module: str) -> tuple[str, ...]:
    """What ranks of `module` import, the most of it."""
    return (f"{module}.__main__", *IMPORTED[module]) if module in IMPORTED else (module,)


def import_model(kind: str) -> None:
    """Imports the class of a kind of Hugging Face model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if CONFIG_MAPPING[kind] in AutoModelForCausalLM._model_mapping:  # its module has the other heads too
        AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[kind]]


def run(group: RankGroup) -> int:
    """Starts the ranks of this node and waits for their end; gives 0 where all ended well, else 1.

    Where a rank of a training did not, and could not say why, the run's state says what its log ends with.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from launcher.backends.first_ends import FirstEnds, tell_ends

    why = why_not_fork() if group.start == "fork" else f"--start is {group.start}"
    if why:
        print(f"ranks are not forked: {why}", file=sys.stderr, flush=True)
    if group.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it in a line a rank
    scratch = tempfile.TemporaryDirectory(prefix="vernier-agent-")  # torch's own would stay
    logs = logs_of(group)
    agent = FirstEnds(
        WorkerSpec(
            role="default",
            local_world_size=group.nproc,
            entrypoint="/bin/sh" if why else _rank,
            args=exec_rank(group, logs) if why else (group.module, group.arguments, logs),
            rdzv_handler=_meeting(group),
            max_restarts=0,
        ),
        logs_specs=DefaultLogsSpecs(log_dir=scratch.name),
        start_method="fork",
        shutdown_timeout=group.patience_s,
        logs=logs,
    )
    try:
        with scratch:
            result = agent.run()
    except SignalException as error:
        print(f"the agent ends: {error}", file=sys.stderr, flush=True)
        return 1
    if not result.is_failed():
        return 0
    tell_ends(group.module, group.arguments, agent)
    return 1


def logs_of(group: RankGroup) -> str | None:
    """Path of the logs of a group's ranks, {rank} for the rank; None where they have none, or none can be written."""
    try:
        tells = getattr(import_module(f"{group.module}.__main__"), "logs_of", None)
        logs = tells(list(group.arguments)) if tells else None
        if logs is not None:
            Path(logs).parent.mkdir(parents=True, exist_ok=True)
    except (VernierError, ImportError, OSError, SystemExit):  # each rank says it for itself
        return None
    return logs


def exec_rank(group: RankGroup, logs: str | None) -> tuple[str, ...]:
    """Arguments of the shell that makes a rank's log its output, as `_rank` does, and becomes the rank."""
    python = (sys.executable, "-u", "-m", group.module, *group.arguments)
    if logs is None:
        return ("-c", 'exec "$@"', "sh", *python)
    before, after = logs.split("{rank}")
    opened = f'exec {PEOPLE}>&2 >>"$0$RANK$1" 2>&1 && shift && export {BESIDE}={PEOPLE} && exec "$@"'
    return ("-c", opened, before, after, *python)


def _meeting(group: RankGroup) -> Any:
    """Where the ranks' store is: that of the first of several nodes, or of this node on loopback alone."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    meeting = StaticTCPRendezvous(group.address, group.port, group.node_rank, group.nodes, "vernier", 600)
    if group.nodes == 1:
        listener = socket.create_server((LOOPBACK, 0))  # of itself the store would listen everywhere
        meeting.master_addr, meeting.master_port = LOOPBACK, listener.getsockname()[1]
        meeting._store = TCPStore(
            LOOPBACK, meeting.master_port, 1, True, meeting.timeout, master_listen_fd=listener.detach()
        )
    return meeting


def _rank(module: str, arguments: tuple[str, ...], logs: str | None) -> None:
    """A rank, in the process that torch's agent has forked for it."""
    from eval.distributed.environment import forget

    if logs is not None:
        with suppress(OSError):  # a full disk, say; the rank says it
            beside = os.dup(2)
            log_to_file(Path(logs.replace("{rank}", os.environ["RANK"])))
            os.environ[BESIDE] = str(beside)
    unheard()
    forget()
    setproctitle(f"vernier rank {os.environ['RANK']}: python -m {module} {' '.join(arguments)}")
    main = getattr(import_module(module), "main", None) or import_module(f"{module}.__main__").main
    code = main(list(arguments))
    if code:
        raise SystemExit(code)


def unheard() -> None:
    """Takes back the signal handlers that a fork has of its parent."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)


def main(arguments: list[str] | None = None) -> int:
    """Runs the agent of a node; gives its exit code."""
    open_streams()
    put_first_for_children(os.environ)
    parser = argparse.ArgumentParser(prog="python -m launcher.backends.agent", description=__doc__)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--master-addr", default=LOOPBACK, help="where rank 0's node is reached")
    parser.add_argument("--master-port", type=int, default=29500)
    parser.add_argument("--shutdown-timeout", type=int, default=int(TERM_GRACE_S), metavar="SECONDS")
    parser.add_argument("--start", choices=["fork", "exec"], default="fork", help="how ranks are started")
    parser.add_argument("module", help="trainer or eval")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of each rank")
    asked = parser.parse_args(arguments)
    group = RankGroup(
        asked.module,
        tuple(asked.arguments),
        asked.nproc_per_node,
        asked.shutdown_timeout,
        asked.nnodes,
        asked.node_rank,
        asked.master_addr,
        asked.master_port,
        asked.start,
    )
    if group.start == "fork":
        import_once(group.module, model_types_of(group.arguments))
    return run(group)


def model_types_of(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of models that ranks with these arguments are about, as far as their config files tell."""
    from configs.errors import VernierError
    from configs.files.atomic import read_json
    from configs.load import load_config

    kinds = []
    for word in arguments:
        with suppress(VernierError, OSError, ValueError):
            if word.endswith(".yaml"):
                settings = load_config(word, []).model
                kinds.append(str(settings.type))
                word = str(settings.path or "")
            if (Path(word) / "config.json").is_file():
                kinds.append(str(read_json(Path(word) / "config.json").get("model_type")))
    return tuple(dict.fromkeys(kinds))


if __name__ == "__main__":
    end_at_once(main())
