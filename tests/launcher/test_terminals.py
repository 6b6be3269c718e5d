"""What a terminal, a pipe or a log cannot take ends nothing, and what would steer one is written out."""

import io
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, vernier

from configs.console import SHOWABLE, console, printable

SHORT = [TINY, "steps=4", "checkpoint.every=4", "snapshot.every=4"]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_without_our_signs_is_given_others(encoding: str, tiny_run: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*VERNIER, "compare", str(tiny_run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert "loss ± SE" in said or "loss +- SE" in said
    assert "-" in said.split("better")[0]


def test_training_ends_as_its_state_says_whatever_reads_it(tiny_data: Path, tmp_path: Path) -> None:
    command = [*VERNIER, "train", *SHORT, f"data.dir={tiny_data}"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    with open("/dev/full", "w") as full:
        for name, streams in (
            ("latin", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}),
            ("full", {"stdout": full, "stderr": full}),
        ):
            done = subprocess.run([*command, f"run.dir={tmp_path / name}"], cwd=ROOT, check=False, **streams)
            assert done.returncode == 0
    gone, end = os.pipe()
    os.close(gone)
    done = subprocess.run([*command, f"run.dir={tmp_path / 'gone'}"], cwd=ROOT, stdout=end, stderr=end, check=False)
    assert done.returncode == 0


@pytest.mark.real
def test_a_report_for_which_there_is_no_room_is_an_error_in_a_line(tiny_run: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [*VERNIER, "compare", str(tiny_run), "--json"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: what was to be printed cannot be written (No space left on device)\n"


def test_what_would_steer_a_terminal_is_written_out(tmp_path: Path) -> None:
    (tmp_path / "red.yaml").write_text((ROOT / TINY).read_text() + 'run: {dir: "run\\e[31mred"}\n')
    said = vernier("train", tmp_path / "red.yaml", f"data.dir={tmp_path / chr(27)}", code=2).stderr
    assert "\x1b" not in said
    out = io.StringIO()
    console(out, soft_wrap=True).print("a\x1b[31mb\udce4\nc", markup=False)
    assert out.getvalue() == "a\\x1b[31mb\\xe4\nc\n"
    assert printable("a\tb\r") == "a    b\\r"


def test_signs_of_numbers_stay_readable() -> None:
    assert "−1.5 ± 0.2 ψ".encode("ascii", SHOWABLE) == b"-1.5 +- 0.2 \\u03c8"
