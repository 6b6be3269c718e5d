"""The evaluator of a run: watches its snapshots, scores what appears in step order, ends when all is said."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.atomic import MANIFEST, clear_unfinished
from configs.run.directory import RunDir, step_name, step_of
from configs.scheduler import Life, current_job, life
from configs.schema import Config, StopSettings
from eval.distributed.ranks import Ranks
from eval.reference.set import ReferenceSet, load_reference
from eval.scored import planned_comparisons
from eval.scoring.enough import ask_to_end, enough
from eval.scoring.journal import Journal, clear
from eval.scoring.models import check_fits, check_model, weights_fingerprint
from eval.scoring.placement import Scoring, open_scorer
from eval.scoring.score import cpu_threads, score_reference, table_meta
from eval.scoring.tensorboard import EvalBoard, last_shown
from eval.tables import LossTable, mean_loss, read_table, table_name, write_table

POLL_S = 0.5
ABANDONED_S = 60.0  # a run with no heartbeat for so long, and no holder of its lock, is not running
ASK_S = 30.0  # between questions to the scheduler
END = -1

_asked: dict[str, tuple[float, Life]] = {}  # by job: when, and what the scheduler said


def table_path(run: RunDir, reference: ReferenceSet, step: int, dtype: str) -> Path:
    """Where the loss table of a snapshot lies."""
    return run.losses / reference.short_name / table_name(step_name(step), reference.objective, dtype)


def training_is_over(run: RunDir) -> bool:
    """Whether no further snapshot will come: the trainer said its last word, or is plainly gone."""
    try:
        run.check_state()
    except DataError:  # who trains will write it anew; where nobody does, no snapshot will come
        return time.time() - run.last_heartbeat() > ABANDONED_S and not run.is_held()
    state = run.read_state()
    if not state:
        return False
    if state.get("state") == "done":
        return True
    if state.get("exit_code") is not None and not state.get("again"):  # else its ranks are about to start again
        return not _job_goes_on(state)
    heard = run.heard(state)
    silent = time.time() - heard > ABANDONED_S and run.clock() - heard > ABANDONED_S
    return silent and not run.is_held() and not _job_goes_on(state)


def _own_jobs() -> set[str]:
    """The job that this process is in, by all the ids that its parts have."""
    parts = {value for name, value in os.environ.items() if name.startswith("SLURM_JOB_ID_HET_GROUP_")}
    return {job for job in (current_job(), os.environ.get("SLURM_HET_JOB_ID"), *parts) if job}


def _job_goes_on(state: dict[str, Any]) -> bool:
    """Whether the scheduler still has the training's job: it may be waiting to run again."""
    job = state.get("job")
    if not job:
        return False
    if job in _own_jobs():  # it waits for this evaluator: what it last said has to do
        return state.get("state") in ("pending", "requeued")
    asked, found = _asked.get(job, (-ASK_S, Life.UNKNOWN))
    if time.monotonic() - asked >= ASK_S:
        found = life(job)
        _asked[job] = (time.monotonic(), found)
    # Where it cannot be asked (inside of a container, say, or it does not answer), the job goes on until its script has
    # said its last word: to wait in vain costs an evaluator's time, to end too early all scores.
    return found is Life.ACTIVE or (found is Life.UNKNOWN and not state.get("job_ended"))


