"""Twelve trainings are killed with `kill -9` and end to the bit as if nobody had; every kind of kill is among them.

The seed is the day's, and printed; `VERNIER_FAULT_SEED=20260101` plays that day's rounds again. `make torture` plays
hundreds, with more kills a round and all settings; these four settings keep it to minutes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.files.json_lines import sealed_line
from configs.files.seal import parsed

from .killing import ROOT, processes
from .rounds import FAULTS, RANKS, draw_round
from .same import differences, not_whole, tensors_of
from .torture import Places, main, play, prepare, tell, undisturbed

SEED = int(os.environ.get("VERNIER_FAULT_SEED") or time.strftime("%Y%m%d"))
ROUNDS = 12


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    found = Places(tmp_path_factory.mktemp("faults"))
    prepare(found)
    return found


@pytest.fixture(scope="module")
def killed() -> set[str]:
    """The faults that did happen in the rounds that were played."""
    return set()


def test_a_round_of_kills_ends_as_if_there_had_been_none(places: Places) -> None:
    facts = play(draw_round(SEED, ROUNDS, brief=True), places)
    print(f"VERNIER_FAULT_SEED={SEED}", tell(facts))
    assert not facts["wrong"], f"VERNIER_FAULT_SEED={SEED}: {tell(facts)}"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_killed_training_ends_as_if_it_had_not_been(number: int, places: Places, killed: set[str]) -> None:
    facts = play(draw_round(SEED, number, brief=True), places)
    print(f"VERNIER_FAULT_SEED={SEED}", tell(facts))
    assert not facts["wrong"], f"VERNIER_FAULT_SEED={SEED}: {tell(facts)}"
    killed.update(facts["killed"])
    if number == ROUNDS - 1 and len(killed) > len(FAULTS) // 2:  # not where this round is played alone
        assert killed == set(FAULTS), f"VERNIER_FAULT_SEED={SEED}"


def test_any_twelve_rounds_in_a_row_have_every_kill_and_all_settings() -> None:
    for seed in (1, 2, SEED):
        rounds = [draw_round(seed, number) for number in range(300)]
        assert rounds == [draw_round(seed, number) for number in range(300)]
        for first in range(300 - ROUNDS + 1):
            some = rounds[first : first + ROUNDS]
            assert {kill.fault for one in some for kill in one.kills} == set(FAULTS)
            assert len({(s.stage, s.precision, s.accumulation) for s in (one.settings for one in some)}) == 12
            brief = [draw_round(seed, number, brief=True) for number in range(first, first + ROUNDS)]
            assert {kill.fault for one in brief for kill in one.kills} == set(FAULTS)
        settings = {one.settings for one in brief}
        assert {one.stage for one in settings} == {1, 2, 3}
        assert {one.placement for one in settings} == {"separate", "inline", "none"}
        assert len({one.reference for one in settings}) == 4
        kills = [kill for one in rounds for kill in one.kills]
        assert {kill.how for kill in kills} == {"start", "step", "point"}
        assert {kill.rank for kill in kills if kill.process == "rank"} == set(range(RANKS))
        assert all(1 <= len(one.kills) <= 3 for one in rounds)


def test_what_a_kill_could_spoil_is_seen(places: Places, tmp_path: Path) -> None:
    straight = undisturbed(draw_round(SEED, 0, brief=True).settings, places)
    assert differences(straight, straight) == []
    last = sorted((straight / "checkpoints").glob("step-*"))[-1].name
    tensors = tensors_of(straight / "checkpoints" / last)
    assert all(np.isfinite(one).all() for one in tensors.values())
    assert any(name.startswith("exp_avg_sq/") and (one > 0).any() for name, one in tensors.items())
    run = tmp_path / "run"

    def seen(spoil: str) -> str:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(straight, run)
        _spoil(run, spoil, last)
        return "\n".join(differences(straight, run))

    assert "loss is" in seen("a loss")
    assert "steps twice: [7]" in seen("a step twice")
    assert f"{last}: 1 of {len(tensors)} tensors differ" in seen("a moment")
    assert "changed" in "\n".join(not_whole(run))
    assert "looks whole and is not" in seen("half a directory")
    assert ".step-00000050.partial: should not be there" in seen("a partial directory")
    assert f"checkpoints/{last}: missing" in seen("no checkpoint")
    assert "another loss table" in seen("a table")


def _spoil(run: Path, what: str, last: str) -> None:
    steps = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    if what == "a loss":
        line = parsed(steps[8])
        steps[8] = sealed_line({**line, "loss": float(np.nextafter(line["loss"], 9))})
        (run / "metrics.jsonl").write_text("".join(steps))
    elif what == "a step twice":
        (run / "metrics.jsonl").write_text("".join([*steps[:7], *steps[6:]]))
    elif what == "a moment":
        path = next((run / "checkpoints" / last).glob("rank-00001*"))
        tensors = load_file(path)
        name = next(name for name in tensors if name.startswith("exp_avg/"))
        tensors[name][0] = np.nextafter(tensors[name][0], np.float32(9))
        save_file(tensors, path)
    elif what == "half a directory":
        (run / "snapshots" / "step-00000007").mkdir()
    elif what == "a partial directory":
        (run / "checkpoints" / ".step-00000050.partial").mkdir()
    elif what == "no checkpoint":
        shutil.rmtree(run / "checkpoints" / last)
    else:
        path = sorted((run / "losses").glob("*/*.parquet"))[-1]
        path.write_bytes(path.read_bytes() + b"\0")


def test_torture_goes_on_where_it_stopped_and_counts(tmp_path: Path, places: Places, capsys) -> None:
    (tmp_path / "data").symlink_to(places.data)
    played = {**draw_round(4, 0).facts(), "brief": False, "killed": ["rank"], "not_killed": 0, "seconds": 1.0}
    (tmp_path / "rounds.jsonl").write_text(json.dumps({**played, "wrong": []}) + "\n")
    assert main(["--rounds", "1", "--seed", "4", "--dir", str(tmp_path)]) == 0
    (tmp_path / "rounds.jsonl").write_text(json.dumps({**played, "wrong": ["a loss differs"]}) + "\n")
    assert main(["--rounds", "1", "--seed", "4", "--dir", str(tmp_path)]) == 1
    assert "1 rounds of seed 4, 1 kills; wrong: 1 [0]" in capsys.readouterr().out


def test_ctrl_c_ends_torture_and_the_training_it_has_started(tmp_path: Path, places: Places) -> None:
    (tmp_path / "data").symlink_to(places.data)
    command = [sys.executable, "-m", "tests.faults.torture", "--rounds", "1", "--dir", str(tmp_path)]
    torture = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    runs = next(tmp_path.glob("undisturbed-*"), None)
    deadline = time.monotonic() + 60
    while runs is None or not processes(runs):
        assert time.monotonic() < deadline, "nothing was started"
        time.sleep(0.1)
        runs = next(tmp_path.glob("undisturbed-*"), None)
    torture.send_signal(signal.SIGINT)
    said, _ = torture.communicate(timeout=60)
    assert torture.returncode == 130, said
    assert "the same command goes on" in said
    assert not processes(runs)
