"""Ranks that mpirun starts, here or over hosts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from configs.load import batch_problems, resolve, with_absolute_paths
from configs.log_stream import ask_for_marks
from configs.schema import Config
from launcher.backends.hosts import divided
from launcher.backends.process import OWN_RANK, Started, carried, rank_environment, start

# For hwloc, which would look for GPUs by way of X displays, and wait for an answer for ever from display 6, whose port,
# 6006, is TensorBoard's.
NO_DISPLAYS = "-gl"


def with_mpirun(config: Config, hosts: tuple[str, ...], names: tuple[str, ...] = ()) -> tuple[Config, Config, Mpirun]:
    """(settings to check, settings that mpirun's ranks are given, what starts them).

    On hosts what hangs on a machine (precision, threads) stays open: it is settled there.

    Raises:
        ConfigError: there is no mpirun, or hosts and settings do not add up.
    """
    from launcher.jobs.plan import as_checked

    if shutil.which("mpirun") is None:
        raise ConfigError("--on: mpi: mpirun is not on this machine's PATH; install Open MPI or MPICH, or use local")
    asked = config.launch
    each = asked.ranks_per_node or asked.gpus_per_node or config.nproc
    if not hosts and max(asked.nodes, config.eval.nodes) > 1:
        raise ConfigError("--on: mpi: name the machines of launch.nodes and eval.nodes: --hosts a,b,c or --hosts FILE")
    train, score = divided(hosts, config) if hosts else ((), ())
    given = (
        with_absolute_paths(config).model_copy(update={"nproc": each or 1}) if hosts else resolve(config, nproc=each)
    )
    nproc = given.nproc or 1
    problems = list(batch_problems(given, asked.nodes * nproc))
    if problems:
        raise ConfigError(*problems)
    threads, eval_threads = given.threads_per_rank, given.eval.threads_per_rank
    checked = as_checked(given) if hosts else given
    return checked, given, Mpirun(nproc, threads, given.eval.nproc, eval_threads, train, score, names)


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
        marked: have ranks mark what they say to people (see `configs.log_stream`).

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
    environment.setdefault("HWLOC_COMPONENTS", NO_DISPLAYS)
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
    # What Open MPI starts on each host before any rank has none of our environment.
    environment.setdefault("OMPI_MCA_orte_launch_agent", f"env HWLOC_COMPONENTS={NO_DISPLAYS} orted")
    environment.setdefault("PRTE_MCA_prte_launch_agent", f"env HWLOC_COMPONENTS={NO_DISPLAYS} prted")
    words = [*total, "--host", ",".join(f"{host}:{each}" for host in hosts), "--map-by", f"ppr:{each}:node"]
    known = [*names, "VERNIER_TERMINAL"]
    for name in dict.fromkeys([*carried(environment), *(name for name in known if name in environment)]):
        words += ["-x", name]  # its value goes over mpirun's own connection, and stands in no command line
    return words


def _is_hydra() -> bool:
    """Whether mpirun is MPICH's or Intel's rather than Open MPI's."""
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=30, check=False)
    return bool(re.search(r"HYDRA|Intel\(R\) MPI", done.stdout + done.stderr))