class RunScores:
    """Scored steps of a run: writes each new table with its TensorBoard lines and its event. Rank 0 only."""

    def __init__(self, run: RunDir, reference: ReferenceSet, dtype: str, stop_when: StopSettings | None = None) -> None:
        self.run, self.reference, self.dtype = run, reference, dtype
        self.stop_when, self.means = stop_when or StopSettings(), dict[int, float]()
        self.board: EvalBoard | None = None
        self.damaged: set[int] = set()  # steps whose table is, as was told
        self.refused: dict[int, int] = {}  # steps, and when their snapshot was written; another of that step counts
        clear_unfinished(self._path(0).parent, "step-*.parquet")

    def scored(self) -> list[int]:
        """Steps that have their table, ascending; the snapshots of some may be gone."""
        steps = {step_of(table.name) for table in self._path(0).parent.glob("step-*.parquet")}
        return sorted(step for step in steps if step is not None and self._path(step).is_file())

    def next_step(self) -> int | None:
        """The earliest snapshot without a table."""
        for step in self.run.whole_steps(self.run.snapshots):
            if not self._path(step).is_file() and self.refused.get(step, -1) != self._written(step):
                return step
        return None

    def _written(self, step: int) -> int:
        """When a snapshot was written, in ns; 0 where it is not there (it is being replaced, say)."""
        try:
            return (self.run.snapshots / step_name(step) / MANIFEST).stat().st_mtime_ns
        except OSError:
            return 0

    def _path(self, step: int) -> Path:
        return table_path(self.run, self.reference, step, self.dtype)

    def refuse(self, step: int, why: str) -> None:
        """Passes over a snapshot that cannot be scored, and says so once."""
        self.refused[step] = self._written(step)
        self.run.add_event("not scored", why, step=step)

    def before(self, step: int) -> LossTable | None:
        """The table scored before `step`; None where there is none.

        One that is damaged is told of, and that before it is taken.
        """
        earlier = [s for s in self.scored() if s < step]
        for one in reversed(earlier):
            try:
                return read_table(self._path(one))
            except DataError as error:
                if one not in self.damaged:
                    self.damaged.add(one)
                    self.run.add_event("damaged", str(error), step=one)
        return None

    def add_or_refuse(self, step: int, table: LossTable, seconds: float) -> None:
        """`add`, but a table that cannot be (a loss that is not finite, say) is its snapshot's fault, nobody else's."""
        try:
            self.add(step, table, seconds)
        except DataError as error:
            self.refuse(step, str(error))

    def add(self, step: int, table: LossTable, seconds: float) -> None:
        """Writes a table, then tells of it. Not so where the snapshot was replaced meanwhile: it is scored again."""
        if weights_fingerprint(self.run.snapshots / step_name(step)) != table.meta["source"]:
            return
        write_table(self._path(step), table)
        self._tell(step, table, seconds)
        self._end_if_enough()

    def _end_if_enough(self) -> None:
        """Asks training to end where its scores say so."""
        if not self.stop_when.asked or self.run.end_request.exists() or self.run.read_state().get("state") == "done":
            return
        steps = self.scored()
        for step in steps:
            if step not in self.means:
                self.means[step] = mean_loss(read_table(self._path(step)))
        means = [self.means[step] for step in steps]
        why = enough(steps, means, lambda at: read_table(self._path(steps[at])), self.stop_when)
        if why is not None:
            self.run.add_event("enough", why, step=steps[-1])
            ask_to_end(self.run, self.stop_when, why)

    def tell_untold(self) -> None:
        """Tells of tables that nobody has told of yet: their evaluator was killed right after it wrote them."""
        scored = self.scored()
        last = last_shown(self.run.eval_board) if scored else -1
        for step in scored:
            if step > last:
                try:
                    self._tell(step, read_table(self._path(step)), None)
                except DataError as error:
                    self.run.add_event("not told", str(error), step=step)

    def _tell(self, step: int, table: LossTable, seconds: float | None) -> None:
        before = self.before(step)
        if self.board is None:
            self.board = EvalBoard(self.run.eval_board, lambda told: self.run.add_event("not shown", told), self.run)
        told = self.board.add(step, table, before, planned_comparisons(self.run, len(self.scored()))[0])
        difference = told["difference"] if before is not None else None
        self.run.add_event(
            "scored",
            scored_message(step, told, first=before is None),
            step=step,
            seconds=None if seconds is None else round(seconds, 3),
            loss=told["b"]["loss"],
            se=told["b"]["se"],
            percent=difference and difference["percent"],
            verdict=told["verdict"] if before is not None else None,
            unit=told["unit"],
        )

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def scored_message(step: int, comparison: dict[str, Any], *, first: bool) -> str:
    """A line for people about a newly scored step."""
    b = comparison["b"]
    line = f"scored step {step}: loss {b['loss']:.4f} ± {b['se']:.4f}"
    if first:
        return line
    difference = comparison["difference"]
    low, high = difference["ci95_percent"]
    change = "" if difference["percent"] is None else f", {difference['percent']:+.3f} %"
    if low is None or high is None:  # few documents: nothing bounds it
        bounds = "−∞" if low is None else f"{low:+.3f}", "∞" if high is None else f"{high:+.3f}"
        return f"{line}{change} [{', '.join(bounds)}] % ({comparison['verdict']})"
    return f"{line}{change} ± {(high - low) / 2:.3f} % ({comparison['verdict']})"


def score_snapshot(
    run: RunDir, step: int, reference: ReferenceSet, ranks: Ranks, dtype: str, threads: int, weights: str = "auto"
) -> LossTable | str:
    """The table of a snapshot, or why it cannot be scored (the same answer on every rank)."""
    directory = run.snapshots / step_name(step)
    problem = ""
    try:
        if ranks.local_rank == 0:  # each node checks the hashes once
            check_model(directory)
            check_fits(directory, reference)
    except DataError as error:
        problem = str(error)
    if not ranks.all_true(not problem):
        return problem or f"{directory}: refused by another rank"
    how = Scoring(dtype=dtype, weights=weights, threads=threads)
    opened = None
    try:
        opened = open_scorer([directory], reference, ranks, how)
    except DataError as error:
        problem = str(error)
    if not ranks.all_true(not problem) or opened is None:
        return problem or f"{directory}: refused by another rank"
    scorer, model, sharded = opened
    meta = table_meta(
        reference,
        model,
        source=weights_fingerprint(directory),
        dtype=dtype,
        objective=reference.objective,
        label=step_name(step),
        step=step,
        threads=threads,
        sharded=sharded,
    )
    journal = Journal(table_path(run, reference, step, dtype), meta, ranks.rank)
    with cpu_threads(threads):
        return score_reference(scorer, reference, ranks, meta, lockstep=sharded, journal=journal)


def watch(config: Config, ranks: Ranks) -> None:
    """Scores the snapshots of a run until it has ended and all are scored.

    Raises:
        DataError: the reference set is missing or not whole.
    """
    run = RunDir(config.run_dir)
    dtype = config.eval.dtype or "fp32"
    reference = load_reference(config.reference_dir, check=ranks.local_rank == 0)
    scores = RunScores(run, reference, dtype, config.stop_when) if ranks.is_rank_zero else None
    if scores is not None:
        scores.tell_untold()
    while True:
        step = ranks.broadcast_int(_wait_for_work(run, scores) if scores is not None else 0)
        if step == END:
            break
        started = time.perf_counter()
        table = score_snapshot(run, step, reference, ranks, dtype, config.eval.threads_per_rank, config.eval.weights)
        if scores is not None:
            if isinstance(table, str):
                scores.refuse(step, table)
            else:
                scores.add_or_refuse(step, table, time.perf_counter() - started)
                clear(table_path(run, reference, step, dtype))
    if scores is not None:
        scores.close()


def _wait_for_work(run: RunDir, scores: RunScores) -> int:
    while True:
        over = training_is_over(run)  # asked before the snapshots are listed, so that none slips between
        step = scores.next_step()
        if step is not None:
            return step
        if over:
            return END
        time.sleep(POLL_S)
