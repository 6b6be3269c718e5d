"""The scripts that `vernier launch` renders: shellcheck finds nothing in them, and hostile names stay names."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, TINY, vernier

from configs.errors import ConfigError, DataError
from configs.run.directory import RunDir
from launcher.backends.slurm import render
from launcher.jobs.plan import JobPlan, make_plan
from launcher.jobs.run.meet import Meeting
from launcher.jobs.run.steps import agent, inside, preflight, step, step_environment
from launcher.jobs.site import Site
from launcher.jobs.spec import read_spec

TWO = ["launch.nodes=2", "launch.ranks_per_node=1"]
BIG = ["launch.nodes=64", "launch.gpus_per_node=8", "launch.cpus_per_rank=8", "batch.global=512", "batch.micro=1"]
HOSTILE = 'it\'s "a" $(touch pwned) `touch pwned` %j ; rm -rf x # ü'
PYXIS = {"kind": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.01-py3", "mounts": ["/sw:/sw:ro"]}
APPTAINER = {"kind": "apptainer", "image": "/images/v.sif", "options": ["--env", "A=b c"]}


def plan_for(folder: Path, *overrides: str, site: dict | None = None) -> JobPlan:
    folders = [f"{key}.dir={json.dumps(str(folder / key))}" for key in ("run", "data")]  # as YAML takes any text
    settings = [*folders, "launch.time=10", "launch.signal_s=60"]
    return make_plan(TINY, [*settings, *overrides], Site.model_validate(site or {}))


def script_for(folder: Path, *overrides: str, site: dict | None = None) -> str:
    (script,) = render(plan_for(folder, *overrides, site=site))
    return script.text


def run_bash(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def own_template(tmp_path: Path) -> Path:
    """The small one that the documentation shows."""
    found = re.search(r"```jinja\n(.*?)```", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL)
    assert found
    path = tmp_path / "own.sbatch.j2"
    path.write_text(found[1].replace("#!/bin/bash\n", "#!/bin/bash\n#SBATCH --comment=ours\n"))
    return path


CASES = {
    "one node": ([], {}),
    "64 nodes of 8 GPUs": (BIG, {"gpu_type": "h100", "queue": {"account": "me", "qos": "long", "constraint": "a&b"}}),
    "heterogeneous": ([*TWO, "eval.placement=het"], {}),
    "array": ([], {}),
    "array without requeue": ([], {"requeue": False}),
    "pyxis": (TWO, {"container": PYXIS, "modules": ["cuda/12.4"], "srun": ["--mpi=none"]}),
    "Apptainer": ([*BIG[:2], *BIG[3:]], {"container": APPTAINER, "gpu_option": "gres", "scratch": "$LOCAL/x"}),
    "enroot": (TWO, {"container": {"kind": "enroot", "image": "vernier"}}),
    "no requeue": ([*TWO, "eval.placement=separate"], {"requeue": False, "export": "NONE", "environment_file": "/e"}),
    "own template": (TWO, {}),
    "hostile values": (TWO, {"environment": {"A": HOSTILE + "\nb"}, "python": HOSTILE, "srun": [HOSTILE]}),
}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on this machine")
@pytest.mark.parametrize("case", CASES)
def test_shellcheck_finds_nothing(case: str, own_template: Path, tmp_path: Path) -> None:
    overrides, site = CASES[case]
    plan = plan_for(tmp_path if "hostile" not in case else tmp_path / HOSTILE, *overrides, site=site)
    if "array" in case:
        plan = replace(plan, members=6, at_once=2)
    for script in render(plan, own_template if case == "own template" else None):
        command = ["shellcheck", *(["--exclude=SC2016,SC2089,SC2090"] if "hostile" in case else []), "-"]  # "meant so?"
        checked = subprocess.run(command, input=script.text, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout
        disabled = [line for line in script.text.splitlines() if "shellcheck disable" in line]
        assert all(re.search(r"disable=SC\d+  # \w", line) for line in disabled)  # each with a reason


def test_a_script_asks_for_what_was_asked_for(tmp_path: Path) -> None:
    queue = {
        "partition": "gpu",
        "account": "me",
        "qos": "long",
        "constraint": "a&b",
        "reservation": "r",
        "exclude": "n3",
    }
    queue |= {"nodelist": "n[1-2]", "sbatch": ["--mail-type=FAIL"]}
    site = {"queue": queue, "gpu_type": "h100", "memory": "64G", "requeue": False, "export": "NONE"}
    text = script_for(tmp_path, *BIG, site=site)
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert text.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n")
    assert "#SBATCH --nodes=64 --ntasks-per-node=1 --cpus-per-task=64" in head
    assert "#SBATCH --gpus-per-node=h100:8" in head
    assert "#SBATCH --no-requeue --open-mode=append --export=NONE" in head
    assert "#SBATCH --time=10 --signal=B:USR1@60" in head
    for key in ("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist"):
        assert f"#SBATCH --{key}={queue[key]}" in head
    assert {"#SBATCH --mail-type=FAIL", "#SBATCH --mem=64G"} <= set(head)


def test_the_script_of_a_training_is_short_and_ends_in_python(tmp_path: Path) -> None:
    text = script_for(tmp_path, *BIG, site={"modules": ["cuda/12.4"], "queue": {"account": "me", "partition": "gpu"}})
    assert text.count("\n") <= 40
    run = shlex.quote(str(tmp_path / "run"))
    assert text.splitlines()[-1] == f"exec {sys.executable} -m launcher.jobs.run {run} train"


def test_a_step_asks_for_what_was_asked_for(tmp_path: Path) -> None:
    (script,) = render(plan_for(tmp_path, *BIG, site={"srun": ["--mpi=none"]}))
    script.path.parent.mkdir(parents=True)
    script.write()
    spec = read_spec(RunDir(tmp_path / "run"), "train")
    assert spec == script.spec
    (group,) = spec.groups
    words = agent(spec, group, Meeting("10.0.0.1", 20007, here=False), tmp_path / "run")
    command = step(spec, group, None, words, tmp_path, "/tmp")
    assert command[:6] == [
        "srun",
        "--kill-on-bad-exit=1",
        "--nodes=64",
        "--ntasks=64",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
    ]
    assert {"--mpi=none", "--nproc-per-node=8", "--nnodes=64", "--master-addr=10.0.0.1"} <= set(command)
    assert command[-2:] == ["trainer", str(tmp_path / "run" / "train-config.yaml")]
    assert preflight(spec, group)[-2:] == ["--gpus", "8"]
    assert step_environment(group, Meeting("a", 1, here=False), ())["OMP_NUM_THREADS"] == "1"


def test_a_changed_word_beside_a_script_is_seen(tmp_path: Path) -> None:
    (script,) = render(plan_for(tmp_path))
    script.path.parent.mkdir(parents=True)
    script.write()
    path = script.path.parent / "train.json"
    path.write_text(path.read_text().replace('"nodes": 1', '"nodes": 9'))
    with pytest.raises(DataError, match="changed since it was written"):
        read_spec(RunDir(tmp_path / "run"), "train")


def test_an_array_runs_so_many_members_at_once(tmp_path: Path) -> None:
    (script,) = render(replace(plan_for(tmp_path), members=6, at_once=2))
    assert "#SBATCH --array=0-5%2\n" in script.text
    assert "slurm-train-%A_%a.out" in script.text


def test_nodes_that_are_excluded_join_those_of_the_site(tmp_path: Path) -> None:
    (script,) = render(plan_for(tmp_path, site={"queue": {"exclude": "n3"}}), exclude=("n7", "n9"))
    assert "#SBATCH --exclude=n3,n7,n9\n" in script.text


def test_names_and_values_reach_the_shell_to_the_letter(tmp_path: Path) -> None:
    value = HOSTILE + "\nsecond line\\ '' \"\" $HOME !x\n#SBATCH --partition=other"
    folder = tmp_path / HOSTILE
    text = script_for(folder, site={"environment": {"A_VALUE": value}})
    code = text[text.index("export A_VALUE") : text.index("cd ", text.index("export A_VALUE"))]
    words = text.splitlines()[-1].removeprefix(f"exec {sys.executable} -m launcher.jobs.run ")
    code += f"\nprintf '%s\\0' \"$A_VALUE\" {words}"
    assert run_bash(code, cwd=tmp_path).stdout.split("\0")[:3] == [value, str(folder / "run"), "train"]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("name", "said"), [("a\nb", "has a line break or control character"), ("a\\b", "has a backslash")]
)
def test_a_name_that_no_script_can_hold_is_refused_before_anything_is_written(
    name: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^run.dir: .* {said}"):
        render(plan_for(tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_containers_refuse_paths_that_they_cannot_mount(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.dir: .*a, b/run' has white space, .* pyxis cannot mount"):
        render(plan_for(tmp_path / "a, b", site={"container": PYXIS}))


def test_enroot_refuses_values_with_line_breaks(tmp_path: Path) -> None:
    site = {"container": {"kind": "enroot", "image": "v"}, "environment": {"A": "b\nc"}}
    with pytest.raises(ConfigError, match=r"environment\.A: has a line break"):
        render(plan_for(tmp_path, site=site))


def test_enroot_is_told_of_every_variable_by_name(tmp_path: Path) -> None:
    (script,) = render(plan_for(tmp_path, site={"container": {"kind": "enroot", "image": "v"}}))
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "enroot").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (bin_dir / "enroot").chmod(0o755)
    environment = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "HF_TOKEN": "hush", "SLURM_NODEID": "1"}
    command = [*inside(script.spec, script.spec.groups[0], tmp_path, "/tmp"), "bash", "-c", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    said = done.stdout.splitlines()
    assert said[0] == "start"
    assert said[said.index("--rc") + 1] == str(tmp_path / "enroot.rc")  # not the image's entry point
    assert said[-4:] == ["v", "bash", "-c", "x"]
    named = {after for before, after in pairwise(said) if before == "--env"}
    assert {"HF_TOKEN", "SLURM_NODEID"} <= named
    assert "PATH" not in named
    assert "hush" not in done.stdout


# ---- templates of one's own


def test_an_own_template_may_use_the_parts_of_ours(own_template: Path, tmp_path: Path) -> None:
    done = vernier("launch", TINY, f"run.dir={tmp_path / 'run'}", "--template", own_template, "--dry-run")
    assert "#SBATCH --comment=ours\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"exec {sys.executable} -m launcher.jobs.run ")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_templates_replaces_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "eval.sbatch.j2").write_text("#!/bin/bash\n# scored my way: {{ run_dir | q }}\n")
    train, score = render(plan_for(tmp_path, "eval.placement=separate"), tmp_path)
    assert "# Trains tiny" in train.text
    assert score.text == f"#!/bin/bash\n# scored my way: {tmp_path / 'run'}\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("#!/bin/bash\n{{ nmae }}\n", 2, "'nmae' is undefined"),
        ("#!/bin/bash\n\n{% if name %}\n", 3, "Unexpected end of template"),
        ("#!/bin/bash\n{{ train.nodez }}\n", 2, "has no attribute 'nodez'"),
        (
            '{% import "parts.j2" as parts with context %}\n\n{{ parts.options(tarin, queue) }}\n',
            None,
            "'tarin' is undefined",
        ),
        ("#!/bin/bash\n{{ 1 // 0 }}\n", 2, "ZeroDivisionError"),
        ('#!/bin/bash\n{% include "other.j2" %}\n', 2, "other.j2"),
    ],
)
def test_a_broken_template_is_one_line_with_its_place(text: str, line: int | None, said: str, tmp_path: Path) -> None:
    own = tmp_path / "broken.j2"
    own.write_text(text)
    done = vernier("launch", TINY, f"run.dir={tmp_path / 'run'}", "--template", own, "--dry-run", code=2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert "--template: " in done.stderr
    assert ", line " in done.stderr if line is None else f"{own}, line {line}: " in done.stderr


def test_a_template_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = vernier("launch", TINY, "--template", tmp_path / "no.j2", "--dry-run", code=2)
    assert f"--template: {tmp_path / 'no.j2'} is not there" in done.stderr


# ---- scripts that end before their ranks


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"modules": ["no/such"]}, "site profile: module load no/such: exit code 127 (exit code 1)"),
        (
            {"setup": ["true", "source /no/such.sh  # ours"]},
            "site profile: source /no/such.sh: exit code 1 (exit code 1)",
        ),
        ({"setup": ["exit 5"]}, "a line of the site profile's setup ended this script (exit code 5)"),
        ({"environment_file": "/no/such"}, "/no/such: cannot be read on this node"),
        ({}, "/no/python -m launcher.jobs.run could not be started (exit code 127)"),
    ],
)
def test_a_script_that_ends_before_its_ranks_says_why(site: dict, said: str, tmp_path: Path) -> None:
    (found,) = render(plan_for(tmp_path, site=site))
    script = found.text if site else found.text.replace(sys.executable, "/no/python")
    run = RunDir(tmp_path / "run")
    for folder in (run.scripts, run.logs):
        folder.mkdir(parents=True)
    found.write()
    log = run.logs / "slurm-train-7.out"
    run.start_afresh("pending", job="7")
    done = run_bash(script, env={**os.environ, "SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)})
    log.write_text(done.stdout + done.stderr)
    assert done.returncode != 0
    assert run.read_state()["failure"]["error"] == said
    assert said in " ".join(vernier("status", run.path).stdout.split())
    shown = vernier("logs", run.path).stdout
    assert said in " ".join(shown.split())
    assert log.name in shown
    run.start_afresh("pending", job="8")  # launched once more
    assert run.read_state()["failure"] is None


def test_a_set_up_that_reads_a_file_with_a_failing_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("false\n[ -z x ]\nexport OURS=1\n")
    script = script_for(tmp_path, site={"setup": [f"source {tmp_path}/env.sh", "[ -e /no/such ] && source /no/such"]})
    head = script[: script.index("trap - ERR")]
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    (tmp_path / "script").write_text(f'{head}\necho "$OURS"')
    done = run_bash(f"exec bash {tmp_path}/script", env={**os.environ, "SLURM_JOB_ID": "7"})
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
