"""`python -m trainer CONFIG [key=value …]`: a rank of a training. torchrun, mpirun or srun start several; one alone
works as well."""

from __future__ import annotations

import argparse
import os
import sys

from configs.errors import EXIT_FAILED, VernierError
from configs.load import load_config, resolve
from configs.parent import die_with_parent, end_at_once
from configs.rundir import RunDir
from configs.terminal import is_lent, is_supervised, open_streams, tell
from trainer import stop


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank; gives the exit code."""
    die_with_parent()
    open_streams()
    stop.listen()
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", help="YAML file or shipped recipe")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--extend", action="store_true", help="go on beyond the steps the run was started with")
    parser.add_argument("--force-resume", action="store_true", help="go on with settings that may not change")
    asked = parser.parse_args(arguments)
    # torch is imported from here on
    from eval.rank_environment import meet, this_rank
    from eval.ranks import log_to_file

    rank, terminal = 0, sys.stderr
    try:
        rank = this_rank().rank
        os.environ["LOCAL_WORLD_SIZE"] = str(this_rank().local_world)  # whoever started us has fixed it
        config = resolve(load_config(asked.config, asked.overrides), nproc=this_rank().local_world)
        terminal = log_to_file(RunDir(config.run_dir).logs / f"rank-{rank}.log")
        who = meet().line()
        print(who, flush=True)
        if rank == 0 and not is_lent(dict(os.environ)):  # else `vernier train` has chosen how, and people need not know
            print(who, file=terminal)
        from trainer.run import run_training

        return run_training(config, terminal, extend=asked.extend, force_resume=asked.force_resume)
    except Exception as error:
        ours = isinstance(error, VernierError)
        if not (is_supervised() and error.__dict__.get("recorded")):  # `vernier` tells what the run's state says
            tell(str(error) if ours else f"rank {rank}: {type(error).__name__}: {error}", terminal)
        return error.exit_code if isinstance(error, VernierError) else EXIT_FAILED


if __name__ == "__main__":
    end_at_once(main())
