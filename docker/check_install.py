#!/usr/bin/env python3
"""Runs the Dockerfile's pip lines in a fresh environment, then its entry point; for machines that cannot build images.

The CUDA build of torch is replaced by what .ci/install-torch takes here, and Ubuntu's packages are left out. Nothing is
written into the tree: the build context is copied as .dockerignore lets it through.
usage: python docker/check_install.py [DIR]    (DIR: where the environment goes; default a temporary folder)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SHELL_WORDS = ("&&", ";", "||", "|")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, in order; comments are left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


def pip_lines(text: str) -> list[list[str]]:
    """The `pip install` commands of the RUN instructions, as words; settings such as DS_BUILD_OPS=0 come first."""
    found = []
    for instruction, rest in instructions(text):
        if instruction != "RUN":
            continue
        words: list[str] = []
        for word in [*shlex.split(rest), "&&"]:
            if word not in SHELL_WORDS:
                words.append(word)
                continue
            if "pip" in words and "install" in words:
                found.append(words)
            words = []
    return found


def entry_point(text: str) -> list[str]:
    """ENTRYPOINT and CMD of the last stage."""
    given = dict(instructions(text))
    return [*json.loads(given["ENTRYPOINT"]), *json.loads(given["CMD"])]


def copy_context(to: Path) -> None:
    """What `docker build` would be sent: the names that .dockerignore lets through, less what it bars inside them."""
    lines = [line.strip() for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()]
    barred = {line for line in lines if line and line[0] not in "#!*"}

    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(ROOT)
        return [name for name in names if name == "__pycache__" or (inside / name).as_posix() in barred]

    to.mkdir(parents=True)
    for name in (line[1:] for line in lines if line.startswith("!")):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=left_out)
        elif source.is_file():
            shutil.copy2(source, to / name)


def main(folder: Path) -> None:
    """Makes the environment, installs, and asks the entry point for help."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    context, environment = folder / "context", folder / "environment"
    copy_context(context)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    for words in pip_lines(text):
        began = time.monotonic()
        settings = dict(word.split("=", 1) for word in words[: words.index("pip")])
        torch = next((word for word in words if word.startswith("torch==")), None)
        if torch is not None:
            version = torch.removeprefix("torch==").partition("+")[0]
            command = ["bash", str(ROOT / ".ci" / "install-torch"), str(python), version]
        else:
            command = [str(python), "-m", *words[words.index("pip") :], "--quiet", "--disable-pip-version-check"]
        subprocess.run(command, cwd=context, env={**os.environ, **settings}, check=True)
        print(f"{time.monotonic() - began:4.0f} s  {shlex.join(words)}", flush=True)
    subprocess.run([str(python), "-m", "pip", "check"], cwd=folder, check=True)
    command = entry_point(text)
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]], cwd=folder, check=True, capture_output=True, text=True
    )
    print(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="vernier-image-") as temporary:
            main(Path(temporary))
