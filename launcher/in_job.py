"""What the script of a job asks: may this run begin, and what follows now that its ranks have ended.

It reads and writes the run's own files; the script acts on the exit code, since what talks to the scheduler may not be
there inside of a container. Exit codes: those of `vernier`, and the ones named here.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from configs.console import open_streams, tell
from configs.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, VernierError
from configs.load import load_config
from configs.run.directory import RunDir
from configs.run.last_words import of_rank
from configs.run.script_ends import note_script_end
from configs.scheduler import Life, current_job, life
from configs.schema import Config
from eval.scored import can_be_scored
from launcher.backends.process import last_lines
from launcher.backends.rank_ends import first_to_end, name_the_cause, sizes, without_a_word
from launcher.jobs.log import DAMAGED, add_job, read_jobs
from launcher.jobs.status import jobs_of

AGAIN = 10  # start the ranks again, in this job
REQUEUE = 11  # queue this job again
WAIT = 12  # Slurm is about to end this job, and knows what follows
NOTHING = 20  # nothing is left to do
NO_START = 3  # starts in a row at which no rank got as far as its run
STARTS_AGAIN = 20  # in one job without a further step (train) or table (eval) between
DYING_S = 60.0  # for ranks of an earlier start, on a node that was lost, to be given up
FIRST_PORT, PORTS = 20000, 12000  # below what Linux gives to outgoing connections


def main(arguments: list[str] | None = None) -> int:
    """Answers one question; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.in_job", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("begin", "next", "successor", "requeued"):
        one = verbs.add_parser(verb)
        one.add_argument("run", type=Path)
        one.add_argument("component", choices=["train", "eval"])
        if verb == "next":
            one.add_argument("--code", type=int, required=True, help="of srun")
            one.add_argument("--signal", default="", help="that this job has had, if any")
        if verb == "successor":
            one.add_argument("job", help="its id")
    port = verbs.add_parser("port")
    port.add_argument("job", type=int)
    member = verbs.add_parser("member")
    member.add_argument("sweep", type=Path)
    member.add_argument("index", type=int)
    asked = parser.parse_args(arguments)
    try:
        if asked.verb == "port":
            print(free_port(asked.job))
            return EXIT_DONE
        if asked.verb == "member":
            from launcher.sweep.store import member_of

            print(member_of(asked.sweep, asked.index))
            return EXIT_DONE
        run = RunDir(asked.run)
        if asked.verb == "begin":
            note_script_end(run.path, asked.component, str(current_job()), None)  # of an earlier turn of this job
            try:
                return begin(run, asked.component)
            except VernierError as error:
                note_script_end(run.path, asked.component, str(current_job()), str(error))
                raise
        if asked.verb == "next":
            return after_ranks(run, asked.component, asked.code, asked.signal)
        named = {"job": asked.job, "after": current_job()} if asked.verb == "successor" else {"job": current_job()}
        add_job(run, asked.verb, component=asked.component, backend="slurm", **named)
        if asked.verb == "successor" and asked.component == "train":
            run.write_state(None, job=asked.job)
        return EXIT_DONE
    except VernierError as error:
        tell(f"error: {error}", sys.stderr)
        return error.exit_code


def free_port(job: int) -> int:
    """A port for the ranks to meet at: by the job's number, so that two jobs on a node do not ask for the same."""
    for offset in range(PORTS):
        port = FIRST_PORT + (job + offset) % PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise VernierError("no port is free on this node")


