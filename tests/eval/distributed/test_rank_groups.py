"""Rank-groups: weights sharded over ranks, ensembles, and a killed rank whose work is not lost."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, VERNIER, table_of, vernier
from faults.running import the

from eval.reference.set import load_reference
from eval.tables import read_table


def test_sharded_weights_give_the_same_losses(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    model, plain = tiny_run / "snapshots" / "step-00000020", read_table(table_of(tiny_run, 20))
    options = ["--reference", tiny_data / "reference", "--weights", "sharded", "--nproc", 3, "--out", tmp_path]
    vernier("eval", model, *options)
    (path,) = tmp_path.glob("*.parquet")
    table = read_table(path)
    np.testing.assert_allclose(table.loss, plain.loss, rtol=1e-5)
    assert table.meta["weights"] == "sharded"
    assert table.meta["model"] == plain.meta["model"]


def test_an_ensemble_is_the_mean_of_probabilities(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = [tiny_run / "snapshots" / f"step-{step:08d}" for step in (10, 20)]
    options = ["--reference", tiny_data / "reference", "--ensemble", "both", "--out", tmp_path, "--nproc", 2]
    vernier("eval", *models, *options)
    table = read_table(tmp_path / "both@causal.fp32.parquet")
    assert table.meta["label"] == "both"
    reference = load_reference(tiny_data / "reference")
    loaded = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in models]
    ids, first, lengths = reference.batch_inputs(0)
    for row, sample in enumerate(reference.batch_samples(0)):
        own = torch.from_numpy(ids[row, : lengths[row]])
        with torch.no_grad():
            p = sum(m(input_ids=own[None, :-1]).logits[0].float().softmax(-1) for m in loaded) / 2
        target = own[1:][first[row] - 1 :]
        p_target = p[first[row] - 1 :].gather(-1, target[:, None])
        assert table.loss[sample] == pytest.approx(float(-p_target.log().double().sum()), rel=1e-5)
    both, one = table.loss.sum(), read_table(table_of(tiny_run, 10)).loss.sum()
    assert both < one


@pytest.fixture
def slow_model(tiny_data: Path, tmp_path: Path) -> Path:
    """A model large enough that its scoring has a middle to be killed in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "slow")
    return tmp_path / "slow"


def test_a_killed_ranks_hole_is_scored_again_and_the_table_is_the_same(
    slow_model: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = slow_model
    command = [*VERNIER, "eval", str(model), "--reference", str(tiny_data / "reference"), "--nproc", "2"]
    environment = {**os.environ, "VERNIER_JOURNAL_S": "0"}  # written after every batch
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out" / ".slow@causal.fp32.parquet.scoring"
    _wait_for(lambda: len(list(folder.glob("*.safetensors"))) >= 3, running)
    os.kill(the(tmp_path / "out", "rank", "eval", 1), signal.SIGKILL)
    assert running.wait(timeout=200) == 0
    assert "a rank died" in running.stderr.read()
    (path,) = (tmp_path / "out").glob("*.parquet")
    assert path.read_bytes() == _undisturbed(model, tiny_data, tmp_path / "whole").read_bytes()
    assert not folder.exists()


def test_what_cannot_be_sharded_is_refused_and_does_not_hang(tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    scaled = AutoConfig.for_model("granite", **sizes, num_attention_heads=2, num_key_value_heads=2, logits_scaling=8.0)
    AutoModelForCausalLM.from_config(scaled).save_pretrained(tmp_path / "granite")
    BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    for name, said in (("granite", "more than its output matrix"), ("bert", "no causal LM")):
        options = [
            "--reference",
            tiny_data / "reference",
            "--weights",
            "sharded",
            "--nproc",
            2,
            "--out",
            tmp_path / "o",
        ]
        done = vernier("eval", tmp_path / name, *options, code=2, timeout=100)
        assert said in done.stderr.splitlines()[-1]


def test_an_ensemble_of_padded_vocabularies_and_a_name_with_an_at(tiny_data: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for size in (512, 576):
        config = LlamaConfig(
            vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(size))
    options = ["--reference", tiny_data / "reference", "--ensemble", "x@y", "--out", tmp_path / "out"]
    vernier("eval", tmp_path / "512", tmp_path / "576", *options)
    assert read_table(tmp_path / "out" / "x@y@causal.fp32.parquet").meta["label"] == "x@y"


def test_other_settings_are_another_model_and_force_takes_up_nothing(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    import json

    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", foreign)
    (foreign / "manifest.json").unlink()
    options = ["--reference", tiny_data / "reference", "--out", tmp_path / "out"]
    vernier("eval", foreign, *options)
    config = json.loads((foreign / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (foreign / "config.json").write_text(json.dumps(config))
    assert "losses of another model" in vernier("eval", foreign, *options, code=2).stderr
    before = read_table(tmp_path / "out" / "foreign@causal.fp32.parquet").loss
    vernier("eval", foreign, *options, "--force")
    assert (read_table(tmp_path / "out" / "foreign@causal.fp32.parquet").loss != before).all()


def test_a_model_that_gives_nan_is_one_line_and_leaves_nothing(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", broken)
    (broken / "manifest.json").unlink()  # a foreign model now: ours would be refused by its hash
    file = sorted(broken.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    done = vernier("eval", broken, "--reference", tiny_data / "reference", "--out", tmp_path / "out", code=2)
    assert "has a loss that is not finite" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*"))


def _undisturbed(model: Path, data: Path, out: Path) -> Path:
    vernier("eval", model, "--reference", data / "reference", "--out", out)
    return next(out.glob("*.parquet"))


def _wait_for(there, running: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not there():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
