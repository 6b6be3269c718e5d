"""`vernier launch --on skypilot` writes a task that SkyPilot's own parser takes for what was meant."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, vernier

from configs.errors import ConfigError
from configs.load import load_config
from launcher.backends.process import carried
from launcher.backends.skypilot import render_task
from launcher.jobs.plan import make_plan
from launcher.jobs.site import Site

SKYPILOT = "0.14.1"
# SkyPilot wants an older click than typer, so it has an environment of its own, made once beside the tests' own
# (half a minute, 460 MB). SKYPILOT_PYTHON names one that is there.
PLACE = Path(os.environ.get("VERNIER_TEST_CACHE", sys.prefix)) / f"skypilot-{SKYPILOT}"
PARSE = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps({
    "name": task.name, "nodes": task.num_nodes, "envs": task.envs, "setup": task.setup, "run": task.run,
    "accelerators": resources.accelerators, "cpus": resources.cpus, "memory": resources.memory,
    "mounts": task.file_mounts or {}, "stores": {at: str(one.mode) for at, one in (task.storage_mounts or {}).items()},
    "volumes": {at: str(one) for at, one in (task.volumes or {}).items()},
    "secrets": sorted(task.secrets or {}), "workdir": task.workdir,
}))
"""


@pytest.fixture(scope="session")
def sky() -> Path:
    """A Python that has SkyPilot."""
    given = os.environ.get("SKYPILOT_PYTHON")
    if given:
        return Path(given)
    try:
        _install()
    except (OSError, subprocess.SubprocessError) as error:
        why = f"SkyPilot cannot be installed: {error}; {str(getattr(error, 'stderr', None) or '')[-500:]}"
        if os.environ.get("REQUIRE_SKYPILOT"):
            pytest.fail(why)
        pytest.skip(why)
    return PLACE / "bin" / "python"


