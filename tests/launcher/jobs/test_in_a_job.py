"""Inside of a job: where its ranks meet, what surrounds them, and what follows when they have ended."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from test_job_scripts import plan_for, run_bash

from configs.errors import VernierError
from configs.ports import RANK_PORTS
from launcher.backends.slurm import render
from launcher.jobs.run.after import What, after_scoring, after_training
from launcher.jobs.run.meet import STRIDE, free_port, meeting_of
from launcher.jobs.run.steps import SCRATCH_READY, step_environment
from launcher.jobs.run.surroundings import variables_of

# ---- where ranks meet

SCONTROL = """#!/bin/bash
case "$2" in
hostnames) printf '%s\\n' n1 n2 ;;
node) case "$3" in n1) echo "NodeName=n1 x=1"; echo "   NodeAddr=FIRST NodeHostName=n1" ;;
    *) printf '   NodeAddr=%s NodeHostName=x\\n' FIRST SECOND ;; esac ;;
esac
"""


@pytest.fixture
def addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Has scontrol tell these addresses of two nodes."""

    def told(first: str, second: str) -> None:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "scontrol").write_text(SCONTROL.replace("FIRST", first).replace("SECOND", second))
        (bin_dir / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")

    monkeypatch.setattr("launcher.jobs.run.meet.RETRY_S", 0.0)
    return told


@pytest.mark.parametrize("first", ["10.1.0.1", "node1", "node1.cluster.example"])
def test_ranks_meet_at_the_address_that_slurm_has(first: str, addresses: Callable[[str, str], None]) -> None:
    addresses(first, "10.1.0.2")
    found = meeting_of("n[1-2]", 7)
    assert (found.address, found.here) == (first, False)
    assert found.port >= 20007


@pytest.mark.parametrize("first", ["127.0.0.1", "127.0.1.1", "localhost", "::1"])
def test_an_address_that_only_the_first_node_knows_is_refused(
    first: str, addresses: Callable[[str, str], None]
) -> None:
    addresses(first, "10.1.0.2")
    with pytest.raises(VernierError, match=rf"^n\[1-2\]: Slurm has {first} for the first of several nodes"):
        meeting_of("n[1-2]", 7)


def test_a_port_that_is_taken_is_not_swapped_for_that_of_the_next_job() -> None:
    with contextlib.ExitStack() as held:
        taken = []
        for _ in range(3):
            taken.append(free_port(7))
            held.enter_context(socket.create_server(("127.0.0.1", taken[-1])))
        assert len(set(taken)) == 3
        assert not set(taken[1:]) & set(RANK_PORTS[:3000])
    assert {RANK_PORTS[turn * STRIDE % len(RANK_PORTS)] for turn in range(len(RANK_PORTS))} == set(RANK_PORTS)


def test_nodes_that_are_one_machine_meet_on_loopback(
    addresses: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses("127.0.0.1", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = meeting_of("n[1-2]", 7)
    assert found.here
    (script,) = render(plan_for(tmp_path))
    assert step_environment(script.spec.groups[0], found, ())["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_node_without_an_address_is_an_error(addresses: Callable[[str, str], None]) -> None:
    addresses("", "")
    with pytest.raises(VernierError, match=r"^n\[1-2\]: scontrol show node tells no NodeAddr$"):
        meeting_of("n[1-2]", 7)


def test_a_node_without_scontrol_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no")
    with pytest.raises(VernierError, match="scontrol is not on this node's PATH"):
        meeting_of("n1", 7)


# ---- files of variables, and scratch


def test_a_file_of_variables_is_taken_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "secrets of mine"
    path.write_text(
        "# ours\n\nA=$(touch pwned) `x` $HOME 'b' # c\nexport B=\"q = r\"\r\nC='s'\nE=\nD=last=line", newline=""
    )
    values = {"A": "$(touch pwned) `x` $HOME 'b' # c", "B": "q = r", "C": "s", "E": "", "D": "last=line"}
    assert variables_of(path) == values
    assert "B" not in variables_of(path, without=["B"])


def test_a_line_that_is_no_variable_is_an_error_that_shows_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("A=b\nhf_secret\n")
    with pytest.raises(VernierError, match=r"mine: line 2: expected NAME=value$"):
        variables_of(tmp_path / "mine")


def test_scratch_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    code = SCRATCH_READY + 'stat -c %a "$TMPDIR"'
    fine = run_bash(code, env={**os.environ, "TMPDIR": str(tmp_path / "new" / "one")})
    assert (fine.returncode, fine.stdout) == (0, "700\n")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    link = run_bash(code, env={**os.environ, "TMPDIR": str(tmp_path / "link")})
    assert link.returncode == 1
    assert "belongs to another user" in link.stderr


# ---- what follows the ranks

FAILED = {"state": "failed", "exit_code": 1, "failure": {"rank": 1, "error": "no memory"}}
EARLY = {"state": "failed", "exit_code": 1, "failure": {"rank": 0, "error": "no such key", "early": True}}


@pytest.mark.parametrize(
    ("state", "signal", "by_hand", "what", "code"),
    [
        ({"state": "done", "exit_code": 0}, "", False, What.END, 0),
        (FAILED, "", False, What.END, 1),
        ({"state": "stopping", "exit_code": 75}, "USR1", False, What.REQUEUE, 75),
        ({"state": "stopping", "exit_code": 75}, "USR1", True, What.END, 75),
        ({"state": "stopping", "exit_code": 75}, "TERM", False, What.END, 75),
        ({"state": "stopping", "exit_code": 75}, "", False, What.WAIT, 75),
        ({"state": "stopping", "exit_code": 75}, "", True, What.END, 75),
        ({"state": "stopping", "exit_code": 75, "again": "out of memory"}, "", False, What.AGAIN, 0),
        ({"state": "stopping", "exit_code": 75, "again": "out of memory"}, "USR1", False, What.REQUEUE, 75),
        ({"state": "running"}, "", False, What.END, 1),
        ({"state": "running"}, "USR1", False, What.REQUEUE, 75),
        ({"state": "running"}, "TERM", False, What.END, 1),
        ({"state": "pending"}, "", False, What.AGAIN, 0),
        ({"state": "pending"}, "USR1", False, What.REQUEUE, 75),
        (EARLY, "", False, What.AGAIN, 0),
        (EARLY, "TERM", False, What.END, 1),
    ],
)
def test_what_follows_a_training(state: dict, signal: str, by_hand: bool, what: What, code: int) -> None:
    found = after_training(state, signal, by_hand=by_hand)
    assert (found.what, found.code) == (what, code)


@pytest.mark.parametrize(
    ("code", "signal", "alone", "what"),
    [
        (0, "", False, What.END),
        (1, "", False, What.AGAIN),
        (143, "USR1", False, What.REQUEUE),
        (143, "USR1", True, What.END),
        (143, "TERM", False, What.END),
    ],
)
def test_what_follows_an_evaluator(code: int, signal: str, alone: bool, what: What) -> None:
    assert after_scoring(code, signal, alone=alone).what is what
