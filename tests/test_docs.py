"""Every code block of README and docs is run, read as what it is, or marked as what is only printed.

Info strings: `sh run` (typed here, in the order of the pages), `sh needs=…` (what it would take; each of its `vernier`
lines must be one that the command line takes), `text` (what is printed), `yaml` (settings), `python`, `jinja`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
import yaml
from conftest import ROOT, TINY

from configs.load import known_keys
from configs.run.directory import RunDir
from configs.schema import Config
from eval.tables import read_table, write_table

PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
KINDS = re.compile(r"sh run|sh needs=\w[\w ]*|text|yaml|python|jinja|console")


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    text: str


def blocks() -> Iterator[Block]:
    for page in PAGES:
        found: list[str] | None = None
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            if line.startswith("```") and found is None:
                kind, start, found = line[3:].strip(), number, []
            elif line.startswith("```"):
                yield Block(str(page.relative_to(ROOT)), start, kind, "\n".join(found or []))
                found = None
            elif found is not None:
                found.append(line)
        assert found is None, f"{page}: a block is not closed"


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `vernier` line, without its comment."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and ("=" in words[0] or words[0] in ("timeout",)):
            words = words[1:]
        if words[:1] == ["vernier"]:
            yield [one for one in words[1:] if not one.startswith("[") and not one.endswith("]")]


def test_every_block_says_what_it_is() -> None:
    assert [f"{b.page}:{b.line}" for b in blocks() if not KINDS.fullmatch(b.kind)] == []
    for page in PAGES:  # an indented block says nothing of itself
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        assert not re.search(r"\n\n    (?:vernier|python|make|srun) ", text), page


def test_what_users_are_told_to_type_is_taken_by_the_command_line() -> None:
    from launcher.cli import app

    root, keys, wrong = typer.main.get_command(app), set(known_keys()), []
    sections = {key for key in keys if any(one.startswith(f"{key}.") for one in keys)}
    for block in (block for block in blocks() if block.kind.startswith("sh ")):
        for words in commands(block.text):
            where = f"{block.page}:{block.line}: vernier {shlex.join(words)}"
            try:
                verb = next((word for word in words if not word.startswith("-")), None)
                if verb is None:
                    continue
                command = root.commands[verb]  # type: ignore[attr-defined]
                context = command.make_context(verb, words[words.index(verb) + 1 :], parent=root.context_class(root))
            except Exception as error:
                wrong.append(f"{where}: {type(error).__name__} {error}")
                continue
            for setting in context.params.get("overrides") or ():
                key = setting.partition("=")[0]
                if key not in keys - sections and not key.startswith(("model.", "deepspeed.")):
                    wrong.append(f"{where}: no setting {key}")
    assert wrong == []


def test_settings_in_docs_are_settings() -> None:
    keys, wrong = set(known_keys()), []
    for block in (block for block in blocks() if block.kind == "yaml"):
        found = yaml.safe_load(block.text)
        assert isinstance(found, dict), block
        if block.page in ("docs/slurm.md", "docs/containers.md"):  # site profiles
            continue
        wrong += [f"{block.page}:{block.line}: {key}" for key in found if key not in keys]
    assert wrong == []
    assert Config.model_fields


def test_python_in_docs_compiles() -> None:
    for block in (block for block in blocks() if block.kind == "python"):
        compile(block.text, f"{block.page}:{block.line}", "exec")


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_the_page_of_all_verbs_is_what_the_commands_say(tmp_path: Path) -> None:
    written = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "launcher.cli", "utils", "docs", "--name", "vernier", "--output", written]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert written.read_text() == (ROOT / "docs/cli.md").read_text(), "make docs writes it anew"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages take for granted: my.yaml with its run, texts, runs to compare, `vernier` on the path."""
    desk = tmp_path_factory.mktemp("desk")
    settings = yaml.safe_load((ROOT / TINY).read_text())
    settings |= {"name": "my-run", "steps": 160, "snapshot": {"every": 80}, "checkpoint": {"every": 80}}
    settings["data"] |= {"dir": "data/tiny"}
    settings["data"]["source"] = str(ROOT / "tests/data/corpus.jsonl")
    (desk / "my.yaml").write_text(yaml.safe_dump(settings))
    (desk / "path/to/texts").mkdir(parents=True)
    for row in (ROOT / "tests/data/corpus.jsonl").read_text().splitlines():
        text = json.loads(row)["text"]
        (desk / f"path/to/texts/{hashlib.sha256(text.encode()).hexdigest()[:12]}.txt").write_text(text * 12)
    (desk / "bin").mkdir()
    (desk / "bin/vernier").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launcher.cli "$@"\n')
    (desk / "bin/vernier").chmod(0o755)
    typed(desk, "vernier prepare my.yaml && vernier train my.yaml && vernier train my.yaml run.dir=runs/c seed=5")
    demo = RunDir(Path(shutil.copytree(desk / "runs/my-run", desk / "runs/demo")))
    (table, *_) = sorted(demo.losses.glob("*/step-00000160*"))
    for step, gain in ((150, 0.01), (151, 0.011)):
        found = read_table(table)
        noise = np.random.default_rng(step).normal(1 - gain, 1e-3, len(found))
        name = table.name.replace("step-00000160", f"step-{step:08d}")
        write_table(table.with_name(name), replace(found, loss=found.loss * noise, meta={**found.meta, "step": step}))
    return desk


def typed(desk: Path, text: str) -> None:
    """Runs lines in a shell that ends at the first that fails; 3 is a gate's own word."""
    told = dict(os.environ) | {"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for line in text.replace("\\\n", " ").splitlines():
        done = subprocess.run(["bash", "-c", line], cwd=desk, env=told, capture_output=True, text=True, timeout=400)
        assert done.returncode in (0, 3), f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.long
def test_what_is_marked_so_runs_as_it_stands(desk: Path) -> None:
    for block in (block for block in blocks() if block.kind == "sh run"):
        for name, source in (("baseline", "a"), ("candidate", "b")):
            if (desk / "runs" / source).is_dir() and not (desk / "runs" / name).exists():
                shutil.copytree(desk / "runs" / source, desk / "runs" / name)
        typed(desk, block.text)


@pytest.mark.parametrize("word", ["window", "wobble", "reference set", "told apart", "look", "family", "snapshot"])
def test_the_glossary_has_our_words(word: str) -> None:
    assert f"| **{word}** |" in (ROOT / "docs/glossary.md").read_text()
