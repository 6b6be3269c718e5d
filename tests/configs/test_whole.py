"""Directories of ours are whole or not there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.files.atomic import clear_unfinished, verify, whole_directory
from configs.run.directory import RunDir, read_jsonl


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    final = tmp_path / "thing"
    with whole_directory(final, {"kind": "test"}) as part:
        (part / "a.bin").write_bytes(b"12345678")
        (part / "sub").mkdir()
        (part / "sub" / "b.txt").write_text("text")
    return final


def test_a_whole_directory_verifies(whole: Path) -> None:
    assert set(verify(whole, "test")["files"]) == {"a.bin", "sub/b.txt"}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
        (lambda d: (d / "a.bin").write_bytes(b"123"), "cut short or changed: 3 bytes, its manifest says 8"),
        (lambda d: (d / "a.bin").write_bytes(b"12345679"), "changed since it was written"),
        (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_what_was_harmed_is_found_and_named(whole: Path, harm, said: str) -> None:
    harm(whole)
    with pytest.raises(DataError, match=said):
        verify(whole, "test")


def test_another_kind_of_directory_is_refused(whole: Path) -> None:
    with pytest.raises(DataError, match="expected a checkpoint, found test"):
        verify(whole, "checkpoint")


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_directory(tmp_path / "thing", {"kind": "test"}) as part:
            (part / "a").write_text("x")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_that_looks_whole_and_can_be_repeated(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from configs.files.atomic import whole_directory\n"
        "with whole_directory(Path(sys.argv[1]), {'kind': 'test'}) as part:\n"
        "    (part / 'a').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    final = tmp_path / "thing"
    done = subprocess.run([sys.executable, "-c", code, str(final)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    with whole_directory(final, {"kind": "test"}) as part:
        assert list(part.iterdir()) == []
    verify(final)


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_long_events_of_several_processes_do_not_cut_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from configs.run.directory import RunDir\n"
        "for i in range(200): RunDir(Path(sys.argv[1])).add_event('went back', sys.argv[2] * 5000, step=i)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], cwd=Path(__file__).parents[2])
        for name in "abc"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = RunDir(tmp_path).events.read_text().splitlines()
    assert sorted((e["message"][0], e["step"]) for e in map(json.loads, lines)) == [
        (name, step) for name in "abc" for step in range(200)
    ]


def test_state_keeps_what_is_not_said_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_state("running", step=3, attempt=1)
    run.write_state("done", exit_code=0)
    state = run.read_state()
    assert (state["state"], state["step"], state["attempt"], state["exit_code"]) == ("done", 3, 1, 0)
    assert state["heartbeat"] > 0
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "state.json"]  # the first is locked for a change


def test_what_a_killed_writer_left_of_a_file_is_cleared_and_what_one_at_work_writes_stays(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from configs.files.atomic import write_atomic
        os.replace = lambda *_: os.kill(os.getpid(), int(sys.argv[2]))
        write_atomic(Path(sys.argv[1]), "half")
    """
    root, path = Path(__file__).parents[2], tmp_path / "step-1.parquet"
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run([*command, str(int(signal.SIGKILL))], cwd=root, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".step-1.parquet.")
    with subprocess.Popen([*command, str(int(signal.SIGSTOP))], cwd=root) as at_work:
        os.waitid(os.P_PID, at_work.pid, os.WSTOPPED)
        clear_unfinished(tmp_path, "step-*.parquet")
        (its,) = tmp_path.iterdir()
        assert its != left
        at_work.kill()
    clear_unfinished(tmp_path, "step-*.parquet")
    assert not list(tmp_path.iterdir())
