"""A rank for test_damaged_checkpoints: looks for a whole checkpoint as the first rank of a node of its own.

Arguments: for each rank the run directory as its node sees it.
"""

import os
from pathlib import Path

from configs.run.directory import RunDir
from eval.distributed.ranks import join, leave
from trainer.checkpoint.find_whole import find_whole_checkpoint


def main(arguments: list[str]) -> None:
    os.environ["LOCAL_RANK"] = "0"
    ranks = join(1)
    run = RunDir(Path(arguments[ranks.rank]))
    found, damaged = find_whole_checkpoint(run, ranks)
    assert found is not None
    (run.path / "found").write_text(f"{found.name} {damaged[0]}")
    ranks.barrier()
    leave()
