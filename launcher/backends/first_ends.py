"""torch's agent, which also notes the ranks that ended first; and what their logs say of why.

When a rank ends the agent ends the others, and they may have much to say of that: only who had ended before has a cause
of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from configs.console import is_supervised
from configs.errors import EXIT_FAILED, VernierError
from configs.process import began
from configs.run.last_words import follows_another, how_ended, last_words, size_of
from launcher.backends.rank_ends import without_a_word

DYING_S = 3.0  # for the kernel to take down a process of many GB
POLL_S = 0.05


class FirstEnds(LocalElasticAgent):
    """`first`: (pid, exit code) by rank of those that had ended, and not well, when the first was seen to have."""

    def __init__(self, *arguments: Any, logs: str | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logs = logs
        self.first: dict[int, tuple[int, int]] = {}
        self.sizes: dict[int, int] = {}  # of the ranks' logs when they were started

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.sizes = {worker.global_rank: size_of(self.log_of(worker.global_rank)) for worker in worker_group.workers}
        return dict(super()._start_workers(worker_group))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if not self.first:
            self.note({worker.global_rank: int(worker.id) for worker in worker_group.workers})
        return super()._monitor_workers(worker_group)

    def note(self, pids: dict[int, int]) -> None:
        """Notes which of the processes, by rank, have ended; where all of those only follow another, waits for it."""
        latest = time.monotonic() + DYING_S
        while True:
            ends = {rank: (pid, _end_of(pid)) for rank, pid in pids.items()}
            self.first = {rank: (pid, code) for rank, (pid, code) in ends.items() if code}
            # A rank that was killed has let its peers go before its parent can see it dead, and they may be quicker.
            follow = 0 < len(self.first) < len(pids) and all(follows_another(self.why(rank)) for rank in self.first)
            if not follow or time.monotonic() > latest:
                return
            time.sleep(POLL_S)

    def log_of(self, rank: int) -> Path:
        """A rank's log."""
        return Path((self.logs or os.devnull).replace("{rank}", str(rank)))

    def why(self, rank: int) -> str:
        """What a rank's log says of its end since the start; "" where nothing."""
        return last_words(self.log_of(rank), self.sizes.get(rank, 0))


def _end_of(pid: int) -> int:
    """The exit code of a child, negative for a signal; 0 while it runs. It is left to be waited for."""
    with suppress(OSError):
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is not None:
            return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    return 0


def tell_ends(module: str, arguments: Sequence[str], agent: FirstEnds) -> None:
    """Says how ranks of `python -m module arguments` ended, the first with a cause of its own before all.

    Of a training, in its run's state too.
    """
    ends = sorted(agent.first.items(), key=lambda item: _likeliness(item[1][1], agent.why(item[0])))
    for rank, (pid, code) in ends:
        words = agent.why(rank)
        print(f"rank {rank} (pid {pid}): {how_ended(code)}{f': {words}' if words else ''}", file=sys.stderr, flush=True)
    if module != "trainer" or not ends:
        return
    from trainer.__main__ import run_of
    from trainer.faults.lock import held_since_before

    since = 0.0 if is_supervised() else began(os.getpid()) - 1.0
    with suppress(VernierError, SystemExit):
        run = run_of(list(arguments))
        if not run.path.is_dir() or held_since_before(run, since):
            return
        rank, (_, code) = ends[0]
        words = agent.why(rank)
        run.record_failure(EXIT_FAILED, rank, without_a_word(how_ended(code), words), since=since, unsaid=True)


def _likeliness(code: int, words: str) -> tuple[bool, bool]:
    """Sorts before others who is likelier to have ended for a cause of its own."""
    return follows_another(words) or code == -signal.SIGTERM, code >= 0
