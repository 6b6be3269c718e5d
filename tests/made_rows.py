"""Rows to train on, of real text that every machine with Python has: its own docstrings, and posts made of them."""

from __future__ import annotations

import ast
import csv
import json
import random
import sysconfig
from pathlib import Path

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
