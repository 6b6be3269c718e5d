"""Why a training failed, told in `state.json` by the rank that knows it first: torchrun makes every exit code a 1."""

from __future__ import annotations

import os
import traceback

from configs.errors import EXIT_FAILED, VernierError
from configs.run.directory import RunDir
from configs.run.last_words import follows_another
from eval.distributed.environment import start_began
from eval.distributed.ranks import PeerFailure, Ranks
from trainer.faults.adaptations import RestartRequested
from trainer.faults.lock import RunLock


def record_failure(run: RunDir, ranks: Ranks, error: BaseException, attempt: int | None, lock: RunLock) -> bool:
    """Tells the first failure in the run's state; gives whether one stands there.

    Args:
        attempt: of this rank-group; None where it does not hold the run, or this rank does not know yet.
    """
    if isinstance(error, PeerFailure):
        return True  # by that one
    if (ranks.is_rank_zero and attempt is None) or not run.path.is_dir():
        return False
    said = _said(error)
    if not isinstance(error, VernierError):
        traceback.print_exc()
    code = error.exit_code if isinstance(error, VernierError) else EXIT_FAILED
    state = run.read_state()
    begun = attempt is not None and state.get("attempt") == attempt
    if not lock.still_ours() if ranks.is_rank_zero else attempt is not None and not begun:
        return False  # another attempt's by now
    failure = state.get("failure") or {}
    if begun and (state.get("again") or (failure and (not failure.get("follows") or follows_another(said)))):
        return True  # what another rank has told first is why this one fails
    if isinstance(error, RestartRequested):
        run.write_state("stopping", exit_code=code, again=said)
        return True
    run.add_event("failed", said, rank=ranks.rank)
    return run.record_failure(code, ranks.rank, said, begun=begun, since=start_began())


def _said(error: BaseException) -> str:
    said = str(error).strip() or type(error).__name__
    if isinstance(error, VernierError):
        return said
    said = f"{type(error).__name__}: {said.splitlines()[0]}"
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{os.fsdecode(error.filename)}: {error.strerror}; once that is mended, the same command goes on"
    if follows_another(said):  # gloo's words for a rank that was killed; it could not say so itself
        said = f"another rank has ended without a word, see logs/ ({said})"
    return said
