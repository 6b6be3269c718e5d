"""What is started on other hosts: the site's set-up as it stands, variables to the letter, where ranks meet."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from launcher.backends.process import carried
from launcher.backends.ssh import over_ssh, show_ssh, tethered
from launcher.backends.ssh_agent import gloo_interface
from launcher.jobs.plan import JobPlan, make_plan
from launcher.jobs.site import Site


def plan(site: Site, *settings: str) -> JobPlan:
    return make_plan(str(ROOT / TINY), list(settings), site)


def there(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs here what ssh would hand to a host's shell, for as long as stdin stays open."""
    ours, held = os.pipe()
    try:
        return subprocess.run(
            ["sh", "-c", command[-1]], stdin=ours, capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        os.close(ours)
        os.close(held)


def test_a_file_of_variables_is_read_to_the_letter_and_never_run(tmp_path: Path) -> None:
    file = tmp_path / "it's a file"
    file.write_text(
        f"# mine\n\nMY_KEY=a$(touch {tmp_path}/pwned) b\r\nexport B='c \"d'\nC=x=y\nGIVEN=of the file\nSET=of the file"
    )
    ours = plan(Site(environment_file=file, python=sys.executable))
    show = (
        'import os; print(*(repr(os.environ.get(n)) for n in ("MY_KEY", "B", "C", "GIVEN", "SET", "PYTHONSAFEPATH")))'
    )
    command = ["env", "SET=set", sys.executable, "-c", show]
    done = there(over_ssh(ours, "host", tethered(ours, command, {"GIVEN": "inherited"})))
    told = [f"a$(touch {tmp_path}/pwned) b", 'c "d', "x=y", "of the file", "set", "1"]
    assert done.stdout.strip() == " ".join(map(repr, told)), done.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_wrong_line_of_it_is_named_by_its_number_alone(tmp_path: Path) -> None:
    file = tmp_path / "variables"
    for text in ("A=1\nhush hush\n", "A=1\nhu-sh=hush\n"):
        file.write_text(text)
        ours = plan(Site(environment_file=file, python=sys.executable))
        done = there(over_ssh(ours, "host", tethered(ours, ["--probe"])))
        assert done.returncode == 2
        assert done.stderr == f"error: environment_file: {file}: line 2: expected NAME=value\n"
    file.unlink()
    done = there(over_ssh(ours, "host", tethered(ours, ["--probe"])))
    assert done.stderr == f"error: environment_file: {file} cannot be read: No such file or directory\n"


def test_lines_of_setup_are_run_as_they_are() -> None:
    setup = ["# a comment", "export A=1 # another", 'if [ -n "$A" ]', "then", "    export B='it''s'", "fi"]
    ours = plan(Site(setup=setup))
    done = there(over_ssh(ours, "host", ["sh", "-c", 'echo "$A $B $(pwd)"']))
    assert done.stdout.splitlines()[-1] == f"1 its {Path.cwd()}", done.stderr


def test_the_evaluator_meets_at_master_addr_only_on_the_host_that_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.9.9.9")
    ours = plan(Site(), "eval.placement=separate", "eval.nodes=2", "launch.nodes=2")
    lines = show_ssh(ours, ("a", "b", "c", "d"))
    assert ["--master-addr 10.9.9.9 " in line for line in lines] == [True, True, False, False]
    beside = plan(Site(), "eval.placement=separate", "launch.nodes=2")
    # The evaluator has one host, whose ranks meet on its loopback.
    assert ["--master-addr " in line for line in show_ssh(beside, ("a", "b"))] == [True, True, False]
    assert all(" -oControlMaster=no -oClearAllForwardings=yes " in line for line in lines)
    assert all("PYTHONSAFEPATH=1" in line and " --across " in line for line in lines)


def test_gloo_is_given_an_interface_where_a_hosts_name_means_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.1.2.3")
    assert gloo_interface() == {}
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            assert gloo_interface() == {}  # there is no other host to meet
            return
        address = probe.getsockname()[0]
    name = gloo_interface()["GLOO_SOCKET_IFNAME"]
    assert name in {name for _, name in socket.if_nameindex()}
    assert (name == "lo") == address.startswith("127.")


def test_other_machines_are_given_no_secret_and_all_that_ranks_need() -> None:
    given = ["NCCL_IB_PKEY", "UCX_IB_PKEY", "PYTHONSAFEPATH", "HF_HOME"]
    kept = ["HF_TOKEN", "HF_API_KEY", "HF_APPKEY", "TORCH_PKEY", "VERNIER_SSH_OPTIONS", "HOME"]
    assert carried(dict.fromkeys([*given, *kept], "1")) == sorted(given)
