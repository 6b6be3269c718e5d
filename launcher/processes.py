"""Rank-groups as child processes: by torch's agent or mpirun, in a session of their own, dying with `vernier`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from configs.errors import ConfigError
from configs.files import open_to_write
from configs.parent import kill_with_parent
from configs.relay import ask_for_marks
from configs.schema import Config
from configs.secret_names import is_secret
from configs.terminal import is_lent, lend_terminal
from launcher.agent import TERM_GRACE_S, RankGroup, import_once, model_types_of, why_not_fork
from launcher.forks import fork

SAVE_PATIENCE_S = 600  # for ranks asked to stop: the save in flight, a step, a checkpoint, each with its fsync
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")  # ssh and mpirun would take a dash in front for an option
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


@dataclass(frozen=True)
class Local:
    """torch's agent on this machine. `start`: whether it and its ranks are forked from here, or exec'd."""

    nproc: int
    threads: int
    eval_nproc: int
    eval_threads: int
    start: str = "fork"
    name: str = "torchrun"
    training_log: str = "torchrun.log"
    marked: bool = False
    far: bool = False

    def train(self, arguments: list[str], logs: Path) -> Started:
        return start_here(*self.training(arguments), logs / self.training_log)

    def score(self, arguments: list[str], logs: Path) -> Started:
        return start_here(*self.scoring(arguments), logs / "eval-torchrun.log")

    def training(self, arguments: list[str]) -> tuple[RankGroup, dict[str, str]]:
        """(ranks, environment) of the training."""
        nproc, threads = self.nproc, self.threads
        return local_group(
            "trainer", arguments, nproc=nproc, threads=threads, patience_s=SAVE_PATIENCE_S, start=self.start
        )

    def scoring(self, arguments: list[str]) -> tuple[RankGroup, dict[str, str]]:
        """(ranks, environment) of the evaluator."""
        return local_group("eval", arguments, nproc=self.eval_nproc, threads=self.eval_threads, start=self.start)


@dataclass(frozen=True)
class Mpirun:
    """mpirun, on this machine or on `hosts`. `nproc`: ranks a host. `threads` None: what the cores of a host give.

    `names`: further variables of here that ranks on hosts are given.
    """

    nproc: int
    threads: int | None
    eval_nproc: int
    eval_threads: int
    hosts: tuple[str, ...] = ()
    eval_hosts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    name: str = "mpirun"
    training_log: str = "mpirun.log"
    marked: bool = True

    @property
    def far(self) -> bool:
        return bool(self.hosts)

    def train(self, arguments: list[str], logs: Path) -> Started:
        return start(*self.train_command(arguments), logs / self.training_log)

    def score(self, arguments: list[str], logs: Path) -> Started:
        return start(*self.score_command(arguments), logs / "eval-mpirun.log")

    def train_command(self, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """(command, environment) of the training."""
        return mpirun(
            "trainer",
            arguments,
            nproc=self.nproc,
            threads=self.threads,
            hosts=self.hosts,
            names=self.names,
            marked=True,
        )

    def score_command(self, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
        """(command, environment) of the evaluator."""
        nproc, threads = self.eval_nproc, self.eval_threads
        return mpirun("eval", arguments, nproc=nproc, threads=threads, hosts=self.eval_hosts, names=self.names)


def local_group(
    module: str,
    arguments: list[str],
    *,
    nproc: int,
    threads: int,
    patience_s: int = int(TERM_GRACE_S),
    start: str = "fork",
) -> tuple[RankGroup, dict[str, str]]:
    """(ranks, environment) of `nproc` times `python -m module` on this machine."""
    environment = rank_environment(threads)
    lend_terminal(environment)
    return RankGroup(module, tuple(arguments), nproc, patience_s, start=start), environment


def mpirun(
    module: str,
    arguments: list[str],
    *,
    nproc: int,
    threads: int | None,
    hosts: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    marked: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that starts `nproc` ranks of `python -m module` on this machine by MPI, or on each host.

    Args:
        names: variables of here that ranks on hosts are given besides the usual ones.
        marked: have ranks mark what they say to people (see `configs.relay`).

    Raises:
        ConfigError: there is no mpirun.
    """
    if shutil.which("mpirun") is None:
        raise ConfigError("mpirun is not on this machine's PATH; install Open MPI or MPICH, or use torchrun")
    environment = rank_environment(threads)
    if "RANK" in environment:
        for name in OWN_RANK:
            environment.pop(name, None)
    if marked:
        ask_for_marks(environment)
    else:
        environment.pop("VERNIER_TERMINAL", None)
    environment.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")  # more ranks than cores is the user's choice
    environment.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    for name in ("OMPI_MCA_hwloc_base_binding_policy", "PRTE_MCA_hwloc_default_binding_policy"):
        environment.setdefault(name, "none")  # else each rank has one core, whatever its threads
    environment.setdefault("I_MPI_PIN", "0")
    # It would look for GPUs by way of X displays, and wait for an answer for ever from display 6, whose port, 6006, is
    # TensorBoard's.
    environment.setdefault("HWLOC_COMPONENTS", "-gl")
    if hosts:
        where = _over_hosts(hosts, nproc, environment, names)
    else:
        where = ["-n", str(nproc)]
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return ["mpirun", *where, sys.executable, "-m", module, *arguments], environment


