"""A rank for test_watchdog: makes steps until something happens to one of the ranks.

Arguments: run directory, what happens (frozen, asleep, endless, paused), to which rank, how many steps.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from configs.run.directory import RunDir
from eval.distributed.ranks import join, leave
from trainer.faults.watchdog import Watchdog


def happens(what: str, run: RunDir, watchdog: Watchdog) -> None:
    (run.path / "happened").write_text("")
    if what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "asleep":
        time.sleep(1000)  # the line that hangs
    elif what == "endless":
        while True:  # the line that hangs
            pass  # the line that hangs
    elif what == "paused":
        with watchdog.paused("scoring"):
            time.sleep(7)


def main(arguments: list[str] | None = None) -> None:
    path, what, culprit, steps = sys.argv[1:] if arguments is None else arguments
    run = RunDir(Path(path))
    signal.signal(signal.SIGTERM, lambda *_: None)
    ranks = join(1)
    if ranks.is_rank_zero:
        run.write_state("running", attempt=7, exit_code=None, failure=None)
    ranks.barrier()
    watchdog = Watchdog(run, ranks, 3.0)
    watchdog.start()
    (run.path / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    try:
        for step in range(1, int(steps) + 1):
            watchdog.mark(step - 1)
            if step == 6 and ranks.rank == int(culprit):
                happens(what, run, watchdog)
            dist.all_reduce(torch.ones(1))
            time.sleep(0.05)
    except RuntimeError:
        if run.read_state()["failure"] is None:  # of another rank's end, before that was told
            run.add_event("failed", "connection closed")
        raise
    watchdog.stop()
    leave()


if __name__ == "__main__":
    main()
