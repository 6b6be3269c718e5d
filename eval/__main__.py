"""`python -m eval`: a rank of the rank-group that scores. torchrun starts several; one alone works as well.

Two ways: `python -m eval CONFIG [key=value …]` watches that run; `python -m eval --models M … --reference REF` scores
model directories once (`vernier eval` starts it so).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.errors import EXIT_FAILED, ConfigError, DataError, VernierError
from configs.load import load_config, resolve
from configs.parent import die_with_parent, end_at_once
from configs.rundir import RunDir
from configs.whole import write_atomic


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line of a rank."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    parser.add_argument("config", nargs="?", help="YAML file or recipe of the run to watch")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--models", nargs="+", type=Path, default=[], help="model directories to score once")
    parser.add_argument("--tables", nargs="+", type=Path, default=[], help="a loss table's path for each of --models")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--dtype", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shuffle-batches", type=int, default=None, metavar="SEED")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--log-dir", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs one rank; gives the exit code."""
    die_with_parent()
    asked = parse(sys.argv[1:] if arguments is None else arguments)
    # torch is imported from here on, once the command line is known to be good
    from eval.ranks import environment_ranks, log_to_file

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for training; the evaluator ends when told or done
    rank = environment_ranks()[0]
    console = sys.stderr
    try:
        if asked.config is not None:
            config = resolve(load_config(asked.config, asked.overrides))
            console = log_to_file(RunDir(config.run_dir).logs / f"eval-rank-{rank}.log")
            watch_run(config)
        elif asked.models and asked.reference:
            if asked.log_dir:
                console = log_to_file(asked.log_dir / f"rank-{rank}.log")
            score_models(asked, console)
        else:
            raise ConfigError("eval: give CONFIG, or --models with --reference")
    except Exception as error:
        ours = isinstance(error, VernierError)
        code = error.exit_code if isinstance(error, VernierError) else EXIT_FAILED
        said = str(error) if ours else f"rank {rank}: {type(error).__name__}: {error}"
        if not ours:
            traceback.print_exc()  # into the log
        if asked.log_dir:  # torchrun turns every exit code into 1; `vernier eval` reads this
            write_atomic(asked.log_dir / f"error-{rank}.json", json.dumps({"exit_code": code, "error": said}))
        else:
            print(said, file=console)
        return code
    return 0


def watch_run(config: Any) -> None:
    """Watches one run to its end."""
    from eval.ranks import join, leave
    from eval.watch import watch

    ranks = join(config.eval.threads_per_rank)
    watch(config, ranks)
    leave()


def score_models(asked: argparse.Namespace, console: Any) -> None:
    """Scores model directories one after another, all ranks on each."""
    import torch

    from eval.losses import Scorer
    from eval.models import load_for_scoring, weights_fingerprint
    from eval.ranks import join, leave
    from eval.reference import load_reference
    from eval.scoring import cpu_threads, score_reference, scoring_facts
    from eval.tables import write_table
    from eval.watch import snapshot_step

    ranks = join(asked.threads)
    reference = load_reference(asked.reference, check=False)  # `vernier eval` has checked it
    dtype = asked.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    for directory, path in zip(asked.models, asked.tables, strict=True):
        model = load_for_scoring(directory, dtype, ranks.device, trust_remote_code=asked.trust_remote_code)
        step = None
        with suppress(DataError):  # a foreign model has no step
            step = snapshot_step(directory)
        facts = scoring_facts(model, weights_fingerprint(directory), dtype, directory.name, step, asked.threads)
        started = told = time.monotonic()

        def progress(done: int, of: int, directory: Path = directory) -> None:
            nonlocal told
            if ranks.first and time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"{directory.name}: {100 * done // of} % scored", file=console)

        with cpu_threads(asked.threads):
            table = score_reference(
                Scorer(model, reference.sequence_length),
                reference,
                ranks,
                facts,
                order_seed=asked.shuffle_batches,
                on_batch=progress,
            )
        if ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(path, table)
            loss = table.loss.sum() / table.tokens.sum()
            seconds = time.monotonic() - started
            print(f"{directory.name}: {loss:.4f} nats/token, {seconds:.1f} s -> {path}", file=console)
        ranks.barrier()
    leave()


if __name__ == "__main__":
    end_at_once(main())
