"""A job from its first line of Python to its end. It takes its script's place, so that Slurm's signals reach it.

It asks whether the run may begin, starts one agent a node by srun, hands on what Slurm signals, and does what follows
when the ranks have ended. The truth about a run is its `state.json`, since torchrun and srun lose exit codes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from configs.console import tell
from configs.errors import EXIT_FAILED, EXIT_STOPPED, VernierError
from configs.run.directory import RunDir
from configs.run.script_ends import note_script_end
from configs.scheduler import current_job
from launcher.backends.sbatch import OF_A_JOB, OF_THE_USER
from launcher.jobs.log import add_job
from launcher.jobs.plan import Component
from launcher.jobs.run.after import Next, What, after_ranks
from launcher.jobs.run.begin import begin
from launcher.jobs.run.meet import Meeting, free_port, meeting_of
from launcher.jobs.run.steps import agent, preflight, prepare_container, step, step_environment
from launcher.jobs.run.surroundings import enter
from launcher.jobs.spec import JobSpec, read_spec

ENDED_BY_SLURM_S = 600.0  # for Slurm to end a job that it has asked to end
REQUEUED_S = 60.0  # for it to end one that is queued again
HEARD_S = 20.0  # after a request that has failed: it may have been heard all the same
TIDY_S = 20.0  # for the nodes to remove the job's folder


def main(arguments: list[str] | None = None) -> int:
    """Runs a job; gives its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.jobs.run", description=__doc__)
    parser.add_argument("run", type=Path, help="its folder; of a sweep's task, the sweep's")
    parser.add_argument("component", choices=["train", "eval", "train+eval"])
    asked = parser.parse_args(arguments)
    given = dict(os.environ)
    component, run = str(asked.component).partition("+")[0], RunDir(asked.run)
    try:
        spec = read_spec(run, asked.component)
        if spec.tasks:
            from launcher.sweep.store import member_of

            run = RunDir(Path(member_of(run.path, int(os.environ["SLURM_ARRAY_TASK_ID"]))))
        note_script_end(run.path, component, str(current_job()), None)  # of an earlier turn of this job
        return Job(run, spec, given).run_to_end()
    except VernierError as error:
        note_script_end(run.path, component, str(current_job()), str(error))
        tell(f"error: {error}", sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        note_script_end(run.path, component, str(current_job()), f"{type(error).__name__}: {error}")
        return EXIT_FAILED


class Job:
    """One job of a run: its steps, and the signals that it was sent."""

    def __init__(self, run: RunDir, spec: JobSpec, given: dict[str, str]) -> None:
        """`given`: the environment as the script handed it over, which a successor of this job gets too."""
        self.run, self.spec, self.given = run, spec, given
        self.jobs = Path(spec.script).parent
        self.signalled = ""  # USR1: the time limit is near; TERM: cancelled, preempted, or a node was lost
        self.first = spec.groups[0]
        self.steps: dict[str, subprocess.Popen[bytes]] = {}  # sruns that start ranks, by rank-group
        self.board: subprocess.Popen[bytes] | None = None
        self.scratch = ""
        self.scores: threading.Thread | None = None
        self.scores_end = False  # the evaluator's ranks are not to be started again

    def run_to_end(self) -> int:
        """Does all of it; gives the exit code.

        Raises:
            VernierError: the ranks cannot be started; the run's state is not touched by that.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            raise VernierError("launcher.jobs.run: this is no job of Slurm's; vernier launch --on slurm submits one")
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self.scratch = enter(self.spec, job)
            os.environ["RUN"] = str(self.run.path)
            prepare_container(self.spec, self.jobs)
            code = begin(self.run, self.first.name)
            if code is not None:
                return self._leave(code)
            if self.signalled and self.first.name == "train":
                self._ask_to_stop()  # once more: what was asked before the run began is forgotten
            if len(self.spec.groups) > 1:
                self._begin_scoring()
            follows = self._run_ranks(self.first)
            if self.scores is not None:
                self.scores_end = follows.what is What.REQUEUE or bool(self.signalled)
                if self.scores_end:
                    self._end_step("eval")
                self.scores.join()  # it ends when all is scored
            return self._leave(self._follow(follows))
        finally:
            self.scores_end = True  # whatever ends this job ends its evaluator
            self._end_step("eval")
            self._tidy()

    def _begin_scoring(self) -> None:
        """Starts the evaluator's part of a heterogeneous job; training goes on without one that leads nowhere."""
        try:
            if begin(self.run, "eval") is not None:
                return
        except VernierError as error:
            note_script_end(self.run.path, "eval", str(current_job()), str(error))
            print(f"error: {error}", flush=True)
            return
        self.scores = threading.Thread(target=self._score, name="scoring")
        self.scores.start()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = signal.Signals(number).name.removeprefix("SIG")
        if self.first.name == "eval":
            self._end_step("eval")  # what is scored so far is kept
            return
        self._ask_to_stop()
        if number == signal.SIGUSR1:
            # A checkpoint that takes too long is given up for the one before, while there is time to be queued again.
            limit = threading.Timer(max(self.spec.signal_s - 30, self.spec.signal_s // 2, 1), self._kill_steps)
            limit.daemon = True
            limit.start()

    def _ask_to_stop(self) -> None:
        os.write(1, f"{self.signalled}: the ranks are asked to stop with a checkpoint\n".encode())
        with suppress(OSError):
            self.run.stop_request.write_text("stop\n")

    def _kill_steps(self) -> None:
        subprocess.run(["scancel", "--signal=KILL", os.environ["SLURM_JOB_ID"]], check=False)

    def _end_step(self, name: str) -> None:
        process = self.steps.get(name)
        if process is not None:
            process.terminate()

    def _run_ranks(self, group: Component) -> Next:
        """Starts a rank-group, again and again where that helps; gives what follows."""
        part = self.spec.groups.index(group) if len(self.spec.groups) > 1 else None
        suffix = "" if part is None else f"_HET_GROUP_{part}"
        job = int(os.environ[f"SLURM_JOB_ID{suffix}"])
        meeting = meeting_of(os.environ[f"SLURM_JOB_NODELIST{suffix}"], job)
        environment = self._environment(group, meeting)
        own = group is self.first
        if own and self.spec.preflight:
            bad = self._start("preflight", group, part, preflight(self.spec, group), environment).wait()
            if bad:
                told = f"preflight could not be run (exit code {bad})"  # where it could, the run's state says more
                note_script_end(self.run.path, group.name, str(current_job()), told)
                return Next(What.END, EXIT_FAILED)
        if own and self.spec.board:
            command = [sys.executable, "-m", "launcher.watch.tensorboard", str(self.run.path), "--in-job"]
            self.board = subprocess.Popen(command)
        while True:
            words = agent(self.spec, group, meeting, self.run.path)
            code = self._start(group.name, group, part, words, environment).wait()
            asked = self.signalled if own else "TERM" if self.scores_end else ""
            follows = after_ranks(self.run, group.name, code if code >= 0 else 128 - code, asked)
            if follows.what is not What.AGAIN:
                return follows
            meeting = replace(meeting, port=free_port(job))  # what ended them may have been another's on theirs
            environment = self._environment(group, meeting)

    def _environment(self, group: Component, meeting: Meeting) -> dict[str, str]:
        """That of a rank-group's steps; says where its ranks meet."""
        environment = step_environment(group, meeting, self.spec.variables)
        interfaces = " ".join(f"{n}={environment.get(n, '')}" for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
        print(f"ranks meet at {meeting.address}:{meeting.port}; {interfaces}", flush=True)
        return environment

    def _start(
        self, name: str, group: Component, part: int | None, words: list[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        command = step(self.spec, group, part, words, self.jobs, self.scratch)
        sys.stdout.flush()
        self.steps[name] = subprocess.Popen(command, env=environment)
        return self.steps[name]

    def _score(self) -> None:
        """The evaluator's part of a heterogeneous job, beside training."""
        try:
            self._run_ranks(self.spec.groups[1])
        except VernierError as error:
            print(f"error: {error}", flush=True)

    def _follow(self, follows: Next) -> int:
        """Does what follows the ranks; gives the exit code."""
        if follows.what is What.WAIT:
            self.signalled = "TERM"
            return EXIT_STOPPED
        if follows.what is not What.REQUEUE:
            return follows.code
        job, task = current_job(), os.environ.get("SLURM_ARRAY_TASK_ID")
        add_job(self.run, "requeued", component=self.first.name, backend="slurm", job=job)
        self._tidy()
        if self.spec.requeue:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            for _ in range(3):
                if subprocess.run(["scontrol", "requeue", str(job)], check=False).returncode == 0:
                    time.sleep(REQUEUED_S)  # Slurm ends this process
                    return EXIT_STOPPED
                time.sleep(HEARD_S)
        # Where a job may not be queued again, a successor does the same, with the environment that this one was given.
        kept = {name: value for name, value in self.given.items() if not _is_of_this_job(name)}
        command = ["sbatch", "--parsable", *([] if task is None else [f"--array={task}"]), self.spec.script]
        done = subprocess.run(command, env=kept, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return EXIT_FAILED
        successor = done.stdout.strip().partition(";")[0] + ("" if task is None else f"_{task}")
        add_job(self.run, "successor", component=self.first.name, backend="slurm", job=successor, after=job)
        if self.first.name == "train":
            self.run.write_state(None, job=successor)
        return EXIT_STOPPED

    def _leave(self, code: int) -> int:
        """Waits for Slurm where it is about to end this job: one that was preempted would have failed by itself."""
        if self.signalled == "TERM" and code:
            self._tidy()
            time.sleep(ENDED_BY_SLURM_S)
        return code

    def _tidy(self) -> None:
        """Ends the board, and removes the job's folder from every node's disk."""
        if self.board is not None:
            self.board.terminate()
            self.board.wait()
            self.board = None
        if not self.scratch:
            return
        own, self.scratch = os.environ["TMPDIR"], ""
        if len(self.spec.groups) > 1 or self.first.nodes > 1:
            parts = ["--het-group=0,1"] if len(self.spec.groups) > 1 else []
            command = ["srun", *parts, "--ntasks-per-node=1", "rm", "-rf", own]
            with suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(command, stderr=subprocess.DEVNULL, timeout=TIDY_S, check=False)
        shutil.rmtree(own, ignore_errors=True)


def _is_of_this_job(name: str) -> bool:
    """Whether Slurm has set a variable for this job alone, so that the next one must not have it."""
    return name.startswith(OF_A_JOB) and name not in OF_THE_USER
