"""`vernier board`: TensorBoard over runs, on loopback, with the line that reaches it from elsewhere.

On this machine for whoever asks; or inside a run's job (`python -m launcher.watch.tensorboard RUN --in-job`), found by
`status`.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.console import open_streams, tell
from configs.errors import EXIT_DONE, EXIT_FAILED, ConfigError, DataError, VernierError
from configs.files.atomic import read_json, write_atomic
from configs.run.directory import RunDir
from configs.scheduler import current_job, node_name
from launcher.backends.process import TERM_GRACE_S, end, last_lines, start
from launcher.jobs.log import read_jobs
from launcher.jobs.status import SchedulerAnswer, ask_scheduler, jobs_of, known_job
from launcher.watch.run_index import find, known

OPEN_TO_ALL = "loopback is open to every user of a machine: on a node that others share they can look, too"
LOOPBACK = "127.0.0.1"
STARTS = 5  # in a job; a port that was free may be taken a moment later
ANSWER_S = 120.0  # TensorBoard's imports, from a slow shared file system
POLL_S = 0.2


def run_board(runs: list[Path], *, port: int | None, console: Console) -> int:
    """Serves the runs' TensorBoard folders until Ctrl-C; gives TensorBoard's exit code.

    Raises:
        DataError: there is no run, or one without TensorBoard's files.
    """
    chosen = [_run(path) for path in runs] or sorted(p.parent for p in Path("runs").glob("*/tensorboard"))
    chosen = chosen or [path for path in known() if (path / "tensorboard").is_dir()]
    if not chosen:
        raise DataError("board: no runs under runs/; name one: vernier board RUN")
    for run in chosen:
        if not (run / "tensorboard").is_dir():
            raise DataError(f"board: {run} has no tensorboard/ folder; is it a run directory?")
    names = [run.absolute().name for run in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"board: two runs are named {max(names, key=names.count)}; show them one at a time")
    for name, run in zip(names, chosen, strict=True):
        _tell_of_one_in_its_job(name, RunDir(run), console)
    port = port or free_port()
    folder = Path(tempfile.mkdtemp(prefix="vernier-board-"))
    for name, run in zip(names, chosen, strict=True):
        (folder / name).symlink_to((run / "tensorboard").absolute())
    logdir = chosen[0] / "tensorboard" if len(chosen) == 1 else folder
    console.print(f"TensorBoard of {', '.join(names)}: {_url(port)}", markup=False, soft_wrap=True)
    console.print("from your own machine, first:", markup=False)
    console.print(f"  {tunnel(port)}", markup=False, soft_wrap=True)
    console.print(OPEN_TO_ALL, markup=False, soft_wrap=True)
    try:
        process = start(_tensorboard(logdir, port), dict(os.environ), folder / "tensorboard.log")
        stop_with(process)
        code = process.wait()
        if code > 0:
            said = last_lines(folder / "tensorboard.log")
            raise VernierError(f"board: TensorBoard ended with exit code {code}\n{said}")
        return EXIT_DONE  # asked to stop
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(named: Path) -> Path:
    if (named / "tensorboard").is_dir():
        return named
    try:
        return find(named).path
    except DataError:
        if named.exists():
            return named
        raise


def _tensorboard(logdir: Path, port: int) -> list[str]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    return [*command, "--host", LOOPBACK, "--port", str(port), "--reload_interval", "5"]


def _url(port: int) -> str:
    return f"http://{LOOPBACK}:{port}/"


def stop_with(process: subprocess.Popen[bytes]) -> None:
    """Has Ctrl-C and SIGTERM end the process, also where a shell started us with Ctrl-C ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: process.terminate())


def tunnel(port: int, host: str | None = None, login: str | None = None) -> str:
    """The ssh line that makes the board on a host reachable from a laptop.

    Args:
        host: where the board is; default this machine.
        login: the machine to go through, where `host` cannot be reached directly.
    """
    host = host or node_name()
    user = _user()
    through = f"-J {login} " if login else ""
    return f"ssh {through}-N -L {port}:{LOOPBACK}:{port} {f'{user}@' if user else ''}{host}"


def _this_machine() -> str:
    """This machine as one may go through it from elsewhere: user@name."""
    user, name = _user(), socket.getfqdn()
    name = socket.gethostname() if name.startswith("localhost") else name
    return f"{user}@{name}" if user else name


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that knows no name for us
        return ""


