"""What tests share: the `vernier` command as a user types it, and a tiny data set prepared once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from forkserver import ROOT, VERNIER, Vernier
from made_rows import make_sources
from testbed import Cluster, running_cluster

from configs.files.atomic import MANIFEST, read_manifest, whole_directory
from configs.files.seal import parsed

TINY = "tests/tiny.yaml"
subprocess.Popen = Vernier  # type: ignore[misc]  # forks `vernier` where it can; see forkserver.py


def vernier(*arguments: object, code: int = 0, timeout: float = 500, **options) -> subprocess.CompletedProcess[str]:
    """Runs `vernier`, and fails with its output where it does not end with exit code `code`."""
    command = [*VERNIER, *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}, not {code}: {done.args}\n{done.stdout}\n{done.stderr}"
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


WITHOUT_SLURM = pytest.mark.parametrize(
    ("variable", "value"),
    [
        pytest.param("PATH", str(Path(sys.executable).parent), id="no squeue"),
        pytest.param("SLURM_CONF", "/no/slurm.conf", id="no answer", marks=pytest.mark.long),  # 15 s a question
    ],
)


def by_agent(ranks: int) -> list[str]:
    """The command that starts so many ranks of the module that follows, which has a `main(arguments)`."""
    return [sys.executable, "-m", "launcher.backends.agent", "--nproc-per-node", str(ranks)]


def lines(path: Path) -> list[dict]:
    """The lines of a JSON-lines file, without their seals."""
    return [parsed(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The training losses of a run, of every step once."""
    found = lines(run / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


def table_of(run: Path, step: int) -> Path:
    """The one loss table of a step."""
    (path,) = run.glob(f"losses/*/step-{step:08d}@*.parquet")
    return path


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    """Looks again and again until it holds; fails when that takes too long."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def ask(url: str):
    """What a server on loopback answers, as JSON; None while it does not."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.loads(answer.read())
    except OSError:
        return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `make test` leaves to `make test-long`: all that is marked long or cluster, but one of each kind (smoke)."""
    for item in items:
        if item.get_closest_marker("cluster") and not item.get_closest_marker("smoke"):
            item.add_marker("long")


@pytest.fixture(scope="session", autouse=True)
def quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests see the same machine whatever the shell around them has set, and leave nothing in its home."""
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        os.environ[name] = str(tmp_path_factory.mktemp(name.lower()))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def by_exec_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests marked `real` or `cluster` a command is a new process, as a user's shell makes it."""
    Vernier.real = any(request.node.get_closest_marker(name) is not None for name in ("real", "cluster"))
    yield
    Vernier.real = False


def made_once(name: str, tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path], None]) -> Path:
    """A folder that is made by the first of pytest's workers that wants it, for all of them."""
    session = tmp_path_factory.getbasetemp()
    session = session.parent if os.environ.get("PYTEST_XDIST_WORKER") else session
    folder = session / "tiny" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with its reference set."""
    return made_once("data", tmp_path_factory, lambda data: vernier("prepare", TINY, f"data.dir={data}") and None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of each kind that objectives train on, and a small model to go on from (tests/made_rows.py)."""
    return made_once("sources", tmp_path_factory, lambda folder: make_sources(folder, vernier))


def remade(data: Path, final: Path, change: Callable[[Path], None]) -> Path:
    """A copy of prepared data at `final` in which files were changed and hashed anew, as if prepared so."""
    manifest = {key: value for key, value in read_manifest(data).items() if key != "files"}
    with whole_directory(final, manifest) as part:
        shutil.copytree(data, part, dirs_exist_ok=True)
        (part / MANIFEST).unlink()
        change(part)
    return final


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, its checkpoints scored inline."""
    settings = [TINY, f"data.dir={tiny_data}"]
    return made_once("run", tmp_path_factory, lambda run: vernier("train", *settings, f"run.dir={run}") and None)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The testbed, up for all tests of a session that want it."""
    yield from running_cluster(tmp_path_factory.mktemp("slurm"))
