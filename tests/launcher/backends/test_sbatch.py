"""What sbatch is given of the user's own variables and options, and what is left where it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TINY, vernier
from test_unanswered import own_index, put  # noqa: F401  # a fixture

from configs.errors import ConfigError
from configs.run.directory import RunDir
from launcher.backends.sbatch import options_of, set_aside, set_by, submit_environment
from launcher.backends.slurm import render
from launcher.jobs.plan import make_plan
from launcher.jobs.site import Queue, Site

REFUSES = "echo 'sbatch: error: invalid partition specified: short' >&2; exit 1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sbatch that takes all jobs, and writes its variables down."""
    put(monkeypatch, tmp_path, "sbatch", f"env >> {tmp_path}/seen; echo 7")
    put(monkeypatch, tmp_path, "squeue", """echo '{"errors": [], "jobs": []}'""")
    put(monkeypatch, tmp_path, "scontrol", "true")
    return tmp_path / "seen"


def launch(data: Path, run: Path, *settings: str, code: int = 0) -> str:
    return vernier("launch", TINY, "--on", "slurm", f"data.dir={data}", f"run.dir={run}", *settings, code=code).stderr


def scripts(folder: Path, *overrides: str, site: Site) -> dict[str, str]:
    plan = make_plan(TINY, [f"run.dir={folder}/run", *overrides], site)
    return {script.component: script.text for script in render(plan)}


