"""`vernier launch --on mpi`: ranks that mpirun starts train, score, stop, die and go on as torchrun's do."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, lines, losses, table_of, vernier, wait_for
from faults.running import processes
from test_mpirun import LOOPBACK

pytestmark = pytest.mark.cluster

LONG = ["steps=300", "checkpoint.every=50", "snapshot.every=100", "eval.placement=separate", "eval.nproc=2"]


@pytest.fixture(scope="module", autouse=True)
def mpi() -> None:
    """Without MPI these tests are skipped, except where the cluster is required."""
    if shutil.which("mpirun") is None and not os.environ.get("REQUIRE_CLUSTER"):
        pytest.skip("mpirun is not on this machine")


def environment() -> dict[str, str]:
    """As it is once the fixtures have set theirs."""
    return {**os.environ, **LOOPBACK}


def launch(*settings: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    return vernier("launch", TINY, *settings, "--on", "mpi", code=code, env={**environment(), **more})


@pytest.fixture
def begin() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts `vernier`; what is left of it when a test fails is killed."""
    begun: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        begun.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait(10)


def mpirun_of(run: Path, module: str) -> int:
    (pid,) = [p for p, c in processes(run).items() if c.command.startswith("mpirun") and f"-m {module} " in c.command]
    return pid


@pytest.mark.smoke
def test_mpirun_trains_and_scores_to_the_bits_of_torchrun(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = launch(f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "eval.nproc=2").stderr
    first, second = (line for line in said.splitlines() if "rank" in line and "scored" not in line)
    assert first.startswith("rank 0 of 2, told by mpirun; address 127.0.0.1:")
    assert first.endswith("from MPI")
    assert "2 ranks × 4 × 2 = batch 16" in second
    assert (run / "logs" / "rank-1.log").read_text().startswith("rank 1 of 2, told by mpirun; address 127.0.0.1:")
    assert losses(run) == losses(tiny_run)
    for step in (0, 10, 20):
        assert table_of(run, step).read_bytes() == table_of(tiny_run, step).read_bytes()


def test_stopped_and_killed_it_goes_on_to_the_bits_of_torchrun(
    begin: Callable[[list[str]], subprocess.Popen[str]], tiny_data: Path, tmp_path: Path
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    vernier("train", TINY, *LONG, f"data.dir={tiny_data}", f"run.dir={straight}", "eval.placement=inline")
    where = [*LONG, f"data.dir={tiny_data}", f"run.dir={run}"]
    command = [*VERNIER, "launch", TINY, *where, "--on", "mpi"]

    def at_step(step: int) -> None:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= step, 240)

    training = begin(command)
    at_step(20)
    training.send_signal(signal.SIGTERM)
    _, said = training.communicate(timeout=200)
    assert training.returncode == 75, said
    assert "the same command goes on" in said
    wait_for(lambda: not processes(run), 30)

    training = begin(command)
    at_step(70)
    os.kill(mpirun_of(run, "eval"), signal.SIGKILL)  # comes back
    at_step(130)
    os.kill(mpirun_of(run, "trainer"), signal.SIGKILL)
    _, said = training.communicate(timeout=200)
    assert training.returncode == 1, said
    assert "ended without a word (mpirun: signal 9)" in said
    wait_for(lambda: not processes(run), 30)

    done = launch(*where)
    assert "going on from step" in done.stderr
    assert losses(run) == losses(straight)
    for step in (0, 100, 200, 300):
        assert table_of(run, step).read_bytes() == table_of(straight, step).read_bytes()
    assert any(event["kind"] == "evaluator died" and "mpirun's" in event["message"] for event in events(run))


def test_ranks_that_ask_for_it_are_started_again(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # At ZeRO-3 no micro-batch is tried before the first step, so that it is the ranks' first step that does not fit.
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "zero.stage=3"]
    launch(*settings, VERNIER_FAULTS="windows=2")
    assert [event["kind"] for event in events(run)].count("started again") == 1
    assert json.loads((run / "adapted.json").read_text())["micro"] == 2
    assert json.loads((run / "state.json").read_text())["state"] == "done"


def events(run: Path) -> list[dict]:
    return lines(run / "events.jsonl")


def test_a_dry_run_shows_the_commands_for_its_hosts(tiny_data: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# a cluster\nnode-a slots=64\nnode-b:64\n\nnode-c\n")
    site = tmp_path / "site.yaml"
    site.write_text("environment: {MY_CLUSTER: a b}\n")
    settings = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", "eval.placement=separate", "launch.nodes=2"]
    settings += ["threads_per_rank=null", "--hosts", str(hosts), "--site", str(site), "--dry-run"]
    told = launch(*settings, NCCL_DEBUG="INFO", NCCL_IB_PKEY="7", HF_TOKEN="hf_secret", OMP_NUM_THREADS="9").stdout
    train, score = told.splitlines()
    assert train.startswith("mpirun -n 4 --host node-a:2,node-b:2 --map-by ppr:2:node ")
    for name in ("NCCL_DEBUG", "NCCL_IB_PKEY", "PYTHONSAFEPATH", "MY_CLUSTER"):
        assert f" -x {name} " in train
    assert "OMP_NUM_THREADS" not in train  # it is this machine's; a host has cores of its own
    assert " -x OMP_NUM_THREADS " in score  # eval.threads_per_rank, which changes bits
    assert train.endswith(f"-m trainer {tmp_path / 'run' / 'train-config.yaml'}")
    assert "mpirun -n 1 --host node-c:1 " in score
    assert "HF_TOKEN" not in told
    assert "hf_secret" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["launch.nodes=2"], "error: --on: mpi: name the machines of launch.nodes and eval.nodes: --hosts a,b,c"),
        (["--hosts", "a"], ""),
        (["--hosts", "a,b,c"], "error: launch.nodes: say how many of the 3 hosts train; it is 1 unless set"),
        (["--hosts", "a", "launch.nodes=2"], "error: --hosts: 1 are given, launch.nodes is 2"),
        (["--hosts", "a,-oProxyCommand=x"], "error: --hosts: '-oProxyCommand=x' is no host"),
        (["--hosts", "a,a"], "error: --hosts: a is there twice"),
        (["--hosts", ","], "error: --hosts: ',' names no host"),
        (["--hosts", "a,b,c", "launch.nodes=3"], "error: batch.global: 16 is not divisible by 6 ranks"),
    ],
)
def test_hosts_that_do_not_add_up_are_refused(settings: list[str], said: str, tiny_data: Path, tmp_path: Path) -> None:
    told = launch(f"data.dir={tiny_data}", f"run.dir={tmp_path / 'r'}", *settings, "--dry-run", code=2 if said else 0)
    assert told.stderr.startswith(said)
    assert len(told.stderr.splitlines()) == bool(said)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("on", ["local", "mpi"])
def test_what_a_site_says_of_jobs_elsewhere_is_refused_here(on: str, tiny_data: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("modules: [cuda]\ncontainer: {kind: apptainer, image: a.sif}\nqueue: {partition: gpu}\n")
    asked = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'r'}", "--site", site, "--on", on]
    said = vernier("launch", TINY, *asked, code=2, env=environment()).stderr.splitlines()
    assert said[0].startswith(f"error: --site: modules: is not for --on {on}, ")
    assert said[1].startswith(f"error: --site: container.kind: is not for --on {on}, ")
    assert len(said) == 2
