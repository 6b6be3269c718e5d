"""Vernier from Python: the example of docs/python.md, run as it stands there, beside the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, vernier

from configs.errors import ConfigError, DataError
from launcher.api import compare, configs


def test_the_example_runs_and_agrees_with_the_command(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 60
    code = code.replace('"demo"', repr(str(ROOT / TINY)))  # smaller, and on the tests' own texts
    (tmp_path / "example.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    source = f'"data.source={ROOT}/tests/data/corpus.jsonl", "eval.placement=none"'
    (tmp_path / "example.py").write_text(code.replace('"eval.placement=none"', source))
    command = [sys.executable, "example.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "documents to judge by" in done.stdout
    assert re.search(r"step 20 is better: -\d+\.\d+ % ± 0\.\d+ %", done.stdout)
    run = tmp_path / "runs" / "small"
    said = json.loads(vernier("compare", f"{run}@10", f"{run}@20", "--json").stdout)
    assert compare(f"{run}@10", f"{run}@20").to_json() == said
    assert len(compare(run).to_json()["checkpoints"]) == 3


def test_what_the_command_would_say_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="globl"):
        configs(ROOT / TINY, "batch.globl=3")
    with pytest.raises(DataError):
        compare(tmp_path / "absent")
    with pytest.raises(ConfigError, match="--by: is about two"):
        compare("a", "b", "c", by="source")
