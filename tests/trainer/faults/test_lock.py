"""One writer a run: who holds it, who has lost it, and a state that several processes change without losing a word."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from configs.errors import ConfigError, VernierError
from configs.run.directory import RunDir
from trainer.faults.lock import FRESH_S, RunLock, check_free, kept_free, sole_starter


def in_a_process(code: str, run: Path, **options) -> subprocess.Popen[str]:
    """Runs code that finds the run as `run`."""
    start = f"from pathlib import Path\nfrom configs.run.directory import RunDir\nrun = RunDir(Path({str(run)!r}))\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", start + code]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def left_by_another_host(run: RunDir, silent_s: float) -> None:
    run.lock.write_text(json.dumps({"host": "node1", "pid": 17, "started": "2026-01-01 10:00:00", "attempt": 3}))
    heard = time.time() - silent_s
    os.utime(run.lock, (heard, heard))


def test_a_lock_replaced_by_another_process_is_no_longer_ours(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    lock = RunLock(run)
    lock.acquire(3)
    assert lock.still_ours()
    lock.check_current()
    other = in_a_process(
        "import os\nfrom trainer.faults.lock import RunLock\n"
        "os.rename(run.lock, run.path / 'old')\nRunLock(run).acquire(4)\n",
        tmp_path,
    )
    assert other.wait(20) == 0, other.communicate()
    assert not lock.still_ours()
    with pytest.raises(VernierError) as error:
        lock.check_current()
    assert str(error.value).startswith(f"attempt 3 is no longer current: attempt 4 of process {other.pid} on ")
    assert str(error.value).endswith("holds the run; nothing was written")
    lock.release()
    assert "attempt" in run.lock.read_text()  # the other's word stays

    run.lock.unlink()
    lock.acquire(5)
    run.lock.unlink()
    with pytest.raises(VernierError, match="lock was removed or replaced; nothing was written"):
        lock.check_current()


def test_who_is_refused_learns_who_holds_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    code = "from trainer.faults.lock import RunLock\nRunLock(run).acquire(1)\nprint('held', flush=True)\n"
    other = in_a_process(f"{code}import time\ntime.sleep(60)", tmp_path)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        who = f"is held by process {other.pid} on {socket.gethostname()} since "
        with pytest.raises(ConfigError, match=who):
            RunLock(run).acquire(2)
        with pytest.raises(ConfigError, match=who):
            check_free(run, print)
        with pytest.raises(ConfigError, match=who), kept_free(run):
            pass
    finally:
        other.kill()
        other.wait()
    ours = pytest.raises(ConfigError, match=f"is held by process {os.getpid()} on ")
    with kept_free(run), sole_starter(run), ours, sole_starter(run):  # the kernel has let go
        pass
    RunLock(run).acquire(2)


def test_a_run_is_taken_over_from_another_host_once_that_is_silent(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    left_by_another_host(run, FRESH_S + 40)
    lock = RunLock(run)
    lock.acquire(4)
    assert lock.still_ours()
    (event,) = run.read_events()
    assert event["kind"] == "took over"
    assert event["message"].startswith("took over from process 17 on node1 since 2026-01-01 10:00:00, which has not")
    assert 99 < event["detail"]["silent_s"] < 110
    lock.release()

    left_by_another_host(run, FRESH_S - 2)  # dead, though not for long: it is waited for
    told: list[str] = []
    check_free(run, told.append)
    assert told[0].endswith("since 2026-01-01 10:00:00; waiting up to 2 s to see whether it is alive")


def test_a_holder_on_another_host_whose_heart_beats_is_left_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    left_by_another_host(run, 1)
    beating = in_a_process("import time\nwhile True:\n    time.sleep(0.2)\n    run.beat()", tmp_path)
    try:
        with pytest.raises(ConfigError, match="is held by process 17 on node1"):
            RunLock(run).acquire(4)
    finally:
        beating.kill()
        beating.wait()
    assert json.loads(run.lock.read_text())["attempt"] == 3


def test_heartbeats_of_several_processes_never_overwrite_a_failure(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_state("running", exit_code=None, failure=None, again=None)
    beats = [in_a_process(f"for n in range(300): run.write_state(None, at{k}=n)", tmp_path) for k in range(3)]
    late = "import time\ntime.sleep(0.1)\nrun.record_failure({code}, {code}, 'rank {code} failed')"
    failures = [in_a_process(late.format(code=code), tmp_path) for code in (1, 2)]
    for process in beats + failures:
        assert process.wait(60) == 0, process.communicate()
    state = run.read_state()
    assert [state[f"at{k}"] for k in range(3)] == [299] * 3  # each process's own words too
    assert state["state"] == "failed"
    assert state["exit_code"] == state["failure"]["rank"]  # the first, as a whole
    assert state["failure"]["error"] == f"rank {state['exit_code']} failed"
    assert not list(tmp_path.glob(".state*"))


def test_a_wish_to_be_started_again_counts_more_than_a_failure_that_follows_from_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_state("stopping", exit_code=75, failure=None, again="out of memory")
    assert run.record_failure(1, 1, "connection closed by peer", begun=True)
    assert run.read_state()["exit_code"] == 75
    assert run.record_failure(2, 0, "steps: -1 is not allowed")  # of a later start, which did not get so far
    assert run.read_state()["exit_code"] == 2


def test_a_full_disk_costs_a_heartbeat_and_an_event_and_no_traceback(tmp_path: Path) -> None:
    RunDir(tmp_path).write_state("running", exit_code=None)
    RunDir(tmp_path).add_event("started", "attempt 1")
    code = """
from configs.errors import VernierError
run.write_state(None, step=7)
run.add_event("checkpoint", "step-00000007")
print(run.record_failure(1, 0, "no space left"))
try:
    run.write_state("stopping", exit_code=75)
except VernierError as error:
    print(error)
"""

    def no_byte_more() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    out, err = in_a_process(code, tmp_path, preexec_fn=no_byte_more).communicate(timeout=20)
    assert out == f"False\n{tmp_path / 'state.json'}: 'stopping' cannot be written (File too large)\n"
    assert err == f"{tmp_path / 'events.jsonl'}: cannot be written (File too large): checkpoint: step-00000007\n"
    state = RunDir(tmp_path).read_state()
    assert (state["state"], state.get("step")) == ("running", None)


def test_a_line_that_a_full_disk_has_cut_spoils_no_later_event(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.add_event("started", "attempt 1")
    with open(run.events, "a") as file:
        file.write('{"time": 1, "kind": "chec')
    run.add_event("failed", "no space left")
    assert [event["kind"] for event in run.read_events()] == ["started", "failed"]


def test_a_beat_of_a_time_to_come_is_waited_for_no_longer_than_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.faults.lock.FRESH_S", 2.0)
    run = RunDir(tmp_path)
    left_by_another_host(run, -7200)  # its clock, or ours, was set back by two hours
    assert run.heard(run.read_state()) == 0
    began = time.monotonic()
    check_free(run, lambda told: None)
    assert time.monotonic() - began < 10
    with kept_free(run):
        pass
