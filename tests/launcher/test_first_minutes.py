"""What a new user sees: lines that fit the terminal, something at once, answers to other names, what comes next."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import termios
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, vernier

from configs.console import folded
from configs.load import known_keys
from configs.yaml.other_names import HUGGING_FACE, answer

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(*words: object, columns: int = 80, folder: Path = ROOT, **more: str) -> tuple[int, str]:
    """(exit code, all that was written) of a command on a terminal with so many columns."""
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"} | more
    environment["PYTHONPATH"] = str(ROOT)
    command = [*VERNIER, *map(str, words)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(own, 65536)
        except OSError:  # nobody has it open any more
            break
        if not piece:
            break
        said += piece
    os.close(own)
    return process.wait(), said.decode()


def rows(said: str) -> list[str]:
    """The rows of a terminal, each as it stood last."""
    return [CONTROLS.sub("", row).rpartition("\r")[2] for row in said.replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("what", ["compare", "pair", "status", "plan", "prepare", "error", "help"])
def test_a_line_fits_the_terminal(what: str, columns: int, tiny_run: Path, tiny_data: Path) -> None:
    words = {
        "compare": ["compare", tiny_run],
        "pair": ["compare", f"{tiny_run}@10", f"{tiny_run}@20", "--power", "0.01%"],
        "status": ["status", tiny_run],
        "plan": ["plan", TINY, f"data.dir={tiny_data}", "--flops", "1e12", "--memory", "8GiB"],
        "prepare": ["prepare", TINY, f"data.dir={tiny_data}"],
        "error": [
            "train",
            TINY,
            f"data.dir={tiny_data}",
            "batch.global=7",
            "learning_rate=3",
            "eval.placement=seperate",
        ],
        "help": ["train", "--help"],
    }[what]
    code, said = on_terminal(*words, columns=columns)
    assert code == (2 if what == "error" else 0), said
    paths = (str(tiny_run), str(tiny_data))  # to be copied: they are not broken
    wide = [row for row in rows(said) if len(row.rstrip()) > columns and not any(path in row for path in paths)]
    assert wide == []


def test_a_pipe_is_as_wide_as_its_lines(tiny_run: Path) -> None:
    said = vernier("compare", f"{tiny_run}@10", f"{tiny_run}@20").stdout
    assert max(map(len, said.splitlines())) > 120
    assert "next:" not in said


@pytest.mark.parametrize("more", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=["dumb", "no colour"])
def test_a_terminal_that_shows_less_is_given_less(more: dict[str, str], tiny_run: Path) -> None:
    code, said = on_terminal("compare", tiny_run, **more)
    assert code == 0
    assert not re.search(r"\x1b\[(3|9)[0-9]m", said)  # no colour
    if more.get("TERM") == "dumb":
        assert "\x1b" not in said


def test_words_are_folded_beneath_the_text_of_their_label() -> None:
    def shown(line: str, columns: int) -> list[str]:
        return [" " * indent + line[start:stop] for indent, start, stop in folded(line, columns)]

    assert shown("  loss     4.08 at the last step, and more", 24) == [
        "  loss     4.08 at the",
        "           last step,",
        "           and more",
    ]
    assert shown("error: a b", 8) == ["error: a", "  b"]
    path = "/a/path/that/is/longer/than/the/row"
    assert shown(f"see {path} for more", 12) == ["see", f"  {path}", "  for more"]
    assert shown("", 10) == [""]


def test_long_work_says_what_it_does_from_its_first_second(tmp_path: Path) -> None:
    code, said = on_terminal("prepare", TINY, f"data.dir={tmp_path / 'data'}")
    assert code == 0
    assert said.index("loading the libraries") < said.index("reading")
    last = "\n".join(rows(said))
    for stage in ("reading", "tokenizer", "tokenizing", "splitting", "reference set", "shards"):
        found = re.findall(rf"{stage} +(\d+)/(\d+)", last)
        assert found, stage
        assert found[-1][0] == found[-1][1] != "0"
    assert "loading the libraries" not in last  # it is taken away again


def test_training_on_a_terminal_leaves_no_controls_in_the_logs(tiny_data: Path, tmp_path: Path) -> None:
    code, said = on_terminal("train", TINY, "steps=4", f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}")
    assert code == 0
    assert "loading the libraries" in said
    assert re.search(r"step 4/4 .* loss", CONTROLS.sub("", said))
    logs = {path.name: path.read_bytes() for path in (tmp_path / "run/logs").iterdir()}
    assert len(logs) > 2
    assert [name for name, content in logs.items() if b"\x1b" in content or b"\r" in content] == []


def test_scoring_has_a_bar(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_run / "snapshots" / "step-00000010"
    code, said = on_terminal("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path)
    assert code == 0
    assert re.search(r"step-00000010 +(\d+)/\1 ", CONTROLS.sub("", said))
    assert "next:  vernier compare" in said


@pytest.mark.parametrize("name", sorted(HUGGING_FACE))
def test_a_name_of_hugging_faces_is_answered_with_ours(name: str) -> None:
    found = vernier("train", TINY, f"{name}=1", code=2)
    assert found.stderr.startswith(f"error: {name}: unknown key; in Vernier: ")
    keys = set(known_keys())
    said = answer(f"training.{name}") or ""
    first = re.match(r"[a-z_]+(?:\.[a-z_]+)+(?=$|[ :;,])", said)
    assert first is None or first[0] in keys, said
    assert answer("per-device-train-batch-size") == HUGGING_FACE["per_device_train_batch_size"]


def test_an_option_that_is_a_setting_elsewhere_is_answered_too() -> None:
    said = vernier("train", TINY, "--learning_rate", "1", code=2).stderr
    assert "--learning_rate: settings are given as KEY=VALUE, without dashes; in Vernier: optimizer.lr" in said


def test_alone_it_shows_what_is_here_and_what_comes_next(tiny_run: Path, tmp_path: Path) -> None:
    def alone(folder: Path) -> str:
        return subprocess.run(VERNIER, cwd=folder, check=True, capture_output=True, text=True).stdout

    assert "Usage: vernier" in alone(tmp_path)
    shutil.copy(ROOT / TINY, tmp_path / "mine.yaml")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    said = alone(tmp_path)
    assert "config   mine.yaml" in said
    assert "other.yaml" not in said
    assert "next     vernier prepare mine.yaml" in said
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/one").symlink_to(tiny_run)
    said = alone(tmp_path)
    assert re.search(r"runs/one +done +20/20", said)
    assert "next     vernier compare runs/one\n" in said


def test_it_says_its_version() -> None:
    assert re.fullmatch(r"vernier \d+\.\d+\.\d+\n", vernier("--version").stdout)


def test_steps_of_one_pass_are_said(tiny_data: Path) -> None:
    said = vernier("prepare", TINY, f"data.dir={tiny_data}").stdout
    assert re.search(r"steps +with batch.global=16, one pass is \d+ steps, 20 steps are 0\.\d+ passes", said)
