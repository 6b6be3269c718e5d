"""What follows in a job when its ranks have ended: judged by a pure function, then done."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from configs.run.directory import RunDir
from configs.run.last_words import of_rank
from configs.scheduler import Life, current_job, life
from launcher.backends.process import last_lines
from launcher.backends.rank_ends import first_to_end, name_the_cause, without_a_word
from launcher.jobs.log import DAMAGED, add_job, read_jobs
from launcher.jobs.run.begin import DYING_S, agents_logs, give_up, progress

NO_START = 3  # starts in a row at which no rank got as far as its run
STARTS_AGAIN = 20  # in one job without a further step (train) or table (eval) between
NO_START_S = 10.0


class What(Enum):
    """What a job does next."""

    AGAIN = "start the ranks again, in this job"
    REQUEUE = "queue this job again"
    WAIT = "wait: Slurm is about to end this job, and knows what follows"
    END = "end"


@dataclass(frozen=True)
class Next:
    """What follows. `code`: the job's exit code at its end. `why`: it is not the end that was wanted.

    Attributes:
        most: how often in a row ranks are started again without progress.
        pause_s: before that.
        unsaid: no rank has said the run's last word, so that it is to be said.
        early: no rank has begun.
    """

    what: What
    code: int = EXIT_DONE
    why: str = ""
    most: int = STARTS_AGAIN
    pause_s: float = 0.0
    unsaid: bool = False
    early: bool = False


def after_training(state: dict[str, Any], signal: str, *, by_hand: bool) -> Next:
    """What follows a training whose ranks have ended.

    Args:
        state: of the run, as the ranks left it.
        signal: USR1 where the time limit is near, TERM where the job is being ended from outside, else empty.
        by_hand: somebody asked this very start to stop.
    """
    said, again, failure = state.get("exit_code"), state.get("again"), state.get("failure") or {}
    if again and not signal:
        return Next(What.AGAIN, why=str(again))
    if said is None and signal == "TERM":  # cancelled, preempted, or a node was lost: Slurm itself knows what follows
        return Next(What.END, EXIT_FAILED, "the ranks were ended from outside before their last word")
    early = state.get("state") == "pending" if said is None else said == EXIT_FAILED and bool(failure.get("early"))
    if early and not signal:
        why = f"no rank has started ({of_rank(failure['rank'], failure['error'])})" if failure else ""
        return Next(What.AGAIN, why=why, most=NO_START, pause_s=NO_START_S, early=True)
    if said is None and not signal:
        return Next(What.END, EXIT_FAILED, unsaid=True)
    # Killed at the time limit, before its checkpoint was whole: the last one is there.
    code = EXIT_STOPPED if said is None else int(said)
    if code == EXIT_STOPPED and signal == "USR1" and not by_hand:
        return Next(What.REQUEUE, code)
    if code == EXIT_STOPPED and not signal and not by_hand:
        # Asked of the ranks alone, as Slurm does before it preempts a job: then this job is to wait for its end.
        return Next(What.WAIT, code)
    return Next(What.END, code)


def after_scoring(code: int, signal: str, *, alone: bool) -> Next:
    """What follows an evaluator whose srun has ended with `code`. `alone`: nobody will make another snapshot."""
    if signal == "USR1":
        return Next(What.END) if alone else Next(What.REQUEUE, EXIT_STOPPED)
    if code == EXIT_DONE or signal:
        return Next(What.END, code)
    return Next(What.AGAIN, why=f"the evaluator died (srun: exit code {code})")


def after_ranks(run: RunDir, component: str, code: int, signal: str) -> Next:
    """Judges, and does what the run's files are to say of it.

    Args:
        code: of srun.
        signal: as in `after_training`.
    """
    if component == "eval":
        return _done_scoring(run, code, signal)
    name_the_cause(run, _logs_before(run, component))
    found = after_training(run.read_state(), signal, by_hand=_stopped_by_hand(run))
    if found.unsaid:
        _say_last_word(run, code)
    if found.what is What.AGAIN:
        return _start_again(run, component, replace(found, why=found.why or _no_start(run, code)))
    if found.why:
        print(found.why)
    failure = run.read_state().get("failure")
    if failure:
        print(f"error: {of_rank(failure.get('rank'), failure.get('error'))}")
    if found.what is What.REQUEUE:
        run.write_state("requeued")
        told = f"stopped before the time limit with a checkpoint of step {progress(run, component)}"
        run.add_event("requeued", told, job=current_job())
        print(f"{told}; another turn follows")
    if found.what is What.WAIT:
        print("the ranks were asked to stop, and have; waiting for Slurm")
    if found.what is What.END and signal != "TERM":
        run.write_state(None, job_ended=True)  # the evaluator need not ask the scheduler
    return found


def _done_scoring(run: RunDir, code: int, signal: str) -> Next:
    found = after_scoring(code, signal, alone=signal == "USR1" and _training_is_gone(run))
    if found.what is What.REQUEUE:
        print("the evaluator's time is up; another turn follows")
    if found.what is not What.AGAIN:
        return found
    rank, words = first_to_end(run.logs, _logs_before(run, "eval"), "eval")
    how = f"srun: exit code {code}{f': {words}' if words else ''}" if rank is None else f"rank {rank}: {words}"
    return _start_again(run, "eval", replace(found, why=f"the evaluator died ({how})"))


def _say_last_word(run: RunDir, code: int) -> None:
    """Says in the run's state why its ranks have ended, who could not."""
    from trainer.faults.lock import kept_free

    log = _newest_log(run, "train")
    rank, words = first_to_end(run.logs, _logs_before(run, "train"), "train")
    who = "the training ranks" if rank is None else f"rank {rank}"
    told = f"{who} {without_a_word(f'srun: exit code {code}', words)}; see {log or run.logs}"
    if log is not None:
        print(last_lines(log))
    with kept_free(run, patience_s=DYING_S):  # else the state is that of another trainer
        run.add_event("failed", told)
        run.record_failure(EXIT_FAILED, None, told)