def _over_hosts(hosts: tuple[str, ...], each: int, environment: dict[str, str], names: tuple[str, ...]) -> list[str]:
    """mpirun's options for so many ranks on each host, with our part of the environment."""
    total = ["-n", str(each * len(hosts))]
    if _is_hydra():
        return [*total, "-ppn", str(each), "-hosts", ",".join(hosts), "-genvall"]
    environment["PRTE_MCA_rmaps_default_mapping_policy"] = f"ppr:{each}:node:oversubscribe"
    words = [*total, "--host", ",".join(f"{host}:{each}" for host in hosts), "--map-by", f"ppr:{each}:node"]
    known = [*names, "VERNIER_TERMINAL"]
    for name in dict.fromkeys([*carried(environment), *(name for name in known if name in environment)]):
        words += ["-x", name]  # its value goes over mpirun's own connection, and stands in no command line
    return words


def _is_hydra() -> bool:
    """Whether mpirun is MPICH's or Intel's rather than Open MPI's."""
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=30, check=False)
    return bool(re.search(r"HYDRA|Intel\(R\) MPI", done.stdout + done.stderr))


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


def read_hosts(given: str) -> tuple[str, ...]:
    """The hosts of `--hosts`: names with commas between, or a file with one a line, as mpirun takes it.

    Slots (`a slots=4`, `a:4`) are passed over: how many ranks a host has is a setting.

    Raises:
        ConfigError: no host, a name that cannot be one, or one twice.
    """
    path = Path(given)
    if path.is_file():
        rows = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [row[0] for row in rows if row]
    else:
        names = [name.strip() for name in given.split(",") if name.strip()]
    hosts = tuple(name.partition(":")[0] for name in names)
    if not hosts:
        raise ConfigError(f"--hosts: {given!r} names no host; expected a,b,c or a file with one host a line")
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ConfigError(f"--hosts: {host!r} is no host (nor a file that is there); expected a,b,c or a file")
        if hosts.count(host) > 1:
            raise ConfigError(f"--hosts: {host} is there twice; ranks a host are launch.ranks_per_node")
    return hosts


def divided(hosts: tuple[str, ...], config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(hosts to train on, hosts to score on): the first `launch.nodes`, then `eval.nodes` of those left, else the first
    again.

    Raises:
        ConfigError: there are not so many, or more than anybody asked for.
    """
    nodes, eval_nodes = config.launch.nodes, config.eval.nodes
    evaluator = config.eval.placement in ("separate", "het")
    used = nodes + (eval_nodes if evaluator else 0)
    if len(hosts) < nodes:
        raise ConfigError(f"--hosts: {len(hosts)} are given, launch.nodes is {nodes}")
    if len(hosts) > used and "nodes" not in config.launch.model_fields_set:
        raise ConfigError(f"launch.nodes: say how many of the {len(hosts)} hosts train; it is {nodes} unless set")
    left = hosts[nodes:]
    if not evaluator:
        return hosts[:nodes], ()
    if not left and eval_nodes == 1:
        return hosts[:nodes], hosts[:1]
    if len(left) < eval_nodes:
        raise ConfigError(
            f"--hosts: {len(hosts)} are given, launch.nodes + eval.nodes are {used}; "
            "give so many, or eval.placement=inline"
        )
    return hosts[:nodes], left[:eval_nodes]


def start_here(group: RankGroup, environment: dict[str, str], log: Path) -> Started:
    """Starts a rank-group on this machine with its output appended to `log`: forked where that can be had."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if group.start == "fork":
        import_once(group.module, model_types_of(group.arguments))
        if not why_not_fork():
            return fork(group, environment, log)
    return start(group.command(), environment, log)


def start(command: list[str], environment: dict[str, str], log: Path, *, held: bool = False) -> subprocess.Popen[bytes]:
    """Starts a rank-group with its output appended to `log`.

    In a session of its own, so that Ctrl-C reaches `vernier` alone, which then asks for an orderly stop; and killed by
    the kernel if `vernier` dies without a word.

    Args:
        held: its stdin is a pipe, which ends when `vernier` does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output: IO[bytes]
    # Lent to the ranks, see configs.terminal; mpirun would read from it.
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