def begin(run: RunDir, component: str) -> int:
    """Whether the ranks may start; notes that they do.

    Gives 0: start them; NOTHING: the run is finished. Others: it may not be.
    """
    config = _config(run, component)
    run.logs.mkdir(parents=True, exist_ok=True)
    lines = read_jobs(run)
    progress = _progress(run, component)
    before = starts_without_progress(lines, component, progress)
    if component == "train":
        if run.is_finished(config.steps):
            print(f"{run.path} is finished (step {config.steps})")
            return NOTHING
        if jobs_of(lines, {}).stop_asked:  # while this job was waiting, or being queued again
            return _asked_to_stop(run)
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    limit = config.launch.requeue_limit
    if before > limit and (component == "train" or can_be_scored(run, config)):  # else there was nothing to score
        told = f"queued again {before} times without a new {'checkpoint' if component == 'train' else 'loss table'}"
        told += f" (launch.requeue_limit: {limit}); see {run.logs}, then launch it once more"
        _give_up(run, component, told)
        return EXIT_FAILED
    where = {"nodes": os.environ.get("SLURM_JOB_NODELIST"), "restart": int(restart)}
    job = current_job()
    if component == "train":
        from trainer.faults.lock import FRESH_S, check_free, holder, kept_free

        # Slurm vouches that an earlier start of this very job is over: its ranks end by themselves, if late.
        ours = int(restart) > 0 and holder(run).get("job") == job
        deadline = time.monotonic() + (config.guards.hang_s + FRESH_S if ours else DYING_S)
        while True:
            try:
                check_free(run, print)  # waits for a holder on another node, which may be the one that was lost
                with kept_free(run):
                    if jobs_of(read_jobs(run), {}).stop_asked:
                        return _asked_to_stop(run)
                    run.stop_request.unlink(missing_ok=True)
                    run.start_afresh("pending", steps=config.steps, job=job, job_ended=None)
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(2.0)
    said = _sizes(run)
    add_job(run, "started", component=component, backend="slurm", job=job, progress=progress, logs=said, **where)
    return EXIT_DONE


def _asked_to_stop(run: RunDir) -> int:
    print(f"{run.path} was asked to stop: vernier launch goes on with it")
    run.stop_request.unlink(missing_ok=True)
    run.write_state("stopping", exit_code=EXIT_STOPPED, job_ended=True)
    return NOTHING


def after_ranks(run: RunDir, component: str, code: int, signal: str) -> int:
    """What follows now that srun has ended with `code`: an exit code of the job, AGAIN or REQUEUE.

    Args:
        signal: USR1 where the time limit is near, TERM where the job is being ended from outside, else empty.
    """
    config = _config(run, component)
    if component == "eval":
        return _after_scoring(run, config, code, signal)
    follows = _after_training(run, config, code, signal)
    if follows not in (AGAIN, REQUEUE, WAIT) and signal != "TERM":
        run.write_state(None, job_ended=True)  # the evaluator need not ask the scheduler
    return follows


def _after_training(run: RunDir, config: Config, code: int, signal: str) -> int:
    component = "train"
    name_the_cause(run, _logs_before(run, component))
    state = run.read_state()
    said = state.get("exit_code")
    why = state.get("again")
    if why and not signal:
        return _start_again(run, component, str(why))
    if said is None and signal == "TERM":  # cancelled, preempted, or a node was lost: Slurm itself knows what follows
        print("the ranks were ended from outside before their last word")
        return EXIT_FAILED
    failure = state.get("failure") or {}
    early = state.get("state") == "pending" if said is None else said == EXIT_FAILED and bool(failure.get("early"))
    if early and not signal:
        first = of_rank(failure["rank"], failure["error"]) if failure else ""
        why = f"no rank has started ({first})" if failure else _no_start(run, code)
        return _start_again(run, component, why, most=NO_START, pause_s=10.0)
    if said is None and signal:
        said = EXIT_STOPPED  # killed at the time limit, before its checkpoint was whole: the last one is there
    if said is None:
        from trainer.faults.lock import kept_free

        log = _newest_log(run, component)
        rank, words = first_to_end(run.logs, _logs_before(run, component), component)
        who = "the training ranks" if rank is None else f"rank {rank}"
        told = f"{who} {without_a_word(f'srun: exit code {code}', words)}; see {log or run.logs}"
        if log is not None:
            print(last_lines(log))
        with kept_free(run, patience_s=DYING_S):  # else the state is that of another trainer
            run.add_event("failed", told)
            run.record_failure(EXIT_FAILED, None, told)
        said = EXIT_FAILED
    failure = run.read_state().get("failure")
    if failure:
        print(f"error: {of_rank(failure.get('rank'), failure.get('error'))}")
    if said == EXIT_STOPPED and signal == "USR1" and not _stopped_by_hand(run):
        run.write_state("requeued")
        told = f"stopped before the time limit with a checkpoint of step {_progress(run, component)}"
        run.add_event("requeued", told, job=current_job())
        print(f"{told}; another turn follows")
        return REQUEUE
    if said == EXIT_STOPPED and not signal and not _stopped_by_hand(run):
        # Asked of the ranks alone, as Slurm does before it preempts a job: then this script is to wait for its end.
        print("the ranks were asked to stop, and have; waiting for Slurm")
        return WAIT
    return int(said)


