"""srun alone, without torchrun and without MPI, starts ranks that find one another by Slurm's own variables."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, losses, table_of

pytestmark = pytest.mark.cluster


def srun(*words: object) -> subprocess.CompletedProcess[str]:
    """Two ranks on two nodes whose names do not resolve."""
    command = ["srun", "--nodes=2", "--ntasks=2", "--mpi=none", sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_srun_alone_trains_to_the_bits_of_torchrun(
    cluster: Any, tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = srun("trainer", TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=inline")
    first = done.stderr.splitlines()[0]
    found = re.fullmatch(r"rank 0 of 2, told by srun; address 127\.0\.0\.1:(\d+) from scontrol", first)
    assert found, first
    told = f"rank 1 of 2, told by srun; address 127.0.0.1:{found[1]} from scontrol\n"
    assert (run / "logs" / "rank-1.log").read_text().startswith(told)
    assert losses(run) == losses(tiny_run)
    for step in (0, 10, 20):
        assert table_of(run, step).read_bytes() == table_of(tiny_run, step).read_bytes()


def test_srun_alone_scores_to_the_bits_of_torchrun(
    cluster: Any, tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    table, model = tmp_path / "t@causal.fp32.parquet", tiny_run / "snapshots" / "step-00000020"
    done = srun("eval", "--reference", tiny_data / "reference", "--models", model, "--tables", table)
    assert "rank 0 of 2, told by srun; address 127.0.0.1:" in done.stderr
    assert "rank 1 of 2" not in done.stdout + done.stderr
    from eval.tables import read_table

    assert (read_table(table).loss == read_table(table_of(tiny_run, 20)).loss).all()