def free_port() -> int:
    """A port that is free now; 6006, TensorBoard's own, where it can be had.

    Raises:
        ConfigError: none is free.
    """
    for wanted in (6006, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError("board: no free port; give one with --port")


def board_file(run: RunDir) -> Path:
    """Where a board inside a run's job says how it is reached: host, address, port, pid, job, restarts, url."""
    return run.path / "board.json"


def live_board(run: RunDir, told: SchedulerAnswer, login: str | None) -> dict[str, Any] | None:
    """What `board.json` says of a board inside the run's job, with the `ssh` line; None unless that job runs now.

    Args:
        told: what the scheduler says of the run's jobs (`jobs.status.ask_scheduler`).
        login: the site's login node; default this machine.
    """
    try:
        found = dict(read_json(board_file(run)))
        job = known_job(told, str(found["job"]))
        # The file of a job that was killed and started again tells of a node that it was on before.
        if job is None or job.state != "RUNNING" or job.restarts != int(found["restarts"]):
            return None
        port, host = int(found["port"]), str(found["host"])
    except (DataError, KeyError, TypeError, ValueError):
        return None
    here = host in (node_name(), socket.gethostname())
    return {**found, "ssh": tunnel(port, host, None if here else login or _this_machine())}


def _tell_of_one_in_its_job(name: str, run: RunDir, console: Console) -> None:
    if not board_file(run).is_file():
        return
    told = ask_scheduler([run])
    found = live_board(run, told, jobs_of(read_jobs(run), told).login)
    if found is not None:
        said = f"{name} has a board inside its job {found['job']}, on {found['host']}: {found['url']}, through"
        console.print(f"{said}\n  {found['ssh']}", markup=False, soft_wrap=True)


def serve_in_job(run: RunDir) -> int:
    """Serves a run from inside its job until SIGTERM, or the end of the job's script. Gives the exit code.

    `board.json` says meanwhile how it is reached.

    Raises:
        VernierError: TensorBoard does not come up.
    """
    node = node_name()
    signalled: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # Slurm's last two are not for us
        signal.signal(number, lambda number, _frame: signalled.append(number))
    script = os.getppid()

    def over() -> bool:
        # A script that has ended leaves its children behind, where Slurm knows them by their parents only.
        return signal.SIGTERM in signalled or signal.SIGINT in signalled or os.getppid() != script

    log = run.logs / "board.log"
    for attempt in range(1, STARTS + 1):
        port = free_port()
        process = start(_tensorboard(run.path / "tensorboard", port), dict(os.environ), log)
        try:
            if _came_up(process, port, over):
                facts = {"host": node, "address": LOOPBACK, "port": port, "pid": os.getpid(), "job": current_job()}
                facts |= {"restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0), "url": _url(port)}
                write_atomic(board_file(run), json.dumps(facts, indent=1))
                print(f"TensorBoard of {run.path}: {_url(port)} on {node}", flush=True)
                while process.poll() is None and not over():
                    time.sleep(POLL_S)
            if over():
                return EXIT_DONE
        finally:
            end(process, TERM_GRACE_S)
            _withdraw(run, node)
        if attempt == STARTS:
            break
        time.sleep(1.0)
    raise VernierError(f"board: TensorBoard does not come up\n{last_lines(log)}")


def _came_up(process: subprocess.Popen[bytes], port: int, over: Callable[[], bool]) -> bool:
    """Whether this TensorBoard, and no one else's process, answers on the port."""
    from urllib.request import ProxyHandler, build_opener

    directly = build_opener(ProxyHandler({}))  # a cluster's http_proxy knows nothing of our loopback
    deadline = time.monotonic() + ANSWER_S
    while process.poll() is None and not over() and time.monotonic() < deadline:
        with suppress(OSError), directly.open(f"{_url(port)}data/logdir", timeout=5) as answer:
            return answer.status == 200 and process.poll() is None  # it ends at once where another has the port
        time.sleep(POLL_S)
    return False


def _withdraw(run: RunDir, node: str) -> None:
    """Removes `board.json`, where it is ours."""
    with suppress(DataError, OSError, AttributeError):
        found = read_json(board_file(run))
        if (found.get("host"), found.get("pid")) == (node, os.getpid()):
            board_file(run).unlink()


def main(arguments: list[str] | None = None) -> int:
    """`python -m launcher.watch.tensorboard RUN --in-job`, as a job script has it; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.watch.tensorboard", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--in-job", action="store_true", required=True, help="say in board.json how it is reached")
    asked = parser.parse_args(arguments)
    try:
        return serve_in_job(RunDir(asked.run.absolute()))
    except (VernierError, OSError) as error:
        tell(f"error: {error}", sys.stderr)
        return error.exit_code if isinstance(error, VernierError) else EXIT_FAILED


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
