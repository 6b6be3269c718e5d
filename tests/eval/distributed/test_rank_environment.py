"""Each launcher's variables are read for what they mean: who a rank is, how many share its machine, where they meet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import VernierError
from eval.distributed.environment import Meeting, RankIdentity, first_of, place_of, slurm_port, tasks_per_node, told_by

SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node[1-3]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
TORCH = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
POD = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, RankIdentity("", 0, 1, 0, 1)),
        (TORCH | {"TORCHELASTIC_RUN_ID": "x"}, RankIdentity("torchrun", 2, 4, 0, 2)),
        (TORCH, RankIdentity("RANK and WORLD_SIZE", 2, 4, 0, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, RankIdentity("RANK and WORLD_SIZE", 1, 2, 1, 2)),
        (POD | {"LOCAL_WORLD_SIZE": "1"}, RankIdentity("RANK and WORLD_SIZE", 2, 4, 0, 1)),  # a process a pod
        (MPI, RankIdentity("mpirun", 2, 4, 0, 2)),
        (HYDRA, RankIdentity("mpirun", 2, 4, 0, 2)),
        (SRUN, RankIdentity("srun", 3, 5, 1, 2)),
        (SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}, RankIdentity("srun", 4, 5, 0, 1)),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "5", "PMIX_RANK": "3"}, RankIdentity("srun", 3, 5, 1, 2)),  # srun --mpi=…
        (SRUN | MPI, RankIdentity("mpirun", 2, 4, 0, 2)),  # mpirun in a job of Slurm's
        (SRUN | HYDRA, RankIdentity("mpirun", 2, 4, 0, 2)),
        (SRUN | TORCH | {"TORCHELASTIC_RUN_ID": "x"}, RankIdentity("torchrun", 2, 4, 0, 2)),  # torchrun under srun
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, RankIdentity("", 0, 1, 0, 1)),  # a batch script itself
    ],
)
def test_a_rank_knows_who_it_is_and_who_told(environment: dict[str, str], told: RankIdentity) -> None:
    assert told_by(environment) == told


def test_variables_without_sense_are_said() -> None:
    with pytest.raises(VernierError, match="make no sense"):
        told_by({"RANK": "two", "WORLD_SIZE": "4"})
    with pytest.raises(VernierError, match="make no sense"):
        told_by(SRUN | {"SLURM_NODEID": "7"})


@pytest.mark.parametrize("environment", [{"PMI_RANK": "3", "PMI_SIZE": "5"}, {"PMIX_RANK": "3"}])
def test_a_rank_that_cannot_know_the_others_does_not_take_itself_to_be_alone(environment: dict[str, str]) -> None:
    with pytest.raises(VernierError, match=r"PMIX?_RANK is set.*set RANK, WORLD_SIZE"):
        told_by(environment)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (POD, ("job-master-0", "23456", "MASTER_ADDR")),
        (POD | {"TORCHELASTIC_RUN_ID": "x"}, ("job-master-0", "23456", "torchrun")),
        (SRUN | {"MASTER_ADDR": "10.0.0.1"}, ("10.0.0.1", slurm_port(SRUN), "MASTER_ADDR")),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, ("127.0.0.1", slurm_port(SRUN), "srun (one node)")),
        (SRUN | {"SLURM_STEP_NODELIST": "127.0.0.[2-3]"}, ("127.0.0.2", slurm_port(SRUN), "Slurm's node list")),
    ],
)
def test_the_ranks_meet_where_the_environment_says(environment: dict[str, str], place: tuple[str, str, str]) -> None:
    assert place_of(told_by(environment), environment) == place


def test_a_node_whose_name_does_not_resolve_is_asked_of_scontrol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = SRUN | {"SLURM_STEP_NODELIST": "no-such-node[7-9].invalid"}
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=$3 Port=6818"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert place_of(told_by(environment), environment)[::2] == ("10.1.2.3", "scontrol")
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(VernierError, match=r"no-such-node7\.invalid, does not resolve.*set MASTER_ADDR"):
        place_of(told_by(environment), environment)
    environment["SLURM_LAUNCH_NODE_IPADDR"] = "10.9.9.9"
    assert place_of(told_by(environment), environment)[::2] == ("10.9.9.9", "SLURM_LAUNCH_NODE_IPADDR")


def test_two_steps_and_two_jobs_do_not_share_a_port() -> None:
    jobs = [SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(900) for step in range(13)]
    assert len({slurm_port(one) for one in jobs}) == len(jobs)
    assert all(1024 < int(slurm_port(one)) < 32768 for one in jobs)


def test_slurms_short_forms_are_read() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
    for nodes, first in [("gpu[003-009,12],login1", "gpu003"), ("a,b", "a"), ("r[1-2]n[5,7]", "r1n5"), ("one", "one")]:
        assert first_of(nodes) == first


def test_the_line_for_people() -> None:
    assert Meeting(RankIdentity("", 0, 1, 0, 1)).line() == "rank 0 of 1, started alone"
    line = Meeting(RankIdentity("srun", 0, 4, 0, 2), "10.0.0.1", "23456", "scontrol").line()
    assert line == "rank 0 of 4, told by srun; address 10.0.0.1:23456 from scontrol"


def test_asking_the_environment_does_not_load_torch() -> None:
    asks = "import sys, eval.distributed.environment as e; e.meet(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asks], check=False).returncode == 0
