"""Ranks on this machine, started by torch's own agent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.console import lend_terminal
from launcher.backends.agent import TERM_GRACE_S, RankGroup, import_once, model_types_of, why_not_fork
from launcher.backends.forks import fork
from launcher.backends.process import Started, rank_environment, start
from launcher.jobs.plan import SAVE_PATIENCE_S


@dataclass(frozen=True)
class Local:
    """torch's agent on this machine. `start`: whether it and its ranks are forked from here, or exec'd."""

    nproc: int
    threads: int
    eval_nproc: int
    eval_threads: int
    start: str = "fork"
    name: str = "torchrun"
    training_log: str = "torchrun.log"
    marked: bool = False
    far: bool = False

    def train(self, arguments: list[str], logs: Path) -> Started:
        return start_here(*self.training(arguments), logs / self.training_log)

    def score(self, arguments: list[str], logs: Path) -> Started:
        return start_here(*self.scoring(arguments), logs / "eval-torchrun.log")

    def training(self, arguments: list[str]) -> tuple[RankGroup, dict[str, str]]:
        """(ranks, environment) of the training."""
        nproc, threads = self.nproc, self.threads
        return local_group(
            "trainer", arguments, nproc=nproc, threads=threads, patience_s=SAVE_PATIENCE_S, start=self.start
        )

    def scoring(self, arguments: list[str]) -> tuple[RankGroup, dict[str, str]]:
        """(ranks, environment) of the evaluator."""
        return local_group("eval", arguments, nproc=self.eval_nproc, threads=self.eval_threads, start=self.start)


def local_group(
    module: str,
    arguments: list[str],
    *,
    nproc: int,
    threads: int,
    patience_s: int = int(TERM_GRACE_S),
    start: str = "fork",
) -> tuple[RankGroup, dict[str, str]]:
    """(ranks, environment) of `nproc` times `python -m module` on this machine."""
    environment = rank_environment(threads)
    lend_terminal(environment)
    return RankGroup(module, tuple(arguments), nproc, patience_s, start=start), environment


def start_here(group: RankGroup, environment: dict[str, str], log: Path) -> Started:
    """Starts a rank-group on this machine with its output appended to `log`: forked where that can be had."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if group.start == "fork":
        import_once(group.module, model_types_of(group.arguments))
        if not why_not_fork():
            return fork(group, environment, log)
    return start(group.command(), environment, log)
