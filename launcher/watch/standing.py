"""How a run stands: one judgement, by rules in their order, over what its directory, its lock and the scheduler say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from configs.errors import EXIT_STOPPED
from configs.run.last_words import of_rank
from launcher.jobs.status import UNKNOWN, WAITING, RunJobs, described, is_active, is_unanswered, may_be_active
from launcher.text import duration
from trainer.faults.lock import FRESH_S

DYING_S = 15.0  # for whoever watches over a run to write its end down
WITH_CHECKPOINT = "stopped with a checkpoint"


class Standing(NamedTuple):
    """How a run stands: in a word, in words for people, and why it has ended (None where it has not)."""

    word: str  # not started, pending, running, stopping, starting again, stopped, requeued, done, failed, died
    words: str
    why: str | None = None


@dataclass(frozen=True)
class Observed:
    """What was seen of a run at one moment.

    Attributes:
        state: as `state.json` says.
        held: a process here has the run's lock, so that what waits in a queue is not what matters.
        elsewhere: it was last heard of from another host, whose lock cannot be seen from here.
        silent_s: seconds since it was last heard of.
    """

    state: dict[str, Any]
    jobs: RunJobs
    held: bool
    elsewhere: bool
    silent_s: float

    @property
    def word(self) -> str:
        return str(self.state.get("state") or "not started")

    @property
    def job(self) -> dict[str, Any] | None:
        """The job that training is in, or was last."""
        return self.jobs.train

    @property
    def fresh(self) -> bool:
        """The job was submitted after the state was written, so that what stands there is of an earlier start."""
        return self.jobs.submitted > float(self.state.get("heartbeat") or 0)

    @property
    def ours(self) -> bool:
        """The job is the one that the state was written in, or has yet to write it."""
        return self.job is not None and (str(self.state.get("job")) == self.job["job"] or self.fresh)

    @property
    def alive(self) -> bool:
        """Somebody trains, or is likely to: its lock cannot be seen from here, or is about to be taken."""
        job = self.job if self.ours else None
        if self.held or (job is not None and is_active(job)):
            return True
        if job is not None and job["state"] != UNKNOWN:  # it has ended, and all its processes with it
            return self.silent_s < DYING_S
        starting = self.state.get("state") == "pending"
        return self.silent_s < (FRESH_S if self.elsewhere or starting else DYING_S)

    @property
    def job_is_over(self) -> bool:
        """The job's script has said that nothing follows in it; or Slurm does not decide about what follows."""
        # Ranks that start again in their job, or were interrupted by hand, are not what Slurm decides about.
        return bool(
            self.state.get("job_ended") or self.state.get("again") or self.state.get("exit_code") != EXIT_STOPPED
        )


def standing(seen: Observed) -> Standing:
    """How a run stands: what the first rule says that knows."""
    return next(found for rule in RULES if (found := rule(seen)) is not None)


def _waits_in_the_queue(seen: Observed) -> Standing | None:
    job = seen.job
    if job is None or seen.held or job["state"] not in WAITING:
        return None
    reason = job["reason"] or job["state"]
    return Standing("requeued" if seen.jobs.requeues else "pending", f"waiting in the queue: ({reason})")


def _is_started_again_by_slurm(seen: Observed) -> Standing | None:
    job = seen.job
    if job is None or seen.held or not (seen.ours and seen.jobs.restarted and is_active(job)):
        return None
    return Standing("requeued", f"starting again in job {job['job']} ({job['state']})")


def _was_ended_from_outside(seen: Observed) -> Standing | None:
    """By a preemption for instance: Slurm alone knows whether it is queued again."""
    job = seen.job
    if job is None or seen.held or not seen.ours or seen.fresh or seen.word != "stopping":
        return None
    if seen.job_is_over or seen.jobs.stop_asked or not may_be_active(job):
        return None
    what = "whether its job goes on cannot be asked just now" if is_unanswered(job) else "Slurm has its job still"
    return Standing(seen.word, f"stopped for now; {what}")


def _is_unfinished_in_its_job(seen: Observed) -> Standing | None:
    job = seen.job
    if job is None or seen.held or not seen.ours:
        return None
    unfinished = seen.word in ("not started", "pending", "running", "requeued")
    if not (unfinished or (seen.fresh and is_active(job))):
        return None
    if is_active(job):
        if seen.word == "running" and not seen.fresh:
            return None
        return Standing("pending", f"starting in job {job['job']} ({job['state']})")
    if job["state"] == UNKNOWN:
        return _cannot_be_asked(seen, job)
    return None if seen.alive else _ended_with_its_job(seen, job)


def _cannot_be_asked(seen: Observed, job: dict[str, Any]) -> Standing | None:
    if job["backend"] != "slurm":
        return None
    if seen.word != "running":
        return Standing(seen.word, f"{seen.word}; job {job['job']} was submitted")
    last = f"running when last heard of; whether job {job['job']} goes on cannot be asked just now"
    return None if seen.alive else Standing(seen.word, last)


def _ended_with_its_job(seen: Observed, job: dict[str, Any]) -> Standing:
    ended = described(job).partition(" ")[2]
    if seen.jobs.stop_asked:
        why = f"it was asked to stop, at once; job {ended}"
        return Standing("stopped", "stopped without a further checkpoint", why)
    where = {"running": "", "requeued": " in the queue"}.get(seen.word, " before it started")
    return Standing("died", f"died{where}", f"job {ended}; `vernier launch` goes on")


def _is_dead(seen: Observed) -> Standing | None:
    if seen.word not in ("running", "pending") or seen.alive:
        return None
    where = "" if seen.word == "running" else " while it started"
    silent = duration(seen.silent_s)
    why = f"no sign of life for {silent}, and nobody holds its lock; the same command goes on"
    return Standing("died", f"died{where}", why)


def _is_silent(seen: Observed) -> Standing | None:
    if seen.word != "running" or seen.silent_s <= FRESH_S:
        return None
    return Standing(seen.word, f"running, but silent for {duration(seen.silent_s)}")


def _said_its_last_word(seen: Observed) -> Standing | None:
    state = seen.state
    again, code, failure = state.get("again"), state.get("exit_code"), state.get("failure")
    if seen.word == "stopping" and again:
        words = "starting again" if seen.alive else "waits to be started again"
        return Standing("starting again", words, str(again))
    if seen.word == "stopping" and code is not None:
        return Standing("stopped", WITH_CHECKPOINT, "it was asked to stop" + (" by Ctrl-C" if code == 130 else ""))
    if seen.word == "failed" and isinstance(failure, dict):
        return Standing(seen.word, seen.word, of_rank(failure.get("rank"), failure.get("error")))
    return None


RULES: tuple[Callable[[Observed], Standing | None], ...] = (
    _waits_in_the_queue,
    _is_started_again_by_slurm,
    _was_ended_from_outside,
    _is_unfinished_in_its_job,
    _is_dead,
    _is_silent,
    _said_its_last_word,
    lambda seen: Standing(seen.word, seen.word),
)
