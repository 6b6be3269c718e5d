"""Forty steps of each objective beside Hugging Face's Trainer: the same data, order, model and schedule, in fp32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import losses, vernier
from made_rows import conversations, labelled
from transformers import AutoTokenizer, Trainer, TrainingArguments

from configs.load import load_config, resolve
from configs.run.facts import read_dataset_facts
from eval.scoring.models import adapter_base, auto_model
from trainer.data.examples import open_windows
from trainer.model.build import kind_of
from trainer.objectives import objective_of
from trainer.order import windows_at

STEPS, BATCH = 40, 8
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"type": "llama", **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
ROBERTA = {"type": "roberta", **SMALL, "max_position_embeddings": 132}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {"model": LLAMA},
    "masked": {"model": {**ROBERTA, **QUIET}},
    "classify": {"model": {**ROBERTA, **QUIET}},
    "instruct": {"model": LLAMA},
    "instruct none": {"model": LLAMA},
}


def trained(name: str, folder: Path, extra: list[str]) -> Path:
    """A run of Vernier's, one rank, whose snapshot 0 is where the peer starts too."""
    objective, _, packing = name.partition(" ")
    source = "tests/data/corpus.jsonl"
    if objective == "instruct":
        source = str(conversations(folder / "rows.jsonl", count=150))
    elif objective == "classify":
        source = str(labelled(folder / "rows.jsonl"))
    settings = {
        "name": "parity",
        "steps": STEPS,
        "sequence_length": 120,
        "nproc": 1,
        "threads_per_rank": 1,
        "objective": {"name": objective},
        "data": {"source": source, "dir": str(folder / "data"), "vocab_size": 512},
        "reference": {"documents": 20, "max_fraction": 0.3, "block_samples": 16},
        "model": OBJECTIVES.get(name, {"model": LLAMA})["model"],
        "batch": {"global": BATCH, "micro": BATCH},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"name": "constant"},
        "snapshot": {"every": STEPS},
        "checkpoint": {"every": STEPS},
        "eval": {"placement": "none"},
        "run": {"dir": str(folder / "run")},
    }
    if packing:
        settings["data"] |= {"packing": packing}
    if objective == "instruct":
        settings["data"]["tokenizer"] = str(chat_tokenizer(folder))
    (folder / "config.yaml").write_text(json.dumps(settings))
    vernier("prepare", folder / "config.yaml", *extra)
    vernier("train", folder / "config.yaml", *extra)
    return folder / "run"


def chat_tokenizer(folder: Path) -> Path:
    from trainer.data.tokenizer import make_tokenizer

    if not (folder / "tokenizer").is_dir():
        make_tokenizer(folder / "tokenizer", [Path("tests/data/corpus.jsonl").read_text()], given=None, vocab_size=512)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]}
        )
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


class Recording(Trainer):
    """The peer, with each step's loss kept."""

    def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*given, **named)
        self.found.append(float(loss))
        return loss


def peer_losses(run: Path, model: Any) -> list[float]:
    """Losses of the peer on the batches that the run had, in its order."""
    config = resolve(load_config(run / "config.yaml"), nproc=1)
    objective = objective_of(config)
    facts = read_dataset_facts(config.data_dir / "dataset.json")
    data = open_windows(config, config.data_dir, facts["prefix_id"])
    rows: list[dict[str, torch.Tensor]] = []
    for position in range(STEPS):
        windows = windows_at(position, batch=BATCH, windows=len(data), seed=config.seed)
        inputs = objective.inputs(data, windows, position)
        named = {"ids_BT": "input_ids", "position_BT": "position_ids", "mask_BT": "attention_mask", "label": "labels"}
        batch = {named[key]: value for key, value in inputs.items() if key in named}
        if "row_N" in inputs:
            batch["labels"] = torch.full_like(inputs["ids_BT"], -100)
            batch["labels"][inputs["row_N"], inputs["place_N"]] = inputs["target_N"]
        if "target_BT" in inputs:  # the peer shifts labels by itself, so it wants one place more
            batch = {
                key: torch.cat([value, value[:, -1:] + (key == "position_ids")], 1) for key, value in batch.items()
            }
            target = inputs["target_BT"]
            batch["labels"] = torch.cat([torch.full((len(target), 1), -100), target], 1)
        rows += [{key: value[row] for key, value in batch.items()} for row in range(BATCH)]

    def joined(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([one[key] for one in features]) for key in features[0]}

    arguments = TrainingArguments(
        output_dir=str(run.parent / "peer"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_drop_last=False,
        disable_tqdm=True,
    )
    trainer = Recording(model=model, args=arguments, train_dataset=rows, data_collator=joined)
    trainer.found = []
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return trainer.found


@pytest.mark.long
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_hugging_face_trainer(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = trained(name, tmp_path, [])
    kind = kind_of(load_config(run / "config.yaml"))
    model = auto_model(kind).from_pretrained(run / "snapshots" / "step-00000000", dtype=torch.float32)
    ours, theirs = np.array(losses(run)), np.array(peer_losses(run, model))
    assert len(ours) == len(theirs) == STEPS
    assert np.abs(ours / theirs - 1).max() < 1e-5
    assert ours[-5:].mean() < 0.95 * ours[:5].mean()


@pytest.mark.long
def test_losses_of_adapters_are_those_of_the_hugging_face_trainer_with_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    torch.set_num_threads(1)
    (tmp_path / "base").mkdir()
    base = trained("instruct", tmp_path / "base", []) / "snapshots" / f"step-{STEPS:08d}"
    (tmp_path / "lora").mkdir()
    settings = [f"model={{path: {base}}}", "lora.r=4", "optimizer.lr=1e-3", f"data.tokenizer={base}"]
    run = trained("instruct", tmp_path / "lora", settings)
    start = run / "snapshots" / "step-00000000"
    whole = auto_model("causal").from_pretrained(adapter_base(start), dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, start, is_trainable=True)
    ours, theirs = np.array(losses(run)), np.array(peer_losses(run, model))
    assert np.abs(ours / theirs - 1).max() < 1e-5
    assert ours[-5:].mean() < ours[:5].mean()
