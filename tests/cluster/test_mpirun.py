"""A rank-group that mpirun starts finds itself by MPI and makes the very tables that torchrun's does."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import vernier

pytestmark = pytest.mark.cluster

# All ranks share one machine: Open MPI's shared-memory transport is kept out, and everything stays on loopback.
LOOPBACK = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_oob_tcp_if_include": "lo",
}


@pytest.fixture(scope="module", autouse=True)
def mpi() -> None:
    """Without MPI these tests are skipped, except where the cluster is required."""
    if shutil.which("mpirun") is None and not os.environ.get("REQUIRE_CLUSTER"):
        pytest.skip("mpirun is not on this machine")


@contextlib.contextmanager
def silent_display() -> Iterator[None]:
    """A listener on TensorBoard's port, which hwloc takes for X display 6 and waits for to speak."""
    with socket.socket() as board:
        with contextlib.suppress(OSError):  # one is there already
            board.bind(("127.0.0.1", 6006))
            board.listen()
        yield


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_mpirun_makes_the_same_bits_as_torchrun(ranks: int, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_run / "snapshots" / "step-00000020"
    options = ["--reference", tiny_data / "reference", "--nproc", ranks]
    vernier("eval", model, *options, "--by", "mpirun", "--out", tmp_path / "mpi", env={**os.environ, **LOOPBACK})
    (by_mpi,) = (tmp_path / "mpi").glob("*.parquet")
    if ranks == 4:
        vernier("eval", model, *options, "--out", tmp_path / "torchrun")
        assert by_mpi.read_bytes() == next((tmp_path / "torchrun").glob("*.parquet")).read_bytes()
    assert by_mpi.read_bytes() == _scored_by_one(model, tiny_data, tmp_path).read_bytes()


def _scored_by_one(model: Path, data: Path, tmp_path: Path) -> Path:
    vernier("eval", model, "--reference", data / "reference", "--out", tmp_path / "one")
    return next((tmp_path / "one").glob("*.parquet"))


def test_a_tensorboard_on_its_port_does_not_keep_mpirun_waiting() -> None:
    from launcher.backends.mpi import mpirun

    with silent_display():
        command, environment = mpirun("json.tool", ["--help"], nproc=1, threads=1)
        done = subprocess.run(command, env={**environment, **LOOPBACK}, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