def test_a_users_variables_for_sbatch_count_where_the_job_says_nothing_itself(
    slurm: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"SBATCH_ACCOUNT": "proj", "SBATCH_PARTITION": "gpu", "SLURM_HINT": "nomultithread"}
    for name, value in {**given, "SBATCH_TIMELIMIT": "10", "SBATCH_ARRAY_INX": "0-3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = launch(tiny_data, tmp_path / "run")
    seen = dict(line.split("=", 1) for line in slurm.read_text().splitlines() if line.startswith(("SBATCH_", "SLURM_")))
    seen.pop("SLURM_CONF", None)
    assert seen == given
    assert "SBATCH_TIMELIMIT does not count: the job has --time=24:00:00 by launch.time\n" in said
    assert "SBATCH_ARRAY_INX does not count: --sweep makes arrays of jobs\n" in said


def test_inside_of_a_job_what_that_job_was_told_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_CPU": "100", "SRUN_CPUS_PER_TASK": "2", "SBATCH_CPU_BIND": "quiet"}
    ours = {"SBATCH_ACCOUNT": "proj", "SALLOC_ACCOUNT": "proj", "SLURM_CONF": "/etc/x", "OMPI_MCA_btl": "tcp,self"}
    for name, value in {**theirs, **ours, "PMI_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    seen = submit_environment()
    assert ours.items() <= seen.items()
    assert not {*theirs, "PMI_RANK"} & seen.keys()


def test_what_a_site_says_itself_is_not_overridden_by_a_variable() -> None:
    text = "#SBATCH --partition=gpu --gres=gpu:2\n#SBATCH --mem=4G\n"
    given = {"SBATCH_PARTITION": "x", "SBATCH_MEM_PER_CPU": "1G", "SBATCH_GRES": "gpu:1", "SBATCH_QOS": "long"}
    assert list(set_aside(text, given)) == ["SBATCH_PARTITION", "SBATCH_GRES", "SBATCH_MEM_PER_CPU"]
    assert set_aside(text, {"SBATCH_GRES": "lustre:1"})  # it would take the place of the GPUs
    assert set_aside("#SBATCH --gpus-per-node=2\n", {"SBATCH_GRES": "lustre:1"}) == {}


def test_options_are_read_in_all_their_forms() -> None:
    assert list(options_of(["-N2", "--time", "10", "-p", "gpu", "--exclusive"])) == [
        ("nodes", "2"),
        ("time", "10"),
        ("partition", "gpu"),
        ("exclusive", ""),
    ]
    text = "#SBATCH -n 4 --mem-per-cpu=1G\n#SBATCHES --time=1\n"
    assert set_by(text) == {"ntasks-per-node": "--ntasks=4", "mem": "--mem-per-cpu=1G"}


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"queue": {"sbatch": ["--nodes=3"]}}, "queue.sbatch: '--nodes=3'"),
        ({"queue": {"sbatch": ["-t 10"]}}, "launch.time"),
        ({"queue": {"partition": "a", "sbatch": ["-p b"]}}, "queue.partition of the site profile"),
        ({"queue": {"sbatch": ["--array=0-3"]}}, "--sweep makes arrays"),
        ({"srun": ["--ntasks=2"]}, "srun: '--ntasks=2'"),
    ],
)
def test_an_option_that_is_given_twice_is_refused_with_its_owner(site: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        scripts(tmp_path, site=Site.model_validate(site))
    assert said in str(caught.value)


def test_further_options_that_the_job_does_not_set_are_taken(tmp_path: Path) -> None:
    site = Site(
        queue=Queue(sbatch=["--mail-type=FAIL", "--exclusive", "-p gpu", "--gres=lustre:1"]), srun=["--mpi=none"]
    )
    assert "#SBATCH -p gpu\n" in scripts(tmp_path, "launch.gpus_per_node=2", site=site)["train"]


@pytest.mark.parametrize("queue", [{"account": "proj"}, {"sbatch": ["--account=proj"]}])
def test_the_evaluators_job_is_paid_for_by_the_same_account(queue: dict, tmp_path: Path) -> None:
    site = Site.model_validate({"queue": {**queue, "qos": "long"}, "eval_queue": {"partition": "short"}})
    text = scripts(tmp_path, "eval.placement=separate", site=site)["eval"]
    assert set_by(text)["account"] == "--account=proj"
    assert set_by(text)["partition"] == "--partition=short"
    assert "qos" not in set_by(text)  # that of another partition
    other = Site.model_validate({"queue": queue, "eval_queue": {"account": "other"}})
    assert set_by(scripts(tmp_path, "eval.placement=separate", site=other)["eval"])["account"] == "--account=other"


def test_where_sbatch_refuses_nothing_is_left_and_its_own_words_are_shown(
    slurm: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "sbatch", REFUSES)
    first, second = launch(tiny_data, tmp_path / "new", code=2).splitlines()
    assert first == "error: train: its job is refused by sbatch; see queue.partition of the site profile, and sinfo"
    assert second == "sbatch: error: invalid partition specified: short"
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    launch(tiny_data, tmp_path / "there", code=2)
    assert "invalid partition specified" in vernier("status", tmp_path / "there").stdout
    monkeypatch.setenv("SBATCH_PARTITION", "short")
    assert "see SBATCH_PARTITION in your environment" in launch(tiny_data, tmp_path / "new", code=2)


def test_an_evaluator_that_is_refused_is_said_beside_the_training_that_runs(
    slurm: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "sbatch", f'case "$*" in *eval.sbatch) {REFUSES} ;; esac; echo 7')
    (tmp_path / "site.yaml").write_text("queue: {partition: gpu}\neval_queue: {partition: short}\n")
    run = RunDir(tmp_path / "run")
    said = launch(tiny_data, run.path, "eval.placement=separate", "--site", str(tmp_path / "site.yaml"), code=2)
    assert "eval: its job is refused by sbatch; see eval_queue.partition of the site profile" in said
    assert "the training is job 7 all the same" in said
    assert run.read_state()["state"] == "pending"
    assert [json.loads(line)["component"] for line in run.jobs.read_text().splitlines()] == ["train"]


def test_a_sweep_that_sbatch_refuses_leaves_nothing(
    slurm: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "sbatch", REFUSES)
    where = ("--sweep", "optimizer.lr=1e-3,1e-4", "--sweep-dir", str(tmp_path / "sweep"))
    told = vernier("launch", TINY, "--on", "slurm", f"data.dir={tiny_data}", *where, code=2).stderr
    assert "invalid partition specified" in told
    assert not (tmp_path / "sweep").exists()