def starts_without_progress(lines: list[dict[str, Any]], component: str, progress: int) -> int:
    """How often in a row this component was started with what it has now, since it was last launched by hand."""
    count = 0
    for line in reversed(lines):
        if line.get("kind") == "submitted" and component in str(line.get("component")).split("+"):
            break
        if line.get("kind") == "started" and line.get("component") == component:
            if int(line.get("progress", -1)) < progress:
                break
            count += 1
    return count


def _after_scoring(run: RunDir, config: Config, code: int, signal: str) -> int:
    if signal == "USR1" and _training_is_gone(run):
        return EXIT_DONE
    if signal == "USR1":
        print("the evaluator's time is up; another turn follows")
        return REQUEUE
    if code == EXIT_DONE or signal:
        return code
    rank, words = first_to_end(run.logs, _logs_before(run, "eval"), "eval")
    how = f"srun: exit code {code}{f': {words}' if words else ''}" if rank is None else f"rank {rank}: {words}"
    return _start_again(run, "eval", f"the evaluator died ({how})")


def _no_start(run: RunDir, code: int) -> str:
    rank, words = first_to_end(run.logs, _logs_before(run, "train"), "train")
    told = f"srun: exit code {code}" if rank is None else f"rank {rank}"
    return f"no rank has started ({told}{f': {words}' if words else ''})"


def _sizes(run: RunDir) -> dict[str, int]:
    """Bytes in the logs of what starts ranks, of those before a start."""
    return {name: size for name, size in sizes(run.logs).items() if "torchrun" in name}


def _logs_before(run: RunDir, component: str) -> dict[str, int]:
    kinds = ("started", "started again")
    lines = (line for line in reversed(read_jobs(run)) if line.get("kind") in kinds)
    return dict(next((line.get("logs") or {} for line in lines if line.get("component") == component), {}))


def _training_is_gone(run: RunDir) -> bool:
    """Whether nobody will make another snapshot: where the ranks are in a container, only this script can ask."""
    state = run.read_state()
    job = state.get("job")
    quiet = run.clock() - run.heard(state) > 60.0
    return bool(job) and quiet and life(str(job)) is Life.OVER


def _start_again(run: RunDir, component: str, why: str, *, most: int = STARTS_AGAIN, pause_s: float = 0.0) -> int:
    """AGAIN, unless that has led nowhere too often in this job."""
    job, progress = current_job(), _progress(run, component)
    if component == "train":
        progress = int(run.read_state().get("step") or 0)
    earlier = [
        line
        for line in read_jobs(run)
        if line.get("kind") == "started again" and line.get("component") == component and line.get("job") == job
    ]
    if sum(int(line.get("progress", -1)) >= progress for line in earlier) >= most:
        told = f"started again {most} times without getting further; the last reason: {why}"
        log = _newest_log(run, component)
        if log is not None:
            told += f"; see {log}"
            print(last_lines(log))
        _give_up(run, component, told)
        return EXIT_FAILED
    if component == "train":
        run.start_afresh("pending")
    said = _sizes(run)
    add_job(run, "started again", component=component, backend="slurm", job=job, progress=progress, why=why, logs=said)
    run.add_event("started again" if component == "train" else "evaluator died", f"{why}; it is started again")
    print(f"starting the ranks again: {why}")
    time.sleep(min(30.0, 0.5 * 2 ** len(earlier)) if component == "eval" else pause_s)
    return AGAIN


def _give_up(run: RunDir, component: str, told: str) -> None:
    print(f"error: {told}")
    run.add_event("failed" if component == "train" else "evaluator died", told)
    if component == "train":
        run.write_state(
            "failed", exit_code=EXIT_FAILED, failure={"rank": None, "error": told, "time": time.time()}, job_ended=True
        )


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


def _config(run: RunDir, component: str) -> Config:
    return load_config(run.path / f"{component}-config.yaml")


def _progress(run: RunDir, component: str) -> int:
    """What no start may lose: the step of the newest checkpoint (-1: none), or how many steps are scored."""
    if component == "train":
        return max(run.whole_steps(run.checkpoints), default=-1)
    return len({path.name.partition("@")[0] for path in run.losses.glob("*/step-*.parquet")})


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
