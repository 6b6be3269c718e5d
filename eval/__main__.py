"""`python -m eval`: a rank of the rank-group that scores. torchrun, mpirun or srun start several; one alone works.

Two ways: `python -m eval CONFIG [key=value …]` watches that run; `python -m eval --models M … --reference REF` scores
model directories once (`vernier eval` starts it so).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from configs.console import open_streams, tell
from configs.errors import EXIT_FAILED, ConfigError, VernierError
from configs.fault_injection import reached
from configs.files.atomic import write_atomic
from configs.load import load_config, resolve, with_absolute_paths
from configs.log_stream import log_to_file, stream_to_people
from configs.process import die_with_parent, end_at_once
from configs.run.directory import RunDir
from eval.progress import Phases

OBJECTIVES = ["causal", "prompt", "instruct", "classify", "masked", "pll"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line of a rank."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file or recipe of the run to watch")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="model directories to score once")
    parser.add_argument("--tables", nargs="+", type=Path, default=[], help="a loss table's path for each of --models")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--ensemble", action="store_true", help="score the mean of the models' probabilities")
    parser.add_argument(
        "--objective",
        choices=["causal", "prompt", "instruct", "classify", "masked", "pll"],
        help="default: the set's own",
    )
    parser.add_argument("--weights", choices=["auto", "replicated", "sharded"], default="auto")
    parser.add_argument("--against", type=Path, metavar="TABLE", help="stop once the model is told apart from this one")
    parser.add_argument(
        "--margin", type=float, default=0.0, help="percent; with --against, no difference so large will do"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="take up nothing that an earlier attempt left")
    parser.add_argument("--checked", action="store_true", help="models and reference set have been checked already")
    parser.add_argument("--shuffle-batches", type=int, default=None, metavar="SEED")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--log-dir", type=Path)
    return parser.parse_args(arguments)


def log_name(asked: argparse.Namespace, rank: object) -> str:
    """What the log of a rank is called."""
    return f"{'' if asked.config is None else 'eval-'}rank-{rank}.log"


def logs_of(arguments: list[str]) -> str | None:
    """Path of the logs of ranks with these arguments, if they have any; {rank} stands for the rank.

    Raises:
        VernierError: the settings are no settings.
    """
    asked = parse(arguments)
    folder = asked.log_dir
    if asked.config is not None:
        folder = RunDir(with_absolute_paths(load_config(asked.config, asked.overrides)).run_dir).logs
    return None if folder is None else str(folder / log_name(asked, "{rank}"))


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank; gives the exit code.

    Raises:
        ConfigError: neither a config nor models were given.
    """
    die_with_parent()
    open_streams()
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    # torch is imported from here on, once the command line is known to be good and the log is open
    from eval.distributed.environment import this_rank

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for training; the evaluator ends when told or done
    rank, console, logged = 0, stream_to_people(), False
    try:
        rank = this_rank().rank
        if asked.config is not None:
            config = resolve(load_config(asked.config, asked.overrides))
            log_to_file(RunDir(config.run_dir).logs / log_name(asked, rank))
            logged = True
            reached("scoring")
            watch_run(config)
        elif asked.models and asked.reference:
            if asked.log_dir:
                log_to_file(asked.log_dir / log_name(asked, rank))
                logged = True
            score_directories(asked, console)
        else:
            raise ConfigError("eval: give CONFIG, or --models with --reference")
    except Exception as error:
        ours = isinstance(error, VernierError)
        code = error.exit_code if isinstance(error, VernierError) else EXIT_FAILED
        said = str(error) if ours else f"rank {rank}: {type(error).__name__}: {error}"
        if not ours:
            traceback.print_exc()  # into the log
        elif logged:
            print(f"error: {said}", file=sys.stderr)
        if asked.log_dir:  # torchrun turns every exit code into 1; `vernier eval` reads this
            # A fault that is not ours to name may be another rank's death, and scoring can go on.
            kind = "error" if ours else "fault"
            write_atomic(asked.log_dir / f"{kind}-{rank}.json", json.dumps({"exit_code": code, "error": said}))
        else:
            tell(said, console)
        return code
    return 0


def watch_run(config: Any) -> None:
    """Watches one run to its end."""
    from eval.distributed.environment import meet
    from eval.distributed.ranks import join, leave
    from eval.scoring.evaluator import watch

    ranks = join(config.eval.threads_per_rank, timeout_s=config.eval.timeout_s)
    print(meet().line(), flush=True)
    watch(config, ranks)
    leave()


def score_directories(asked: argparse.Namespace, console: Any) -> None:
    """Scores model directories one after another, all ranks on each, or all together as an ensemble.

    Raises:
        ConfigError: tables and models do not go together, or what is there is of another model.
        PeerFailure: another rank refused it.
    """
    import torch

    from eval.distributed.environment import meet
    from eval.distributed.ranks import PeerFailure, join, leave
    from eval.reference.set import load_reference
    from eval.scoring.models import check_fits, check_model
    from eval.scoring.once import Scoring, score_models

    ranks = join(asked.threads)
    if asked.log_dir or ranks.is_rank_zero:
        print(meet().line(), file=sys.stdout if asked.log_dir else console, flush=True)
    check = not asked.checked and ranks.local_rank == 0  # the files, once on each machine
    problem: VernierError | None = None
    try:
        reference = load_reference(asked.reference, check=check)
        for model in asked.models if check else ():
            check_model(model)
            check_fits(model, reference)
    except VernierError as error:
        problem = error
    if not ranks.all_true(problem is None):
        raise problem or PeerFailure("another rank refused what is to be scored")
    how = Scoring(
        dtype=asked.dtype or ("bf16" if torch.cuda.is_available() else "fp32"),
        objective=asked.objective,
        weights=asked.weights,
        threads=asked.threads,
        order_seed=asked.shuffle_batches,
        against=asked.against,
        margin_percent=asked.margin,
        trust_remote_code=asked.trust_remote_code,
        fresh=asked.fresh,
    )
    groups = [asked.models] if asked.ensemble else [[model] for model in asked.models]
    if len(groups) != len(asked.tables):
        raise ConfigError(f"--tables: {len(asked.tables)} were given for {len(groups)} sets of losses")
    with Phases(console, lambda name, done, of: f"{name}: {100 * done // of} % scored" if done else None) as phases:
        for models, table in zip(groups, asked.tables, strict=True):
            score_models(models, table, reference, ranks, how, phases.say, phases)
    leave()


if __name__ == "__main__":
    end_at_once(main())
