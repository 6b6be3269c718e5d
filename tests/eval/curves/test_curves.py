"""Paired training curves: what is found, what is refused, and what is said about it. Run directories are real files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

from configs.errors import ConfigError, DataError
from configs.load import dump_config, load_config
from eval.curves.pairing import read_curve
from eval.curves.training import TrainingComparison, compare_training
from launcher.compare.training import draw_training, training_sentence

STEPS = 480
CPU = {"machine": "x86_64", "cores": 2, "cpu_capability": "AVX2", "gpus": []}
FALLING = 4 + 3 * np.exp(-np.arange(STEPS) / 80)
WINDOWS = np.random.default_rng(0).normal(0, 0.15, STEPS)  # what makes a batch hard is the same for both


def own_noise(seed: int, size: float = 0.01) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, STEPS)


def write_run(
    path: Path,
    loss: np.ndarray,
    *overrides: str,
    data: str = "d" * 64,
    positions: np.ndarray | None = None,
    targets: int = 1024,
    ranks: list[int] | None = None,
    hardware: dict | None = None,
) -> Path:
    """A run directory as training leaves it behind."""
    path.mkdir()
    config = load_config(ROOT / TINY, [f"steps={STEPS}", f"run.dir={path}", *overrides])
    (path / "config.yaml").write_text(dump_config(config))
    manifest = {"data": {"data": data}, "hardware": hardware or CPU, "versions": {"torch": "2.13.0"}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    where = np.arange(len(loss)) if positions is None else positions
    with open(path / "metrics.jsonl", "w") as file:
        for step, (value, position) in enumerate(zip(loss, where, strict=True), start=1):
            line = {"step": step, "position": int(position), "tokens": int(position + 1) * targets}
            line |= {"ranks": ranks[step - 1] if ranks else 2, "micro": 4, "loss": float(value)}
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """B is lower by .02 nats, about a seventh of what batches differ by."""
    a = write_run(tmp_path / "a", FALLING + WINDOWS + own_noise(1))
    return a, write_run(tmp_path / "b", FALLING + WINDOWS + own_noise(2) - 0.02, "optimizer.lr=6e-3")


def test_a_small_gain_is_found_with_its_size_and_from_which_step(pair: tuple[Path, Path]) -> None:
    found = compare_training(*pair)
    assert found.verdict == "lower"
    assert found.whole.nats == pytest.approx(-0.02, abs=found.whole.half95_nats)
    assert found.whole.half95_nats < 0.003
    assert found.whole.percent == pytest.approx(100 * found.whole.nats / found.whole.loss_a, rel=1e-12)
    assert (found.whole.first_step, found.whole.last_step) == (1, STEPS)
    assert found.paired_from_step is not None
    assert found.paired_from_step < 100
    assert found.unpaired_from_step is None  # on other windows, this is not to be seen in 480 steps
    assert found.unpaired_steps is not None
    assert found.unpaired_steps > STEPS
    assert 100 < found.gain < 500  # (.15² + .01²)/.01² = 226 by construction
    assert found.changed == ("optimizer.lr: 0.005 → 0.006",)
    assert len(found.cautions) == 1  # what it is about
    assert found.cautions[0].startswith("this is about these two runs on other windows")
    said = training_sentence(found)
    assert said.startswith("TRAINING loss: b is lower by 0.4")
    for part in ("over steps 1–480", f"ahead from step {found.paired_from_step}", "in variance"):
        assert part in said


def test_without_a_difference_none_is_claimed(tmp_path: Path) -> None:
    claimed = 0
    for seed in range(20):
        a = write_run(tmp_path / f"a{seed}", FALLING + WINDOWS + own_noise(100 + seed))
        b = write_run(tmp_path / f"b{seed}", FALLING + WINDOWS + own_noise(200 + seed))
        found = compare_training(a, b)
        claimed += found.verdict in ("lower", "higher")
        if found.verdict == "no difference seen":
            assert "no difference seen between" in training_sentence(found)
            assert found.paired_steps is None
    assert claimed <= 4  # one is expected; more than 4 come up in less than one of a hundred


def test_what_moves_as_slowly_as_the_stretch_is_refused_with_its_reason(tmp_path: Path) -> None:
    wander = 0.02 * np.cos(np.pi * np.arange(STEPS) / STEPS) - 0.01
    a = write_run(tmp_path / "a", FALLING + WINDOWS + own_noise(1))
    found = compare_training(a, write_run(tmp_path / "b", FALLING + WINDOWS + own_noise(2) + wander))
    assert found.verdict == "cannot be told"
    assert found.to_json()["difference"]["p"] is None
    assert "whether b and a differ cannot be told over steps 1–480" in training_sentence(found)
    assert "as slowly as the stretch is long" in training_sentence(found)


def test_the_parts_share_their_error(tmp_path: Path) -> None:
    """At a null 18 % of comparisons showed a part with p < .05 before."""
    seen = 0
    for seed in range(60):
        a = write_run(tmp_path / f"a{seed}", FALLING + WINDOWS + own_noise(300 + seed))
        b = write_run(tmp_path / f"b{seed}", FALLING + WINDOWS + own_noise(400 + seed))
        for part in (quarters := compare_training(a, b).quarters):
            outside = abs(part.nats) > part.half95_nats
            assert part.wanders or outside == (part.p < 0.05)
        seen += any(part.p < 0.05 for part in quarters)
    assert seen <= 7  # three are expected


def test_the_quarters_show_where_the_gain_is(tmp_path: Path) -> None:
    late = -0.1 * np.maximum(0, np.arange(STEPS) / STEPS - 0.5)
    a = write_run(tmp_path / "a", FALLING + WINDOWS + own_noise(1))
    b = write_run(tmp_path / "b", FALLING + WINDOWS + own_noise(2) + late)
    quarters = compare_training(a, b).quarters
    assert [quarter.nats for quarter in quarters] == pytest.approx([0, 0, -0.0125, -0.0375], abs=0.005)
    assert (quarters[0].first_step, quarters[-1].last_step) == (1, STEPS)
    assert all(after.first_step == before.last_step + 1 for before, after in pairwise(quarters))


def test_a_stretch_of_steps_is_looked_at_alone(pair: tuple[Path, Path]) -> None:
    found = compare_training(*pair, first=200, last=400)
    assert (found.whole.first_step, found.whole.last_step) == (200, 400)
    curves = [read_curve(run) for run in pair]
    by_hand = np.mean(curves[1].loss_T[199:400] - curves[0].loss_T[199:400])
    assert found.whole.nats == pytest.approx(by_hand, rel=1e-9)


def test_a_run_that_is_shorter_is_compared_up_to_its_last_step(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    short = write_run(tmp_path / "short", (FALLING + WINDOWS + own_noise(3))[:300])
    assert compare_training(pair[0], short).whole.last_step == 300
    assert compare_training(short, pair[0]).whole.last_step == 300


def test_identical_runs_are_called_so(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    again = write_run(tmp_path / "again", FALLING + WINDOWS + own_noise(1))
    found = compare_training(pair[0], again)
    assert found.verdict == "identical"
    assert found.gain is None
    assert "identical" in training_sentence(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_batch_skipped_by_both_is_no_obstacle_and_by_one_is_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    kept = np.delete(np.arange(STEPS), [40, 41])
    loss = FALLING + WINDOWS
    skipped = write_run(tmp_path / "skipped", (loss + own_noise(3))[kept], positions=kept)
    also = write_run(tmp_path / "also", (loss + own_noise(4))[kept], positions=kept)
    assert compare_training(skipped, also).whole.last_step == STEPS - 2
    for runs in ((pair[0], skipped), (skipped, pair[0])):
        with pytest.raises(DataError, match=r"skipped made no update with the batches at positions 40, 41"):
            compare_training(*runs)
    assert compare_training(pair[0], skipped, first=60).verdict == "no difference seen"


@pytest.mark.parametrize(
    ("overrides", "data", "reason"),
    [
        (["seed=4"], "d" * 64, "seed 3 and 4"),
        (["batch.global=32"], "d" * 64, "batch.global 16 and 32"),
        (["sequence_length=32"], "d" * 64, "sequence_length 64 and 32"),
        ([], "e" * 64, "other data (fingerprints dddddddddddd and eeeeeeeeeeee)"),
    ],
)
def test_runs_on_other_windows_are_refused_with_the_reason(
    tmp_path: Path, pair: tuple[Path, Path], overrides: list[str], data: str, reason: str
) -> None:
    other = write_run(tmp_path / "other", FALLING + WINDOWS, *overrides, data=data)
    with pytest.raises(DataError) as refused:
        compare_training(pair[0], other)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_compared_is_refused_in_a_line(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    with pytest.raises(DataError, match="60 steps in common are too few: the error of their mean needs 64"):
        compare_training(a, b, last=60)
    with pytest.raises(DataError, match="has not made step 900 yet"):
        compare_training(a, b, first=900)
    with pytest.raises(ConfigError, match="90 to 80 is not a stretch"):
        compare_training(a, b, first=90, last=80)
    diverged = FALLING + WINDOWS
    diverged[400:] = np.nan
    with pytest.raises(DataError, match=r"bad is not finite at step 401; end before it: --to-step 400"):
        compare_training(a, write_run(tmp_path / "bad", diverged))
    with pytest.raises(DataError, match="has 1,024 targets in a and 960 in masked"):
        compare_training(a, write_run(tmp_path / "masked", FALLING, targets=960))
    (b / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json yet"):
        compare_training(a, b)
    (a / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="lacks its step, position, tokens or loss"):
        read_curve(a)


def test_what_moves_losses_besides_the_experiment_is_a_caution(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    changed = [2] * 100 + [4] * (STEPS - 100)  # went on with other ranks in the middle
    gpu = {**CPU, "gpus": ["NVIDIA H100"]}
    loss = FALLING + WINDOWS + own_noise(5)
    other = write_run(tmp_path / "other", loss, "precision=bf16", "zero.stage=3", ranks=changed, hardware=gpu)
    told = " | ".join(compare_training(pair[0], other).cautions)
    assert "ranks (2 in a, 2 then 4 in other), ZeRO stage (2 and 3)" in told
    assert "0.0025 % in bf16" in told
    assert "unequal precision" in told
    assert "NVIDIA H100" in told


def test_the_json_holds_every_block_and_the_band(pair: tuple[Path, Path]) -> None:
    found: TrainingComparison = compare_training(*pair)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["of"] == "training loss"
    assert len(told["quarters"]) == 4
    blocks = told["blocks"]
    assert len(blocks["difference"]) == len(blocks["loss_a"]) == 60
    assert told["question"] == "run"
    assert blocks["last_step"][-1] == STEPS
    assert told["band"]["mean"][-1] == pytest.approx(told["difference"]["nats"], rel=1e-9)
    widths = zip(told["band"]["half95_unpaired"], told["band"]["half95"], strict=True)
    assert all(unpaired > paired for unpaired, paired in widths)


def test_it_is_drawn(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    path = tmp_path / "plots" / "training-curve.png"
    draw_training(compare_training(*pair), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made a directory"):
        draw_training(compare_training(*pair), tmp_path / "file" / "training-curve.png")


def test_a_curve_with_a_hole_is_refused_with_its_line(pair: tuple[Path, Path]) -> None:
    a, b = pair
    path = a / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:99] + whole[102:]))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 100 is of step 103, where step 100 belongs: .* a hole"):
        compare_training(a, b)
    path.write_text("".join([*whole[:99], "{" + whole[99], *whole[100:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 100 is not JSON: the curve has a hole"):
        compare_training(a, b)
    path.write_text("".join(whole[1:]))
    with pytest.raises(DataError, match="line 1 is of step 2, where step 1 belongs"):
        compare_training(a, b)


def twin_of(run: Path, at: int, number: int, loss: np.ndarray) -> None:
    path = run / "twins" / f"step-{at:08d}.{number}"
    path.parent.mkdir(exist_ok=True)
    write_run(path, loss)
    (path / "twin.json").write_text(json.dumps({"at": at, "number": number}))


def test_no_more_than_twins_differ_by_is_no_difference_of_settings(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair  # B is lower by .02 nats
    assert "vernier twin" in " ".join(compare_training(a, b, first=101).cautions)
    own = read_curve(a).loss_T
    for number, gain in enumerate((0.015, -0.02, 0.01), start=1):
        twin_of(a, 100, number, own - gain * (np.arange(STEPS) >= 100))
    found = compare_training(a, b, first=101)
    assert found.whole.p < 1e-6
    assert found.verdict == "as twins"
    assert found.to_json()["difference"]["p_verdict"] > 0.05
    assert found.to_json()["twins"]["degrees_of_freedom"] == 3
    assert training_sentence(found).startswith("TRAINING loss: no more than chance in training does: b against a −0.")
    whole = compare_training(a, b)  # the twins have no own steps before 100
    assert whole.verdict == "lower"
    assert "do not have all steps from 1 to 480" in " ".join(whole.cautions)


def test_what_is_more_than_twins_differ_by_is_told_also_where_it_wanders(tmp_path: Path) -> None:
    wander = 0.02 * np.cos(np.pi * np.arange(STEPS) / STEPS) - 0.05
    a = write_run(tmp_path / "a", FALLING + WINDOWS + own_noise(1))
    b = write_run(tmp_path / "b", FALLING + WINDOWS + own_noise(2) + wander)
    assert compare_training(a, b).verdict == "cannot be told"
    for number, gain in enumerate((0.002, -0.001, 0.001), start=1):
        twin_of(a, 0, number, read_curve(a).loss_T - gain)
    assert compare_training(a, b).verdict == "lower"


def test_to_be_more_than_twins_that_still_move_apart_says_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    a, b = pair
    growing = 1e-4 * np.exp(np.arange(STEPS) / 120)
    twin_of(a, 0, 1, read_curve(a).loss_T + growing)
    twin_of(a, 0, 2, read_curve(a).loss_T - growing)
    found = compare_training(a, b)
    assert found.to_json()["twins"]["settled"] is False
    assert any("twins still move apart" in caution for caution in found.cautions)
    assert found.p == found.whole.p  # of these two runs, as without twins
    wander = 0.02 * np.cos(np.pi * np.arange(STEPS) / STEPS) - 0.05
    other = write_run(tmp_path / "c", FALLING + WINDOWS + own_noise(2) + wander)
    assert compare_training(a, other).verdict == "cannot be told"
