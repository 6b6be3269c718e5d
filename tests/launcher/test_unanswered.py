"""A scheduler that does not answer: it is never taken for one that says that a job is gone."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from conftest import TINY, vernier

from configs.files.json_lines import sealed_line
from configs.files.seal import parsed, sealed
from configs.run.directory import RunDir
from configs.scheduler import Life, NoAnswer, life, slurm_jobs
from eval.scoring.evaluator import training_is_over
from launcher.jobs.log import add_job
from launcher.watch.run_status import facts_of

# What a squeue prints, and its exit code, where nothing can be known of any job.
SILENT = {
    "an exit code": ("echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"),
    "errors in its JSON": (
        """[ "${2}" = --json ] || exit 1
        echo '{"errors": [{"error_number": 1800, "error": "Unable to contact slurm controller"}], "jobs": []}'"""
    ),
    "errors as 22.05 has them": (
        """echo '{"errors": [{"description": "Failed while looking for jobs", "error_number": -1,'
        echo '"error": "Unspecified error", "source": "slurm_load_jobs"}], "jobs": []}'"""
    ),
    "errors in newer JSON": (
        """echo '{"errors": [{"description": "Unable to contact slurm controller", "source": "x"}], "jobs": null}'"""
    ),
    "something that is no JSON": "echo 'a banner of this site'",
    "errors and exit code 0": "echo 'squeue: error: Unable to contact slurm controller' >&2; echo '{\"jobs\": 1}' >&2",
    "a signal": "kill -9 $$",
}
GONE = {
    "an unknown id": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    "an unknown id in JSON": (
        """echo '{"errors": [{"error_number": 2017, "error": "Invalid job id specified"}], "jobs": []}'"""
    ),
    "no job in JSON": """echo '{"errors": [], "jobs": []}'""",
    "no job and no JSON": """[ "${2}" != --json ] || exit 1""",
}


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of this machine's runs, and nothing is left for it to know."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def put(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, code: str) -> None:
    """A command of that name, found before all others."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH'].removeprefix(str(folder / 'bin') + ':')}")


@pytest.fixture
def queued(tmp_path: Path) -> RunDir:
    """A run that was launched, and whose job waits as far as anybody knows."""
    run = RunDir(tmp_path / "queued")
    run.path.mkdir()
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    run.write_state("pending", steps=20, job="12")
    state = run.read_state()
    run.state.write_text(json.dumps(sealed({**state, "heartbeat": state["heartbeat"] - 3000})))
    return run


@pytest.mark.parametrize("case", SILENT)
def test_no_answer_is_neither_a_job_nor_none(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, tmp_path, "squeue", SILENT[case])
    found = slurm_jobs(["12"])
    assert isinstance(found, NoAnswer)
    assert found.why
    assert life("12") is Life.UNKNOWN
    for value in (found, Life.UNKNOWN, Life.OVER):
        with pytest.raises(TypeError):
            bool(value)


@pytest.mark.parametrize("case", GONE)
def test_a_job_that_slurm_says_it_does_not_know_is_gone(
    case: str, queued: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "squeue", GONE[case])
    assert slurm_jobs(["12"]) == {}
    assert life("12") is Life.OVER
    assert training_is_over(queued)
    assert facts_of(queued, told={}).words == "died before it started"


@pytest.mark.parametrize("case", ["an exit code", "errors in its JSON", "something that is no JSON"])
def test_while_slurm_is_silent_a_queued_run_is_queued(
    case: str, queued: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "squeue", SILENT[case])
    put(monkeypatch, tmp_path, "scancel", "echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setattr("eval.scoring.evaluator._asked", {})
    assert not training_is_over(queued)  # its evaluator waits on
    told = vernier("status", queued.path).stdout
    assert told.startswith("queued  pending; job 12 was submitted\n")
    assert "Slurm cannot be asked just now: " in told
    assert json.loads(vernier("status", queued.path, "--json").stdout)["jobs"][0]["state"] == "unknown"


def test_a_stop_that_cannot_be_known_to_hold_is_no_success(
    queued: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "squeue", SILENT["errors in its JSON"])
    put(monkeypatch, tmp_path, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    told = vernier("stop", queued.path, code=1).stdout
    assert "Slurm cannot be asked just now (Unable to contact slurm controller)" in told
    assert "queued has not stopped yet: pending; job 12 was submitted" in told
    assert told.rstrip().endswith("ask again when Slurm answers")
    assert queued.stop_request.is_file()
    assert (tmp_path / "cancelled").read_text() == "--state=PENDING 12\n"  # a job that runs is asked by the file


def test_a_launch_is_refused_while_nobody_knows_of_the_last_one(
    queued: RunDir, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, tmp_path, "squeue", SILENT["errors in its JSON"])
    put(monkeypatch, tmp_path, "sbatch", "echo 13")
    told = vernier("launch", TINY, "--on", "slurm", f"data.dir={tiny_data}", f"run.dir={queued.path}", code=2).stderr
    assert "Slurm cannot be asked just now (Unable to contact slurm controller)" in told
    assert queued.read_state()["job"] == "12"


def test_a_run_in_a_job_that_cannot_be_asked_for_has_not_died(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))
    run = RunDir(tmp_path / "run")
    add_job(run, "submitted", component="train", backend="slurm", job="12")
    run.write_state("running", exit_code=None, job="12")
    state = run.read_state()
    run.state.write_text(json.dumps(sealed({**state, "heartbeat": state["heartbeat"] - 3000})))
    os.utime(run.lock, (0, 0))
    line = parsed(run.jobs.read_text())
    run.jobs.write_text(sealed_line({**line, "time": line["time"] - 9000}))
    assert facts_of(run, told={}).state == "died"
    facts = facts_of(run, told=NoAnswer("it is down"))
    assert (facts.state, facts.why) == ("running", None)
    assert "whether job 12 goes on cannot be asked just now" in facts.words