def _no_start(run: RunDir, code: int) -> str:
    rank, words = first_to_end(run.logs, _logs_before(run, "train"), "train")
    told = f"srun: exit code {code}" if rank is None else f"rank {rank}"
    return f"no rank has started ({told}{f': {words}' if words else ''})"


def _logs_before(run: RunDir, component: str) -> dict[str, int]:
    kinds = ("started", "started again")
    lines = (line for line in reversed(read_jobs(run)) if line.get("kind") in kinds)
    return dict(next((line.get("logs") or {} for line in lines if line.get("component") == component), {}))


def _training_is_gone(run: RunDir) -> bool:
    """Whether nobody will make another snapshot: where the ranks are in a container, only the job can ask."""
    state = run.read_state()
    job = state.get("job")
    quiet = run.clock() - run.heard(state) > 60.0
    return bool(job) and quiet and life(str(job)) is Life.OVER


def _start_again(run: RunDir, component: str, wanted: Next) -> Next:
    """Notes another start in this job, and waits before it; the end, where that has led nowhere too often."""
    job, made = current_job(), progress(run, component)
    if component == "train":
        made = int(run.read_state().get("step") or 0)
    earlier = [
        line
        for line in read_jobs(run)
        if line.get("kind") == "started again" and line.get("component") == component and line.get("job") == job
    ]
    if sum(int(line.get("progress", -1)) >= made for line in earlier) >= wanted.most:
        told = f"started again {wanted.most} times without getting further; the last reason: {wanted.why}"
        log = _newest_log(run, component)
        if log is not None:
            told += f"; see {log}"
            print(last_lines(log))
        give_up(run, component, told)
        return Next(What.END, EXIT_FAILED)
    if component == "train":
        run.start_afresh("pending")
    facts = {"progress": made, "why": wanted.why, "logs": agents_logs(run)}
    add_job(run, "started again", component=component, backend="slurm", job=job, **facts)
    kind = "started again" if component == "train" else "evaluator died"
    run.add_event(kind, f"{wanted.why}; it is started again")
    print(f"starting the ranks again: {wanted.why}")
    time.sleep(min(30.0, 0.5 * 2 ** len(earlier)) if component == "eval" else wanted.pause_s)
    return wanted


def _newest_log(run: RunDir, component: str) -> Path | None:
    """What torchrun said on the node where it said something last."""
    logs = [path for path in run.logs.glob(f"{component}-torchrun-*.log") if path.stat().st_size]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _stopped_by_hand(run: RunDir) -> bool:
    """Whether somebody asked this very start to stop."""
    for line in reversed(read_jobs(run)):
        if line.get("kind") == "started" and line.get("component") == "train":
            return False
        if line.get("kind") == DAMAGED:
            print(f"{line['why']}; it may say that the run was asked to stop, so it is taken for that")
            return True
        if line.get("kind") == "stop asked":
            return True
    return False
