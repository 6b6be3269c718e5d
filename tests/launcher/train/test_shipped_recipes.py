"""The shipped recipes, in a small form each: from `init` and `prepare` to a verdict, and on after a kill to the bit."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, VERNIER, losses, vernier, wait_for
from faults.running import processes
from faults.same import differences
from made_rows import LLAMA

from configs.load import load_config, recipes

STEPS = ["epochs=null", "steps=24", "checkpoint.every=8", "snapshot.every=8", "eval.placement=inline"]
RANKS = ["nproc=2", "threads_per_rank=1", "batch.global=16", "batch.micro=4"]
DATA = ["data.max_bytes=400_000", "reference.documents=60", "reference.max_windows=2", "reference.max_fraction=0.2"]
GPT2 = "model={type: gpt2, n_embd: 48, n_layer: 2, n_head: 4, n_positions: 64}"
ROBERTA = (
    "model={type: roberta, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, "
    "max_position_embeddings: 66}"
)
SHORT = ["sequence_length=64", "schedule.warmup_ratio=null", "schedule.warmup_steps=2", "optimizer.lr=5e-3"]
# What makes a recipe small.
TINY = {
    "wsb": [*SHORT, GPT2, "data.vocab_size=512", "batch.accumulation=null", "precision=fp32"],
    "continue": [*SHORT, "optimizer.lr=1e-3"],
    "chat-lora": [*SHORT, "sequence_length=200", "lora.r=4"],
    "classify": [*SHORT, "reference.max_fraction=0.2", "reference.documents=120"],
    "code": [*SHORT, LLAMA, "data.vocab_size=512"],
    "roberta-mlm": [*SHORT, "sequence_length=62", ROBERTA, "data.vocab_size=512"],
    "nanogpt-char": [*SHORT, GPT2],
}


def filled(name: str, sources: Path, folder: Path) -> Path:
    """The recipe as `init` fills it in."""
    data = {"wsb": "posts.csv", "chat-lora": "chats.jsonl", "classify": "labelled.jsonl"}.get(name)
    options = ["--data", str(sources / data) if data else "python-stdlib"]
    if "path/to/model" in recipes()[name].read_text():
        options += ["--model", str(sources / "model")]
    vernier("init", folder, "--recipe", name, *options)
    return folder / f"{name}.yaml"


def prepared(name: str, sources: Path, folder: Path) -> tuple[Path, list[str]]:
    """A recipe in its small form, its data prepared: (config, settings)."""
    config = filled(name, sources, folder)
    settings = [*STEPS, *RANKS, *TINY[name], f"data.dir={folder / 'data'}"]
    if name not in ("chat-lora", "classify"):
        settings += DATA
    vernier("prepare", config, *settings)
    return config, settings


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_trains_on_two_ranks_and_its_loss_falls_by_a_paired_verdict(
    name: str, sources: Path, tmp_path: Path
) -> None:
    config, settings = prepared(name, sources, tmp_path)
    said = vernier("train", config, *settings, f"run.dir={tmp_path / 'run'}").stdout
    assert "best: step" in said
    first, *_, last = json.loads(vernier("compare", tmp_path / "run", "--json").stdout)["checkpoints"]
    assert last["step"] == 24
    assert last["versus_first"]["verdict"] == "better"
    assert last["loss"] < first["loss"]


def test_adapters_are_exported_added_and_score_as_they_did_beside_the_base(sources: Path, tmp_path: Path) -> None:
    config, settings = prepared("chat-lora", sources, tmp_path)
    run, out = tmp_path / "run", tmp_path / "model"
    vernier("train", config, *settings, f"run.dir={run}", "steps=16")
    vernier("export", run, "--out", out)
    assert not (out / "adapter_config.json").exists()
    reference = tmp_path / "data" / "reference"
    found = json.loads(vernier("eval", out, "--reference", reference, "--out", tmp_path / "tables", "--json").stdout)
    *_, last = json.loads(vernier("compare", run, "--json").stdout)["checkpoints"]
    assert found[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    vernier("export", run, "--out", tmp_path / "adapter", "--adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    manifest = json.loads((run / "snapshots" / "step-00000016" / "manifest.json").read_text())
    assert len(manifest["base"]) == 64  # the fingerprint of the weights that it was trained beside


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_a_recipe_that_is_killed_goes_on_to_the_same_bits(name: str, sources: Path, tmp_path: Path) -> None:
    config, settings = prepared(name, sources, tmp_path)
    straight, run = tmp_path / "straight", tmp_path / "run"
    vernier("train", config, *settings, f"run.dir={straight}")
    process = subprocess.Popen(
        [*VERNIER, "train", str(config), *settings, f"run.dir={run}"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: (run / "checkpoints" / "step-00000008" / "manifest.json").is_file())
    while found := processes(run):  # one may just be starting
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait(30)
    assert json.loads((run / "state.json").read_text())["state"] == "running"
    vernier("train", config, *settings, f"run.dir={run}")
    assert differences(straight, run) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["continue", "chat-lora", "classify", "roberta-mlm"])
def test_an_objective_has_one_loss_at_each_zero_stage(name: str, sources: Path, tmp_path: Path) -> None:
    config, settings = prepared(name, sources, tmp_path)
    found, unscored = {}, ["eval.placement=none", "stop_when.gain_below=null"]
    for stage in (0, 1, 2, 3):
        run = tmp_path / f"stage-{stage}"
        vernier("train", config, *settings, f"run.dir={run}", f"zero.stage={stage}", *unscored)
        found[stage] = losses(run)
    for stage in (1, 2, 3):
        assert found[stage] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_short_commented_and_read(name: str) -> None:
    text = recipes()[name].read_text()
    assert text.startswith("# ")
    assert name == "demo" or text.count("\n") <= 25
    config = load_config(name)
    assert config.steps or config.epochs


def test_the_7b_recipe_is_planned_and_rendered_for_64_ranks(tmp_path: Path) -> None:
    vernier("init", tmp_path, "--recipe", "pretrain-7b-64gpu", "--data", "python-stdlib")
    config = tmp_path / "pretrain-7b-64gpu.yaml"
    rendered = vernier("launch", config, "--dry-run").stdout
    assert "#SBATCH --nodes=8" in rendered
    assert "2-00:00:00" in rendered
    plan = json.loads(vernier("plan", config, "--json", "--memory", "80GiB").stdout)
    assert 6.5e9 < plan["parameters"] < 7e9


def test_init_fills_in_a_recipe_and_refuses_what_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "a b.jsonl").write_text("")
    vernier("init", tmp_path, "--recipe", "chat-lora", "--data", tmp_path / "a b.jsonl", "--model", tmp_path)
    text = (tmp_path / "chat-lora.yaml").read_text()
    assert text.count(str(tmp_path / "a b.jsonl")) == 1
    assert f'model: {{path: "{tmp_path}"}}' in text
    assert "path/to/" not in text.partition("name:")[2]
    refused = vernier("init", tmp_path, "--recipe", "wsb", "--model", tmp_path, code=2).stderr
    assert "has no place for it" in refused
    refused = vernier("init", tmp_path, "--recipe", "wsp", code=2).stderr
    assert "none of" in refused
    assert "wsb" in refused
