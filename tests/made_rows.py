"""Rows to train on, of real text that every machine with Python has: its own docstrings, and posts made of them."""

from __future__ import annotations

import ast
import csv
import json
import random
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "model={type: llama, hidden_size: 48, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4}"
)
PACKAGES = ("asyncio", "email", "tkinter", "json", "logging", "unittest", "concurrent", "ctypes", "http", "xml")


def docstrings(packages: tuple[str, ...] = PACKAGES) -> list[tuple[str, str, str]]:
    """(package, what is described, how) of Python's standard library."""
    found = []
    for package in packages:
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    found.append((package, node.name, text))
    return found


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """A row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path: Path, count: int = 400, system: bool = True) -> Path:
    """What functions do, asked and told; some in two turns."""
    rng, docs = random.Random(0), docstrings()
    rng.shuffle(docs)
    rows = []
    for at in range(count):
        turns = [docs[at], docs[-1 - at]] if at % 3 == 0 else [docs[at]]
        messages = [{"role": "system", "content": "You know Python's library."}] if system else []
        for package, name, text in turns:
            messages.append({"role": "user", "content": f"What is {name} of {package}?"})
            messages.append({"role": "assistant", "content": text[:300]})
        rows.append({"messages": messages})
    return write_jsonl(path, rows)


def labelled(path: Path, packages: tuple[str, ...] = ("asyncio", "email", "tkinter")) -> Path:
    """Docstrings and the package that each is of."""
    return write_jsonl(path, [{"text": text[:600], "label": package} for package, _, text in docstrings(packages)])


def posts(path: Path, count: int = 3000) -> Path:
    """A CSV of posts as forums dump them: some deleted, empty, doubled, with emoji and line breaks."""
    rng, docs = random.Random(0), docstrings()
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["title", "score", "id", "url", "comms_num", "created", "body", "timestamp"])
        for at in range(count):
            package, name, text = docs[rng.randrange(len(docs))]
            body = f"{text}\n\n{name} 🚀🚀 to the moon, {package} {rng.randrange(1000)}"
            body = {0: "", 1: "[deleted]", 2: "[removed]"}.get(at % 25, body)
            writer.writerow([f"{name} 💎🙌", rng.randrange(900), f"l6u{at}", "https://redd.it", 3, at, body, "2021"])
    return path


def make_sources(folder: Path, vernier: Callable[..., Any]) -> None:
    """Rows of each kind, and in `model` a small model with its tokenizer and a chat template, trained by `vernier`."""
    folder.mkdir(exist_ok=True)
    conversations(folder / "chats.jsonl")
    labelled(folder / "labelled.jsonl")
    posts(folder / "posts.csv")
    settings = [
        LLAMA,
        "name=base",
        f"data.dir={folder / 'data'}",
        f"run.dir={folder / 'run'}",
        "data.source=python-stdlib",
        "data.max_bytes=400_000",
        "data.vocab_size=512",
        "reference.documents=60",
        "reference.max_fraction=0.2",
        "sequence_length=200",
        "epochs=null",
        "steps=24",
        "nproc=2",
        "threads_per_rank=1",
        "batch.global=16",
        "batch.micro=4",
        "optimizer.lr=5e-3",
        "schedule.warmup_ratio=null",
        "eval.placement=none",
    ]
    vernier("prepare", "code", *settings)
    vernier("train", "code", *settings)
    shutil.copytree(folder / "run" / "snapshots" / "step-00000024", folder / "model")
    (folder / "model" / "manifest.json").unlink()
    (folder / "model" / "chat_template.jinja").write_text(CHATML)
