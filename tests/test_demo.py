"""What `make demo` shows to a newcomer, as they would type it without make."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import vernier

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("demo") / "data"
    vernier("prepare", "configs/demo.yaml", f"data.dir={data}")
    return data


@pytest.fixture(scope="module")
def demo(data: Path) -> tuple[Path, str]:
    run = data.with_name("run")
    return run, vernier("train", "configs/demo.yaml", f"data.dir={data}", f"run.dir={run}", timeout=800).stdout


def test_in_small_it_ends_with_its_table_and_sees_one_optimizer_step(data: Path) -> None:
    run = data.with_name("small")
    settings = [f"data.dir={data}", f"run.dir={run}", "steps=60", "snapshot.every=30", "snapshot.at=[40,41]"]
    said = vernier("train", "configs/demo.yaml", *settings).stdout
    assert re.findall(r"^ *(\d+) +[\d,]+ +\d\.\d+ ± \d\.\d+", said, re.MULTILINE) == ["0", "30", "40", "41", "60"]
    found = json.loads(vernier("compare", f"{run}@40", f"{run}@41", "--json").stdout)["difference"]
    assert abs(found["t"]) > 2
    assert abs(found["t_unpaired"]) < 1
    assert f"vernier board {run}" in said


@pytest.mark.long
def test_it_ends_with_the_table_its_files_and_the_board(demo: tuple[Path, str]) -> None:
    run, said = demo
    assert len(re.findall(r"^ *\d+ +[\d,]+ +\d\.\d+ ± \d\.\d+", said, re.MULTILINE)) >= 5
    assert f"vernier board {run}" in said
    assert re.search(r"One optimizer step, 150 → 151: paired t = −?[\d.]+ \(clustered by family: [\d ]+ of", said)


@pytest.mark.long
def test_its_checkpoints_get_better_and_the_verdicts_agree_with_the_losses(demo: tuple[Path, str]) -> None:
    run, _ = demo
    found = json.loads(vernier("compare", run, "--json").stdout)["checkpoints"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["ranks"] == 2
    assert len(found) >= 5
    assert found[-1]["loss"] < 0.65 * math.log(2048)
    assert found[0]["versus_previous"] is None
    for before, after in pairwise(found):
        verdict = after["versus_previous"]
        assert verdict["a"]["documents"] >= 40
        assert after["se"] > 0
        if verdict["verdict"] == "better":
            assert after["loss"] < before["loss"]
        elif verdict["verdict"] == "worse":
            assert after["loss"] > before["loss"]
    assert all(c["versus_first"]["verdict"] == "better" for c in found[1:])


@pytest.mark.long
def test_one_optimizer_step_is_seen_paired_and_not_unpaired(demo: tuple[Path, str]) -> None:
    run, _ = demo
    found = json.loads(vernier("compare", f"{run}@150", f"{run}@151", "--json").stdout)["difference"]
    assert abs(found["t"]) > 2
    assert abs(found["t_unpaired"]) < 1
    assert found["pairing_gain"] > 10
