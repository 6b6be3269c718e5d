"""`python -m trainer CONFIG [key=value …]`: a rank of a training. torchrun, mpirun or srun start several; one alone
works as well."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from configs.console import is_lent, is_supervised, open_streams, tell
from configs.errors import EXIT_FAILED, VernierError
from configs.fault_injection import reached
from configs.load import load_config, resolve, with_absolute_paths
from configs.log_stream import log_to_file, stream_to_people
from configs.process import die_with_parent, end_at_once
from configs.run.directory import RunDir
from trainer import stop_requests


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line of a rank."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", help="YAML file or shipped recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--extend", action="store_true", help="go on beyond the steps the run was started with")
    parser.add_argument("--force-resume", action="store_true", help="go on with settings that may not change")
    return parser.parse_args(arguments)


def run_of(arguments: list[str]) -> RunDir:
    """The run that ranks with these arguments train.

    Raises:
        VernierError: the settings are no settings.
    """
    asked = parse(arguments)
    return RunDir(with_absolute_paths(load_config(asked.config, asked.overrides)).run_dir)


def log_name(rank: object) -> str:
    """What the log of a rank is called, in its run's logs."""
    return f"rank-{rank}.log"


def logs_of(arguments: list[str]) -> str:
    """Path of the logs of ranks with these arguments; {rank} stands for the rank.

    Raises:
        VernierError: the settings are no settings.
    """
    return str(run_of(arguments).logs / log_name("{rank}"))


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank; gives the exit code."""
    die_with_parent()
    open_streams()
    stop_requests.listen()
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    from eval.distributed.environment import meet, this_rank

    rank, terminal = 0, stream_to_people()
    run: RunDir | None = None
    try:
        rank = this_rank().rank
        os.environ["LOCAL_WORLD_SIZE"] = str(this_rank().local_world)  # whoever started us has fixed it
        config = resolve(load_config(asked.config, asked.overrides), nproc=this_rank().local_world)
        run = RunDir(config.run_dir)
        log_to_file(run.logs / log_name(rank))
        who = meet().line()
        print(who, flush=True)
        if rank == 0 and not is_lent(dict(os.environ)):  # else `vernier train` has chosen how, and people need not know
            print(who, file=terminal)
        reached("early")
        # torch is imported from here on: what it says, or dies of, is in the log
        from trainer.run import run_training

        return run_training(config, terminal, extend=asked.extend, force_resume=asked.force_resume)
    except Exception as error:
        code = error.exit_code if isinstance(error, VernierError) else EXIT_FAILED
        said = str(error) if isinstance(error, VernierError) else f"{type(error).__name__}: {error}"
        recorded = error.__dict__.get("recorded")
        if run is not None and isinstance(error, VernierError):
            print(f"error: {said}", file=sys.stderr)  # into the log, which has the traceback of others
        if recorded is None:  # it has not come as far as its run
            if not isinstance(error, VernierError):
                traceback.print_exc()
            recorded = run is not None and _record(run, code, rank, said)
        if not (is_supervised() and recorded):  # `vernier` tells what the run's state says
            tell(said if isinstance(error, VernierError) else f"rank {rank}: {said}", terminal)
        return code


def _record(run: RunDir, code: int, rank: int, said: str) -> bool:
    """Tells in the run's state why this rank ends before it has joined the others; gives whether it stands there."""
    from eval.distributed.environment import start_began
    from trainer.faults.lock import held_since_before

    since = start_began()
    if not run.path.is_dir() or held_since_before(run, since):
        return False
    run.add_event("failed", said, rank=rank)
    return run.record_failure(code, rank, said, since=since)


if __name__ == "__main__":
    end_at_once(main())
