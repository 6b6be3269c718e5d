"""The eval rank-group of a run beside its training: started, started again when it dies, ended."""

from __future__ import annotations

import time

from rich.console import Console

from configs.errors import VernierError
from configs.files.atomic import write_atomic
from configs.load import dump_config
from configs.run.directory import RunDir
from configs.schema import Config
from eval.scored import loss_tables
from launcher.backends.process import Started, Starter, end
from launcher.backends.rank_ends import first_to_end, sizes
from launcher.restarts import RestartPolicy

EVAL_RESTARTS = 5  # without a newly scored snapshot between


class EvalGroup:
    """The eval rank-group of a run: started, restarted when it dies, ended."""

    def __init__(self, config: Config, run: RunDir, console: Console, starter: Starter) -> None:
        self.config, self.run, self.console, self.starter = config, run, console, starter
        self.process: Started | None = None
        self.next_start = 0.0
        self.restarts = RestartPolicy(EVAL_RESTARTS, first_pause_s=1.0)
        self.given_up = False
        self.before: dict[str, int] = {}  # bytes in the logs when it was started

    def start(self) -> None:
        given = self.run.path / "eval-config.yaml"
        if self.process is None:  # written once: its restart must not need room on the disk
            write_atomic(given, dump_config(self.config))
        self.before = sizes(self.run.logs)
        self.process = self.starter.score([str(given)], self.run.logs)

    def look_after(self, *, training: bool) -> bool:
        """Restarts the group if it died, or ended before training did; gives whether it is (or will be) running."""
        if self.process is None or self.given_up:
            return False
        code = self.process.poll()
        if code is None:
            return True
        if code == 0 and (not training or self.run.read_state().get("exit_code") is not None):
            return False
        if code == 0:  # it saw the last word of ranks that have been started again since
            self.next_start = -1.0
        if self.next_start == 0.0:
            self._note_death(code)
        if not self.given_up and time.monotonic() >= self.next_start:
            self.next_start = 0.0
            try:
                self.start()
            except OSError:  # no room for its log, say; it ends no training
                self.next_start = time.monotonic() + 30.0
        return not self.given_up

    def _note_death(self, code: int) -> None:
        try:
            scored = len(loss_tables(self.run, self.config.reference_dir, self.config.eval.dtype))
        except VernierError:  # the reference set cannot be read at this moment
            scored = 0
        rank, words = first_to_end(self.run.logs, self.before, "eval")
        how = f"{self.starter.name}'s exit code {code}{f': {words}' if words else ''}"
        if rank is not None:
            how = f"rank {rank}: {words}"
        pause_s = self.restarts.after(scored)
        if pause_s is None:
            self.given_up, times = True, self.restarts.in_a_row
            told = f"the evaluator died {times} times without scoring anything ({how}); training goes on without it"
        else:
            self.next_start = time.monotonic() + pause_s
            told = f"the evaluator died ({how}); it is started again"
        self.run.add_event("evaluator died", told, exit_code=code, rank=rank)
        self.console.print(f"{told}; see {self.run.logs / f'eval-rank-{rank or 0}.log'}", markup=False)

    def end(self) -> None:
        if self.process is not None:
            end(self.process)
