"""Links that lead nowhere, names that are no UTF-8, modules of a user's own that are called as ours are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, vernier

from configs.own import put_first_for_children


@pytest.mark.parametrize("where", ["gone", "gone/run"])
@pytest.mark.parametrize("key", ["run.dir", "data.dir"])
def test_a_link_that_leads_nowhere_is_refused_and_named(key: str, where: str, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("/nowhere/at/all")
    settings = {"data.dir": tiny_data, "run.dir": tmp_path / "run"} | {key: tmp_path / where}
    said = vernier("train", TINY, *(f"{name}={path}" for name, path in settings.items()), code=2).stderr
    assert said.startswith(
        f"error: {key}: {tmp_path / 'gone'} is a link to /nowhere/at/all, which is not there; is its"
    )
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_fresh_on_a_link_moves_the_link_and_leaves_what_it_leads_to(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to("real")
    settings = [TINY, "steps=4", "eval.placement=none", f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}"]
    vernier("train", *settings)
    before = (tmp_path / "real" / "metrics.jsonl").read_text()
    said = vernier("train", *settings, "--fresh").stderr
    (old,) = tmp_path.glob("run.old-*")
    assert f"the earlier run is now {old}, a link to real as before; the new one is a folder at " in said
    assert (tmp_path / "real" / "metrics.jsonl").read_text() == (old / "metrics.jsonl").read_text() == before
    assert not (tmp_path / "run").is_symlink()


def test_data_in_an_empty_folder_behind_a_link_is_prepared_there(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to("real")
    vernier("prepare", TINY, f"data.dir={tmp_path / 'data'}")
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()


@pytest.mark.real
def test_a_name_that_is_no_utf_8_is_refused_in_a_line(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/n\xe4me")
    said = vernier("prepare", TINY, f"data.dir={odd}", code=2).stderr
    assert said.startswith(
        f"error: data.dir: {tmp_path}/n\\xe4me has bytes that are no UTF-8, which settings are; rename"
    )
    os.mkdir(odd)
    command = [
        *VERNIER,
        "prepare",
        str(ROOT / TINY),
        f"data.source={ROOT / 'tests/data/corpus.jsonl'}",
        "data.dir=data",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=odd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: data.dir: " in done.stderr
    assert "n\\xe4me/data has bytes that are no UTF-8, which libraries cannot open; rename it" in done.stderr
    assert not os.listdir(odd)


def test_our_own_packages_are_found_whatever_else_is_called_so(tmp_path: Path) -> None:
    for name in ("trainer.py", "eval.py", "configs.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [Path(sys.executable).with_name("vernier"), "train", "no-such.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config: no-such.yaml is not a file")

    put_first_for_children(environment)  # as the command does for all that it starts
    assert environment["PYTHONPATH"] == f"{ROOT}{os.pathsep}{tmp_path}"
    for module in ("trainer", "eval", "launcher.backends.agent"):
        command = [sys.executable, "-m", module, "--help"]
        safe = {**environment, "PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=safe, capture_output=True, text=True, check=False)
        assert f"usage: python -m {module}" in done.stdout, done.stderr


def test_a_pythonpath_that_hides_nothing_stays_as_it_is(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(tmp_path)}
    put_first_for_children(environment)
    assert environment == {"PYTHONPATH": str(tmp_path)}
