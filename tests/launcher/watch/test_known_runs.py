"""The index of known runs: a run is found by its name from anywhere, and nothing depends on the index."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import vernier

from configs.errors import DataError
from configs.run.directory import RunDir
from launcher.watch.run_index import find, index_dir, known, remember


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of this test's own, and a folder without runs to be in."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "state" / "vernier" / "runs"


def make_run(path: Path) -> Path:
    path.mkdir(parents=True)
    RunDir(path).write_state("done", step=3, steps=3, exit_code=0)
    return path


def test_a_run_that_is_remembered_is_found_by_its_name_from_anywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "there" / "small")
    with pytest.raises(DataError, match=r"^small: no such directory, and no run of that name is known"):
        find("small")
    remember(run)
    remember(run)
    assert known() == [run]
    assert find("small").path == run
    assert find(Path("small")).path == run
    assert vernier("status", "small").stdout.startswith("small  done\n")


def test_a_relative_path_is_remembered_as_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "here" / "runs" / "near")
    remember(Path("runs/near"))
    monkeypatch.chdir(tmp_path)
    assert known() == [run]
    assert find("near").path == run


def test_what_lies_here_comes_before_what_is_known(tmp_path: Path) -> None:
    remember(make_run(tmp_path / "there" / "a"))
    make_run(tmp_path / "here" / "runs" / "a")
    assert find("a").path == Path("runs/a")
    make_run(tmp_path / "here" / "a")
    assert find("a").path == Path("a")


def test_a_name_of_several_runs_is_refused_with_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "same") for place in ("one", "two")]
    for run in runs:
        remember(run)
    told = vernier("status", "same", code=2).stderr
    assert told == f"error: same: 2 runs have this name; name one by its path: {runs[0]}, {runs[1]}\n"


def test_runs_that_are_gone_are_not_listed_and_the_index_is_rebuilt_by_naming_them(tmp_path: Path) -> None:
    kept, gone = make_run(tmp_path / "kept"), make_run(tmp_path / "gone")
    vernier("status", kept, gone)
    assert known() == [gone, kept]
    shutil.rmtree(gone)
    assert known() == [kept]
    shutil.rmtree(index_dir())
    assert known() == []
    vernier("status", kept)
    assert known() == [kept]


def test_without_runs_here_status_shows_all_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x", "y"):
        remember(make_run(tmp_path / name))
    from rich.console import Console

    from launcher.watch.status import run_status

    with open(tmp_path / "told", "w") as file:
        console = Console(file=file, width=200)
        run_status([], events=False, all_events=False, json_out=False, console=console)
    shown = [line.split()[:2] for line in (tmp_path / "told").read_text().splitlines() if "done" in line]
    assert shown == [["x", "done"], ["y", "done"]]


def test_a_home_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("no folder can be made in a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(run)
    assert known() == []
    assert vernier("status", run).stdout.startswith("run  done\n")


def test_strange_names_and_entries_do_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path / os.fsdecode(b"a b\n\xff"))
    remember(run)
    (index_dir() / "ffff").write_bytes(b"relative/path")
    (index_dir() / "eeee").write_bytes(b"\0")
    assert known() == [run]


def test_a_relative_state_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index_dir() == tmp_path / ".local" / "state" / "vernier" / "runs"
