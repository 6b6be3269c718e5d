"""`vernier compare` as a person or a CI job sees it: sentences, tables, JSON and exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from configs.errors import ConfigError
from eval.tables import LossTable, write_table
from launcher.compare import parse_margin, plus_minus, run_compare

ROOT = Path(__file__).parents[2]


def write_step(run: Path, step: int, change: float, documents: int = 100, **meta: Any) -> Path:
    """Writes a table whose losses are off those of all others by `change` (relative) and a little noise."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    base = np.random.default_rng(0).normal(2.2, 0.3, 3 * documents)
    own = np.random.default_rng([step, documents]).normal(change, 0.0004, 3 * documents) if change else 0.0
    table = LossTable(
        sample=np.arange(3 * documents),
        document=np.repeat(np.arange(documents), 3),
        tokens=np.full(3 * documents, 128, np.int32),
        bytes=np.full(3 * documents, 512, np.int32),
        loss=128 * base * (1 + own),
        meta={
            "reference": "0123abcd" * 8,
            "objective": "causal",
            "dtype": "fp32",
            "label": f"step-{step:08d}",
            **meta,
        },
    )
    path = run / "losses" / "py-0123abcd" / f"step-{step:08d}@causal.fp32.parquet"
    write_table(path, table)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "demo"
    for step, change in {0: 0.0, 100: -0.2, 101: -0.2004, 140: -0.2004}.items():
        write_step(run, step, change)
    lines = (json.dumps({"step": s, "tokens": 123_456 * s}) + "\n" for s in range(1, 141))
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def said(*targets: object, gate: str | None = None, margin: str = "0", width: int = 100) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width)
    code = run_compare([str(t) for t in targets], json_out=False, gate=gate, margin=margin, console=console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_two_checkpoints_in_a_sentence(run: Path) -> None:
    code, text = said(f"{run}@100", f"{run}@101")
    assert code == 0
    first = text.splitlines()[0]
    assert first.startswith("step-00000101 is better than step-00000100 by 0.04")
    for part in (
        "% (95 %), p = ",
        "% of samples",
        "smallest change this set could show at 80 % power: 0.0",
        "pairing gained",
    ):
        assert part in first
    assert "paired t = −" in text
    assert "38,400" in text
    assert "\x1b" not in text
    assert "…" not in text
    assert "is worse than step-00000101 by 0.04" in said(f"{run}@101", f"{run}@100")[1]


def test_no_difference_and_no_difference_at_all_are_two_things(run: Path) -> None:
    assert "no difference seen between step-00000101 and step-00000140: " in said(f"{run}@101", f"{run}@140")[1]
    assert "are identical" in said(f"{run}@100", f"{run}@100")[1]


def test_a_run_is_a_table_whole_at_any_width(run: Path) -> None:
    code, text = said(run)
    assert code == 0
    assert max(map(len, text.split("One optimizer")[0].splitlines())) <= 100
    assert said(run, width=40) == (code, text)
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["0", "100", "101", "140"]
    assert "17.3 M" in text
    assert "no difference seen" in text
    assert "One optimizer step, 100 → 101: paired t = −" in text
    assert "(clustered by document) where the unpaired t = −0.0" in text
    assert "140: paired" not in text


def test_a_run_with_one_table_has_nothing_to_compare_yet(tmp_path: Path) -> None:
    write_step(tmp_path / "r", 7, 0.0)
    code, text = said(tmp_path / "r")
    assert code == 0
    assert "7" in text
    with pytest.raises(ConfigError, match="only step 7"):
        said(tmp_path / "r", gate="better")


def test_cautions_follow(tmp_path: Path) -> None:
    for step, change in ((1, 0.01), (2, 0.02)):
        write_step(tmp_path / "r", step, change, documents=20)
    assert "caution: 20 documents" in said(f"{tmp_path}/r@1", f"{tmp_path}/r@2")[1]
    assert "caution: 20 documents" in said(tmp_path / "r")[1]


@pytest.mark.parametrize(
    ("targets", "gate", "margin", "code"),
    [
        (["@100", "@101"], "better", "0", 0),
        (["@100", "@101"], "better", "0.02%", 0),
        (["@100", "@101"], "better", "0.1%", 3),
        (["@101", "@100"], "better", "0", 3),
        (["@101", "@100"], "not-worse", "0.01 %", 3),
        (["@101", "@100"], "not-worse", "0.1", 0),
        (["@100", "@100"], "not-worse", "0%", 0),
        ([""], "better", "0", 3),  # a run: its last step (140) against the one before (101)
        ([""], "not-worse", "0.1%", 0),
    ],
)
def test_gates_end_with_0_or_3(run: Path, targets: list[str], gate: str, margin: str, code: int) -> None:
    found, text = said(*(f"{run}{t}" for t in targets), gate=gate, margin=margin)
    assert found == code
    assert f"gate {gate}" in text
    assert ("does not hold" in text) == (code == 3)


def test_json_is_all_there_is_on_stdout(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO())
    code = run_compare([f"{run}@101", f"{run}@100"], json_out=True, gate="better", margin="0", console=console)
    assert code == 3
    streams = capsys.readouterr()
    assert json.loads(streams.out)["verdict"] == "worse"
    assert "does not hold" in streams.err
    assert run_compare([str(run)], json_out=True, gate=None, margin="0", console=console) == 0
    content = json.loads(capsys.readouterr().out)
    assert [point["step"] for point in content["checkpoints"]] == [0, 100, 101, 140]
    assert content["checkpoints"][1]["tokens"] == 12_345_600


def test_usage_errors_are_one_line(run: Path) -> None:
    for targets, gate, margin, message in (
        ([], None, "0", "expected two"),
        ([str(run)] * 3, None, "0", "got 3"),
        ([f"{run}@100"], None, "0", "give a second"),
        ([str(run)], "same", "0", "--gate: 'same'"),
        ([str(run)], "better", "-1%", "--margin: '-1%'"),
        ([str(run)], "better", "nan", "--margin"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            said(*targets, gate=gate, margin=margin)
        assert "\n" not in str(caught.value)


def test_margins_are_percent() -> None:
    assert [parse_margin(text) for text in ("0.05%", "0.05 %", "0.05", "0")] == [0.05, 0.05, 0.05, 0]


def test_numbers_are_given_to_two_digits_of_their_error() -> None:
    assert plus_minus(-0.0391, 0.0112) == ("-0.039", "0.011")
    assert plus_minus(12.345, 1.2) == ("+12.3", "1.2")
    assert plus_minus(2.17, 0.0, signed=False) == ("2.1700", "0.0000")


def test_importing_the_command_loads_neither_scipy_nor_pyarrow_nor_torch() -> None:
    heavy = ["scipy", "pyarrow", "torch", "numpy"]
    code = f"import sys, launcher.compare; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
