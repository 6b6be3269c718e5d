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
from eval.compare.along_run import compare_run
from eval.tables import LossTable, write_table
from launcher.compare.command import run_compare
from launcher.compare.options import Options, parse_margin
from launcher.text import p_words, plus_minus

ROOT = Path(__file__).parents[3]


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


def said(
    *targets: object, gate: str | None = None, margin: str | None = None, width: int = 100, **more: Any
) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width)
    options = Options(gate=gate, margin=margin, **more)
    code = run_compare([str(t) for t in targets], json_out=False, console=console, options=options)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_two_checkpoints_in_a_sentence(run: Path) -> None:
    code, text = said(f"{run}@100", f"{run}@101")
    assert code == 0
    first = text.splitlines()[0]
    assert first.startswith("step-00000101 is better than step-00000100 by 0.04")
    for part in (
        "% (95 %), p ",
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
    assert max(map(len, text.split("One optimizer")[0].splitlines())) <= 110
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
    code = run_compare(
        [f"{run}@101", f"{run}@100"], json_out=True, console=console, options=Options(gate="better", margin="0")
    )
    assert code == 3
    streams = capsys.readouterr()
    assert json.loads(streams.out)["verdict"] == "worse"
    assert "does not hold" in streams.err
    assert run_compare([str(run)], json_out=True, console=console) == 0
    content = json.loads(capsys.readouterr().out)
    assert [point["step"] for point in content["checkpoints"]] == [0, 100, 101, 140]
    assert content["checkpoints"][1]["tokens"] == 12_345_600


def test_usage_errors_are_one_line(run: Path) -> None:
    for targets, gate, margin, message in (
        ([], None, None, "expected two"),
        ([str(run)] * 3, None, None, "is given twice"),
        ([f"{run}@100"], None, None, "give a second"),
        ([str(run)], "same", "0", "--gate: 'same'"),
        ([str(run)], "better", "-1%", "--margin: '-1%'"),
        ([str(run)], "better", "nan", "--margin"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            said(*targets, gate=gate, margin=margin)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (["@100", "@101"], {"power": "0"}, "--power: '0'"),
        (["@100", "@101"], {"power": "-1%"}, "--power: '-1%'"),
        (["@100", "@101"], {"power": "much"}, "--power: 'much'"),
        (["@100", "@101", "@0"], {"power": "1%"}, "--power: goes by the spread of one pair"),
        ([""], {"by": "source"}, "--by: is about two"),
        (["@100", "@101"], {"by": "source,colour"}, "--by: 'colour' is none of source, length, position"),
        (["@100", "@101"], {"changed": 0}, "--changed: 0"),
        (["@100", "@101"], {"reference": Path("r")}, "--reference: only --by and --changed"),
        (["@100", "@101"], {"by": "length", "reference": Path("nowhere")}, "--reference: nowhere is not"),
        (["@100", "@101"], {"from_step": 3}, "--from-step: .* --training"),
        ([""], {"training": True}, "--training: .* two runs"),
        (["", ""], {"training": True, "power": "1%"}, "--training: does not go with --power"),
        (["@100", "@101"], {"advantage": "1%", "age": "3d"}, "go together"),
        (["@100", "@101"], {"advantage": "1%", "age": "3d", "half_life": "1d", "by": "length"}, "not go with --by"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    run: Path, targets: list[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        said(*(f"{run}{t}" for t in targets), **more)
    assert "\n" not in str(caught.value)


def test_the_texts_are_found_from_the_run_or_asked_for(run: Path, tmp_path: Path) -> None:
    pair = f"{run}@100", f"{run}@101"
    with pytest.raises(ConfigError, match=r"--changed: needs the texts, .*--reference REF"):
        said(*pair, changed=3)
    other = tmp_path / "reference"
    other.mkdir()
    (other / "reference.json").write_text('{"fingerprints": {"tokens": "else"}, "sequence_length": 128}')
    with pytest.raises(ConfigError, match="is not the set that these tables were scored on"):
        said(*pair, by="length", reference=other)
    facts = {"fingerprints": {"tokens": "0123abcd" * 8}, "sequence_length": 9}
    (other / "reference.json").write_text(json.dumps(facts))
    settings = (ROOT / "tests" / "tiny.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("{placement: inline}", f"{{reference: {other}}}"))
    assert "by length, step-00000101 against step-00000100" in said(*pair, by="length")[1]
    with pytest.raises(ConfigError, match=r"documents\.parquet|samples\.parquet"):
        said(*pair, changed=3)


def test_a_gate_is_about_one_comparison(run: Path) -> None:
    with pytest.raises(ConfigError, match="--gate: holds one comparison; 3 targets"):
        said(f"{run}@0", f"{run}@100", f"{run}@101", gate="better")


def test_three_are_a_leaderboard(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [f"{run}@{step}" for step in (0, 101, 100, 140)]
    code, text = said(*targets, parquet=tmp_path / "board.parquet")
    assert code == 0
    rows = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[-1] for row in rows[:4]] == ["a", "a", "b", "c"]
    assert {row[1] for row in rows[:2]} == {"step-00000101", "step-00000140"}
    assert "5 of 6 pairs are told apart" in text
    assert "not told apart: step-00000" in text
    assert f"wrote {tmp_path / 'board.parquet'}, 6 rows" in text
    console = Console(file=io.StringIO())
    assert run_compare(targets, json_out=True, console=console) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 6


def test_few_documents_give_bounds_instead_of_plus_minus(tmp_path: Path) -> None:
    for step, change in ((1, 0.01), (2, 0.02)):
        write_step(tmp_path / "r", step, change, documents=20)
        write_step(tmp_path / "few", step, change, documents=4)
    text = said(f"{tmp_path}/r@1", f"{tmp_path}/r@2")[1]
    assert "is worse than step-00000001 by 0.9" in text
    assert "%, change within [+0.9" in text
    assert "p = 0.0001" in text
    assert "[+0." in said(tmp_path / "r")[1]
    text = said(f"{tmp_path}/few@1", f"{tmp_path}/few@2")[1]
    assert "[−∞, ∞] % (95 %), p = 0.1" in text


def test_power_is_said_for_a_pair_and_for_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(f"{run}@100", f"{run}@101", power="0.001%")[1]
    assert "this set (100 documents, 300 samples) can show 0.0" in text
    assert "a change of 0.001 % needs " in text
    assert "unpaired" in text
    assert "a change of 0.001 % needs" in said(run, power="0.001%")[1]
    assert "cannot be told" in said(f"{run}@100", f"{run}@100", power="0.001%")[1]
    console = Console(file=io.StringIO())
    for targets in ([f"{run}@100", f"{run}@101"], [str(run)]):
        run_compare(targets, json_out=True, console=console, options=Options(power="0.001"))
        power = json.loads(capsys.readouterr().out)["power"]
        assert power["wanted_percent"] == 0.001
        assert power["samples_needed"] == 3 * power["documents_needed"]
        assert power["documents_needed_unpaired"] > power["documents_needed"]


def test_the_wobble_is_said_below_a_run_and_for_a_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    steps = [*range(10, 301, 10), 301]
    for step in steps:
        write_step(tmp_path / "w", step, 0.5 * step**-0.4 + float(rng.normal(0, 0.003)))
    text = said(tmp_path / "w")[1]
    assert " % between checkpoints (training noise); sampling error of a difference: 0.0" in text
    assert "within 2·√2 × the wobble (" in text
    listed = text.partition(" %): the change at step ")[2].splitlines()[0].split(", ")
    told = [point for point in compare_run(tmp_path / "w").checkpoints if point.versus_previous]
    clear = [point for point in told if point.versus_previous and point.versus_previous.verdict in ("better", "worse")]
    assert set(listed) <= {str(point.step) for point in clear if point.step != 301}
    pair = said(f"{tmp_path}/w@270", f"{tmp_path}/w@300")[1]
    assert "within 2·√2 × the wobble (" in pair
    assert (
        "one optimizer step apart: the verdict is about these two" in said(f"{tmp_path}/w@300", f"{tmp_path}/w@301")[1]
    )


def test_parts_of_a_set_are_compared_by_naming_their_files(tmp_path: Path) -> None:
    for name, step, change in (("x", 10, 0.01), ("y", 10, 0.02)):
        whole = write_step(tmp_path / name, step, change, documents=60)
        part = {"blocks": 2, "of": 5, "samples": 180}
        path = write_step(tmp_path / name, 20, change, documents=60, partial=part, until_verdict={"looks": 1})
        path.rename(path.with_name(path.name.replace(".parquet", ".partial.parquet")))
        assert whole.is_file()
    x, y = (next((tmp_path / name).glob("losses/*/*.partial.parquet")) for name in ("x", "y"))
    code, text = said(x, y)
    assert code == 0
    assert "caution: partial: only the first 2 of 5 blocks of the reference set (180 samples)" in text
    assert "caution: stopped early: the estimate is inflated" in text
    with pytest.raises(ConfigError, match="complete the shorter with: vernier eval MODEL --reference REF"):
        said(x, f"{tmp_path / 'y'}@10")
    assert "20" not in [line.split()[0] for line in said(tmp_path / "x")[1].splitlines() if line.split()]


def test_p_values_in_words() -> None:
    assert [p_words(p) for p in (0.0, 9e-13, 2.3e-9, 0.0031, 0.5)] == [
        "p < 1e-12",
        "p < 1e-12",
        "p = 2e-9",
        "p = 0.003",
        "p = 0.5",
    ]


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


@pytest.mark.parametrize(
    ("more", "message"),
    [({}, "--margin: .* give --gate"), ({"training": True}, "--training: does not go with --margin")],
)
def test_a_margin_without_a_gate_is_refused(run: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        said(f"{run}@100", f"{run}@101", margin="0.1%", **more)
    assert said(f"{run}@100", f"{run}@101", gate="better")[0] == 0


def test_a_gate_on_identical_tables_says_so(run: Path) -> None:
    assert "holds; the two are identical" in said(f"{run}@100", f"{run}@100", gate="not-worse")[1]
    code, text = said(f"{run}@100", f"{run}@100", gate="better")
    assert code == 3
    assert "does not hold; the two are identical" in text
    assert "upper 95 %" not in text


def test_a_reference_set_that_says_nothing_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "reference.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--reference: .*reference.json does not say which tokens"):
        said(f"{run}@100", f"{run}@101", by="length", reference=tmp_path / "empty")


def test_a_newly_scored_step_is_told_even_where_nothing_bounds_the_change() -> None:
    from eval.scoring.evaluator import scored_message

    told: dict[str, Any] = {
        "b": {"loss": 3.0, "se": 0.01},
        "difference": {"percent": -0.5, "ci95_percent": [None, None]},
        "verdict": "no difference seen",
    }
    assert scored_message(8, told, first=False).endswith(", -0.500 % [−∞, ∞] % (no difference seen)")
    told["difference"]["ci95_percent"] = [-0.6, -0.4]
    assert scored_message(8, told, first=False).endswith(", -0.500 % ± 0.100 % (no difference seen)")
