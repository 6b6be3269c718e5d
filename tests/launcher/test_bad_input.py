"""What a user gets wrong is said in one line, with exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, VERNIER, vernier
from safetensors.torch import load_file, save_file


def refused(*arguments: object) -> str:
    """The one line that `vernier` says when it ends with exit code 2."""
    said = vernier(*arguments, code=2).stderr.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert said[-1] == errors[0]
    return errors[0]


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    assert "optimizer.lrr: unknown key; did you mean optimizer.lr?" in refused("train", TINY, "optimizer.lrr=1")


def test_a_wrong_type_is_named_with_its_value() -> None:
    assert "steps: 'many' should be a valid integer" in refused("train", TINY, "steps=many")


def test_a_missing_data_directory_says_what_makes_one(tmp_path: Path) -> None:
    said = refused("train", TINY, f"data.dir={tmp_path / 'none'}", f"run.dir={tmp_path / 'run'}")
    assert "is not there; run `vernier prepare CONFIG` first" in said
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus_says_what_was_looked_at(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "blank.txt").write_text("  \n")
    said = refused("prepare", TINY, f"data.source={tmp_path / 'texts'}", f"data.dir={tmp_path / 'data'}")
    assert "no text in" in said
    assert "1 of them empty" in said
    assert not (tmp_path / "data").exists()


def test_an_unreadable_file_is_skipped_counted_and_named(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(ROOT / "tests/data/corpus.jsonl", texts)
    (texts / "broken.txt").write_bytes(b"caf\xe9 \xff\xfe")
    done = vernier("prepare", TINY, f"data.source={texts}", f"data.dir={tmp_path / 'data'}")
    assert "1 files not readable" in done.stdout
    assert "texts/broken.txt: not UTF-8" in done.stdout


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "model.vocab_size=300")
    assert "model.vocab_size: 300 is smaller than the tokenizer's vocabulary (512)" in said
    assert not run.exists()


def test_a_model_of_another_tokenizer_is_told_how_to_tokenize_again(
    tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    vernier("prepare", TINY, f"data.dir={tmp_path / 'data'}", "data.vocab_size=400")
    model, reference = tiny_run / "snapshots" / "step-00000020", tmp_path / "data" / "reference"
    said = refused("eval", model, "--reference", reference, "--out", tmp_path / "losses")
    assert "its tokenizer" in said
    command = said.partition("tokenize the same documents again: vernier ")[2].replace("NEW_DIR", str(tmp_path / "new"))
    vernier(*command.split())  # what it says works
    vernier("eval", model, "--reference", tmp_path / "new", "--out", tmp_path / "losses")
    facts = [json.loads((d / "reference.json").read_text()) for d in (reference, tmp_path / "new")]
    assert facts[0]["fingerprints"]["text"] == facts[1]["fingerprints"]["text"]
    assert facts[0]["fingerprints"]["tokens"] != facts[1]["fingerprints"]["tokens"]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_snapshot_cut_short_is_refused(foreign: bool, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", model)
    if foreign:  # a Hugging Face directory that is not ours has no manifest to tell
        (model / "manifest.json").unlink()
    os.truncate(next(model.glob("model-00001*.safetensors")), 50_000)
    said = refused("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path / "losses")
    assert "cut short" in said
    assert "model-00001-of-00002.safetensors" in said
    assert not (tmp_path / "losses").exists()


def test_a_run_that_another_process_holds_is_refused_with_its_holder(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [TINY, f"data.dir={tiny_data}", f"run.dir={run}", "steps=100000", "eval.placement=none"]
    first = subprocess.Popen([*VERNIER, "train", *settings], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        holder = json.loads((run / "lock").read_text())
        said = refused("train", *settings)
        assert f"is held by process {holder['pid']} on {holder['host']}" in said
    finally:
        first.terminate()
        assert first.wait(60) == 75
    assert json.loads((run / "state.json").read_text())["exit_code"] == 75


def test_a_run_is_not_gone_on_with_as_another_experiment(tiny_run: Path, tiny_data: Path) -> None:
    said = refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={tiny_run}", "seed=99")
    assert "seed: the run was started with 3, not 99; --force-resume goes on all the same, --fresh starts anew" in said


def test_more_steps_need_to_be_asked_for(tiny_run: Path, tiny_data: Path) -> None:
    said = refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={tiny_run}", "steps=30")
    assert "steps: the run was started with 20, not 30; --extend goes on to 30" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model={type: lama}", "'lama' is no causal LM that transformers knows; did you mean llama"),
        ("model.hidden_sizes=3", "llama has no such field; did you mean hidden_size?"),
        ("model.num_attention_heads=5", "llama refuses these fields"),
        ("batch.global=15", "batch.global: 15 is not divisible by 2 ranks"),
    ],
)
def test_a_model_that_cannot_be_is_said_before_anything_starts(
    override: str, said: str, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert said in refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}", override)
    assert not run.exists()


def test_a_time_limit_reaches_slurm_as_it_was_written(tmp_path: Path) -> None:
    asked = ["launch", TINY, f"run.dir={tmp_path / 'run'}", "--dry-run"]
    assert "#SBATCH --time=12:00:00 " in vernier(*asked, "launch.time=12:00:00").stdout  # not 43200 minutes
    assert "launch.time: '12.5' should be minutes, hours:minutes:seconds" in refused(*asked, "launch.time=12.5")


def test_an_override_throws_away_no_sizes_of_the_users_model(tmp_path: Path) -> None:
    said = refused("plan", TINY, f"run.dir={tmp_path / 'run'}", "model.type=gpt2")
    assert "would throw away what the config sets in model: " in said
    assert "hidden_size, intermediate_size, num_hidden_layers" in said
    assert "give it whole, 'model={type: gpt2, …}'" in said


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("placement", ["inline", "separate"])
def test_an_encoder_that_sees_what_it_is_to_predict_is_refused_before_a_rank_starts(
    kind: str, placement: str, tiny_data: Path, tmp_path: Path
) -> None:
    sizes = "hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4"
    model, run = f"model={{type: {kind}, {sizes}, max_position_embeddings: 80}}", tmp_path / "run"
    config = tmp_path / "encoder.yaml"
    config.write_text((ROOT / TINY).read_text().split("model:")[0] + "batch: {global: 16, micro: 4}\n")
    where = ["train", config, f"data.dir={tiny_data}", f"run.dir={run}", f"eval.placement={placement}"]
    said = refused(*where, model)
    assert said.startswith(f"error: model.type: {kind} ")
    assert "set objective.name: masked, or model.is_decoder: true to train it as a causal LM" in said
    assert not run.exists()
    if kind in ("bert", "electra"):
        few = ["steps=2", "schedule.warmup_steps=0", "snapshot.every=2", "eval.placement=inline"]
        vernier(*where, model, "model.is_decoder=true", *few)


def test_init_never_overwrites(tmp_path: Path) -> None:
    vernier("init", tmp_path)
    (tmp_path / "vernier.yaml").write_text("mine")
    assert "is there already" in refused("init", tmp_path)
    assert (tmp_path / "vernier.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
    ],
)
def test_a_quantized_model_is_refused_before_a_rank_starts(
    entry: dict, method: str, tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", model)
    (model / "manifest.json").unlink()  # a foreign one
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, **entry}))
    said = refused("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path / "losses")
    assert f"its config.json has a quantization_config ({method})" in said
    assert "dequantize the model and save it anew" in said
    run = tmp_path / "run"
    assert method in refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={run}", f"model={{path: {model}}}")
    assert not run.exists()


def test_weights_that_are_quantized_without_a_word_are_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run / "snapshots" / "step-00000020", model)
    (model / "manifest.json").unlink()
    file = next(model.glob("model-00001*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    said = refused("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path / "losses")
    assert f"{name} is of type F8_E4M3: quantized weights" in said


def test_settings_of_the_model_that_ask_for_what_there_is_not(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ["train", TINY, f"data.dir={tiny_data}", f"run.dir={run}"]
    assert "model.quantization_config: awq" in refused(*asked, "model.quantization_config={quant_method: awq}")
    ctrl = "model={type: ctrl, n_embd: 32, n_layer: 1, n_head: 2, dff: 64}"
    assert "gradient_checkpointing: ctrl has none" in refused(*asked, ctrl, "gradient_checkpointing=true")
    assert not run.exists()


def test_positions_that_are_not_for_tokens_are_reckoned_with(tiny_data: Path, tmp_path: Path) -> None:
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, pad_token_id: 1"
    roberta = f"model={{type: roberta, is_decoder: true, {sizes}, max_position_embeddings: 64}}"
    said = refused("train", TINY, f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", roberta)
    assert "sequence_length: 64 is longer than the 62 tokens that roberta takes" in said