def _install() -> None:
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    with open(PLACE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (PLACE / "ready").is_file():
            pip = [PLACE / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            pins = Path(__file__).with_name("skypilot-constraints.txt")
            try:
                for command in (
                    [sys.executable, "-m", "venv", "--clear", PLACE],
                    [*pip, "-c", pins, f"skypilot=={SKYPILOT}"],
                ):
                    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            except (OSError, subprocess.SubprocessError):
                shutil.rmtree(PLACE, ignore_errors=True)
                raise
            (PLACE / "ready").touch()


def parsed(sky: Path, text: str, home: Path) -> dict:
    """The task as SkyPilot has it."""
    path = home / "task.yaml"
    path.write_text(text)
    environment = {
        **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
        "HOME": str(home),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        # Nobody listens there: a parser that asks the network is told so at once.
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    done = subprocess.run(
        [sky, "-c", PARSE, path], capture_output=True, text=True, check=False, env=environment, cwd=home, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def task(data: Path, *settings: object, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in carried(os.environ)}
    inherited.pop("HF_TOKEN", None)
    asked = ["--on", "skypilot", "--dry-run"]
    where = [TINY, f"data.dir={data}", "run.dir=runs/sky"]
    return vernier("launch", *where, *settings, *asked, env={**inherited, **environment}).stdout


HERE = {"HF_HOME": "/scratch/me/hf", "HF_HUB_CACHE": "/scratch/me/hub", "NCCL_SOCKET_IFNAME": "ib0"}  # of no use there


def settings_in(run: str, tmp_path: Path) -> Path:
    """The settings that a task's script writes down, as a file."""
    path = tmp_path / "settings.yaml"
    path.write_text(run.partition("<<'END OF SETTINGS'\n")[2].partition("END OF SETTINGS\n")[0])
    return path


@pytest.mark.long
def test_one_node_runs_vernier_train_with_its_evaluator(sky: Path, tiny_data: Path, tmp_path: Path) -> None:
    text = task(
        tiny_data, "eval.placement=separate", "launch.memory=64G", NCCL_DEBUG="INFO", HF_TOKEN="hf_secret", **HERE
    )
    found = parsed(sky, text, tmp_path)
    assert (found["name"], found["nodes"]) == ("tiny", 1)
    assert found["workdir"] == str(ROOT)
    assert found["mounts"] == {"/vernier/data": str(tiny_data)}
    assert (found["accelerators"], found["cpus"], found["memory"]) == (None, "2+", "64+")
    assert found["setup"] == "make setup"
    assert found["envs"] == {"NCCL_DEBUG": "INFO"}
    assert "hf_secret" not in text
    assert yaml.safe_load(text)["secrets"] == {"HF_TOKEN": None}
    assert "sky launch --secret HF_TOKEN FILE" in text
    assert found["run"].splitlines()[-1] == "exec .venv/bin/vernier train /tmp/vernier-tiny.yaml"
    there = load_config(settings_in(found["run"], tmp_path))
    assert (there.data_dir, there.run_dir) == (Path("/vernier/data"), Path("runs/sky"))
    assert there.reference_dir == Path("/vernier/data/reference")
    assert there.eval.placement == "separate"


@pytest.mark.long
def test_several_gpu_nodes_meet_at_the_first_and_share_a_volume(sky: Path, tiny_data: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("accelerators: A100:8\nenvironment: {NCCL_IB_HCA: mlx5}\n")
    asked = ["launch.nodes=2", "launch.gpus_per_node=8", "eval.placement=separate", "--site", site]
    text = task(tiny_data, *asked, "--runs", "shared-runs")
    found = parsed(sky, text.replace("volumes:\n  /vernier/runs: shared-runs\n", ""), tmp_path)
    assert yaml.safe_load(text)["volumes"] == {"/vernier/runs": "shared-runs"}  # a volume's name is asked of a server
    assert (found["nodes"], found["accelerators"]) == (2, {"A100": 8})  # a kind that SkyPilot knows without a catalogue
    assert found["envs"] == {"NCCL_IB_HCA": "mlx5"}
    there = load_config(settings_in(found["run"], tmp_path))
    assert there.eval.placement == "inline"
    assert there.run_dir == Path("/vernier/runs/tiny")
    script = found["run"]
    for part in (
        'MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
        '--nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK"',
        "--nproc-per-node=8",
        " trainer /tmp/vernier-tiny.yaml",
    ):
        assert part in script


def test_the_script_of_several_nodes_starts_again_and_ends_as_the_run_says(tiny_data: Path, tmp_path: Path) -> None:
    text = task(tiny_data, "launch.nodes=2", "--runs", "shared")
    script = (
        yaml.safe_load(text)["run"]
        .replace("/vernier/runs", str(tmp_path))
        .replace("/tmp/vernier-tiny", str(tmp_path / "t"))
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    # In torchrun's place: notes what it was asked, and leaves behind what a run would that starts again once.
    for number, again in ((1, "less memory"), (2, None)):
        (tmp_path / f"state-{number}.json").write_text(json.dumps({"again": again, "exit_code": 75}))
    torchrun = f"""#!/bin/bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
echo "$@" >>asked
cp "state-$(grep -c . asked).json" tiny/state.json
exit 1
"""
    python = tmp_path / ".venv/bin/python"
    python.write_text(torchrun)
    python.chmod(0o755)
    environment = {
        **os.environ,
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 75, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert "--nnodes=2 --node-rank=1 --master-addr=10.0.0.5" in asked[0]
    assert (tmp_path / "t.yaml").is_file()

    (tmp_path / "asked").unlink()
    for number in range(1, 30):  # one that never gets further
        (tmp_path / f"state-{number}.json").write_text(json.dumps({"again": "less memory", "exit_code": None}))
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=False, timeout=120)
    assert done.returncode == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 20


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = str(ROOT / TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--on: skypilot: {tmp_path} is sent along .* is no checkout"):
        render_task(make_plan(tiny, [], Site()))


@pytest.mark.long
def test_a_bucket_keeps_the_run_of_one_node(sky: Path, tiny_data: Path, tmp_path: Path) -> None:
    text = task(tiny_data, "--runs", "s3://mine/runs")
    assert yaml.safe_load(text)["file_mounts"]["/vernier/runs"] == {"source": "s3://mine/runs", "mode": "MOUNT_CACHED"}
    assert load_config(settings_in(yaml.safe_load(text)["run"], tmp_path)).run_dir == Path("/vernier/runs/tiny")
    assert "copy it before sky down" not in text
    assert "copy it before sky down" in task(tiny_data)


def test_the_task_is_written_into_the_run(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = vernier("launch", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "--on", "skypilot")
    assert f"sky launch {run / 'jobs' / 'task.yaml'}" in said.stdout + said.stderr
    assert yaml.safe_load((run / "jobs" / "task.yaml").read_text())["name"] == "tiny"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["launch.nodes=2"], "error: launch.nodes: 2 nodes write into one run directory, which needs a volume"),
        (["launch.nodes=2", "--runs", "s3://a/b"], "error: launch.nodes: 2 nodes write into one run directory, which"),
        (["launch.gpus_per_node=2"], "error: launch.gpus_per_node: 2 GPUs of which kind? put accelerators: H100:2"),
        (["baseline=runs/x"], "error: baseline: "),
        (["--hosts", "a"], "error: --hosts: goes with --on mpi and --on ssh"),
    ],
)
def test_what_a_task_cannot_say_is_refused(settings: list[str], said: str, tiny_data: Path, tmp_path: Path) -> None:
    where = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", *settings]
    told = vernier("launch", TINY, *where, "--on", "skypilot", code=2).stderr
    assert told.startswith(said)
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_a_site_says_of_slurms_jobs_is_not_passed_over(tiny_data: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("modules: [cuda]\nsetup: [ulimit -l unlimited]\ncontainer: {kind: pyxis, image: a.sqsh}\n")
    asked = [f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", "--site", site, "--on", "skypilot"]
    said = vernier("launch", TINY, *asked, code=2).stderr.splitlines()
    assert said[0].startswith("error: --site: modules: is not for --on skypilot, ")
    assert said[1].startswith("error: --site: container.kind: is not for --on skypilot, ")
    assert len(said) == 2
