"""`vernier train`: starts the training ranks and the eval rank-group on this machine, by torchrun or mpirun.

Who starts the ranks is decided here; `launcher.train.supervise` watches over them and the evaluator.
"""

from __future__ import annotations

from rich.console import Console

from configs.load import resolve
from configs.schema import Config
from launcher.backends.local import Local
from launcher.backends.mpi import with_mpirun
from launcher.options import Resume
from launcher.train.supervise import supervise


def run_train(
    config: Config,
    how: Resume,
    *,
    wait: bool,
    console: Console,
    starter: str = "torchrun",
    hosts: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> int:
    """Trains here to the end, or goes on with what is there; gives the exit code.

    Args:
        config: as it was read; what hangs on the machine is filled in here.
        starter: torchrun or mpirun.
        hosts: machines for mpirun (see `launcher.backends.hosts.read_hosts`); none: this one.
        names: variables of here that ranks on hosts are given besides the usual ones.
    """
    if starter == "mpirun":
        config, given, mpirun = with_mpirun(config, hosts, names)
        return supervise(config, given, mpirun, how, wait=wait, console=console)
    config = resolve(config)
    return supervise(config, config, local_ranks(config), how, wait=wait, console=console)


def local_ranks(config: Config) -> Local:
    """What starts the ranks of a resolved config on this machine."""
    nproc, threads = config.nproc or 1, config.threads_per_rank or 1
    return Local(nproc, threads, config.eval.nproc, config.eval.threads_per_rank, config.launch.start)
