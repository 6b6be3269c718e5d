"""Golden losses: a change of code that moves them says why. Recipes in tiny form, on a corpus of our own.

To write them anew: `GOLDEN=write make test` (the commit says what moved them).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, losses, table_of, vernier

from eval.tables import read_table

GOLDEN = ROOT / "tests" / "golden"
GPT2 = ["model={type: gpt2, n_embd: 48, n_layer: 2, n_head: 4, n_positions: 64, resid_pdrop: 0.1, attn_pdrop: 0.0}"]


def summary(run: Path) -> dict[str, list[float]]:
    tables = [read_table(table_of(run, step)) for step in (0, 10, 20)]
    return {"training": losses(run), "reference": [float(t.loss.sum() / t.tokens.sum()) for t in tables]}


@pytest.fixture(scope="module")
def gpt2_runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one seed, with dropout; `model` as a whole replaces the recipe's."""
    folder = tmp_path_factory.mktemp("gpt2")
    recipe = yaml.safe_load((ROOT / TINY).read_text())
    recipe["model"] = yaml.safe_load(GPT2[0].partition("=")[2])
    (folder / "tiny-gpt2.yaml").write_text(yaml.safe_dump(recipe))
    runs = [folder / "a", folder / "b"]
    for run in runs:
        vernier("train", folder / "tiny-gpt2.yaml", f"data.dir={tiny_data}", f"run.dir={run}", "zero.stage=1")
    return runs


def agrees(name: str, run: Path) -> None:
    found, path = summary(run), GOLDEN / f"{name}.json"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    for key in ("training", "reference"):
        np.testing.assert_allclose(found[key], golden[key], rtol=1e-4)


def test_the_llama_recipe_has_its_golden_losses(tiny_run: Path) -> None:
    agrees("tiny", tiny_run)


def test_the_gpt2_recipe_has_its_golden_losses(gpt2_runs: list[Path]) -> None:
    agrees("tiny-gpt2", gpt2_runs[0])


def test_two_runs_of_one_seed_are_the_same_bits_with_dropout(gpt2_runs: list[Path]) -> None:
    first, second = gpt2_runs
    assert losses(first) == losses(second)
    assert table_of(first, 20).read_bytes() == table_of(second, 20).read_bytes()


def test_threads_are_set_and_written_down(tiny_run: Path) -> None:
    assert json.loads((tiny_run / "manifest.json").read_text())["threads_per_rank"] == 1
    assert read_table(table_of(tiny_run, 20)).meta["threads"] == 1


def test_the_runs_own_config_repeats_it(tiny_run: Path, tmp_path: Path) -> None:
    vernier("train", tiny_run / "config.yaml", f"run.dir={tmp_path / 'again'}")
    assert losses(tmp_path / "again") == losses(tiny_run)
