"""`vernier launch --on ssh`: hosts reached by a real sshd train as one; what it held dies with the connection."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, losses, table_of, vernier, wait_for
from faults.running import processes
from test_mpirun import LOOPBACK, silent_display

from configs.load import load_config

pytestmark = pytest.mark.cluster

# Three hosts that are this machine, one where nobody listens, and one that has file systems of its own.
CLIENT = """
Host node-a node-b node-c
  Port {port}
Host node-dead
  Port 1
Host node-apart
  Port {apart}
Host *
  HostName 127.0.0.1
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
SERVER = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Hosts:
    """`environment`: in which ssh reaches them; `private`: a folder that node-apart sees nothing of; None where this
    machine gives nobody file systems of their own, and there is no node-apart."""

    environment: dict[str, str]
    private: Path | None
    begun: list[subprocess.Popen[str]] = field(default_factory=list)

    def launch(self, *settings: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        return vernier("launch", TINY, *settings, "--on", "ssh", code=code, env={**self.environment, **more})

    def begin(self, *settings: object) -> subprocess.Popen[str]:
        command = [*VERNIER, "launch", TINY, *map(str, settings), "--on", "ssh"]
        begun = subprocess.Popen(command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.begun.append(begun)
        return begun


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two sshd with keys and configuration of their own."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin:/sbin")
    if (sshd is None or os.getuid() != 0) and not os.environ.get("REQUIRE_CLUSTER"):
        pytest.skip("sshd is not on this machine, or this is not root")
    folder, private = tmp_path_factory.mktemp("ssh"), tmp_path_factory.mktemp("private")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it, for privilege separation
    ports = {"port": free_port(), "apart": free_port()}
    (folder / "client").write_text(CLIENT.format(folder=folder, **ports))
    options = f"-F {folder / 'client'}"
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(private)]
    apart = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0
    found = Hosts({**os.environ, **LOOPBACK, "VERNIER_SSH_OPTIONS": options}, private if apart else None)
    servers: list[subprocess.Popen[bytes]] = []

    def answers(host: str) -> bool:
        command = ["ssh", *options.split(), "-oBatchMode=yes", host, "true"]
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0

    try:
        for name, before in (("port", []), ("apart", hide))[: 1 + apart]:
            config = folder / f"server-{name}"
            config.write_text(SERVER.format(folder=folder, port=ports[name]))
            servers.append(subprocess.Popen([*before, str(sshd), "-D", "-f", config, "-E", folder / f"log-{name}"]))
        wait_for(lambda: answers("node-a") and (not apart or answers("node-apart")), 30)
        yield found
    finally:
        for process in [*found.begun, *servers]:
            process.kill()  # what is left of a test that failed; an sshd's children see that it is gone
            process.wait(10)


@pytest.mark.smoke
def test_two_hosts_train_and_a_third_scores_to_the_bits_of_one(
    hosts: Hosts, tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "it's a; run"  # which every shell between must leave alone
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "launch.nodes=2", "nproc=1"]
    site, variables = tmp_path / "site.yaml", tmp_path / "variables"
    site.write_text("setup: ['# a comment', 'export MY_SETUP=1 # another']\nenvironment_file: variables\n")
    variables.write_text(f"MY_KEY=a$(touch {tmp_path / 'pwned'}) b\n")
    where += ["--site", str(site)]
    said = hosts.launch(*where, "--hosts", "node-a,node-b,node-c").stderr
    assert not (tmp_path / "pwned").exists()
    assert "rank 0 of 2, told by torchrun; address 127.0.0.1:" in said
    assert "scored step 20" in said
    assert losses(run) == losses(tiny_run)
    for step in (0, 10, 20):
        assert table_of(run, step).read_bytes() == table_of(tiny_run, step).read_bytes()
    logs = {path.name for path in (run / "logs").iterdir()}
    assert {"torchrun-node-a.log", "torchrun-node-b.log", "eval-torchrun-node-c.log", "rank-1.log"} <= logs
    assert "is finished" in hosts.launch(*where, "--hosts", "node-a,node-b,node-c").stderr


def test_what_ssh_holds_stops_on_request_and_dies_with_it(hosts: Hosts, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "launch.nodes=2", "nproc=1"]
    where += ["steps=400", "checkpoint.every=50", "snapshot.every=400", "--hosts", "node-a,node-b"]

    def at_step(step: int) -> None:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= step, 240)

    training = hosts.begin(*where)
    at_step(60)
    training.send_signal(signal.SIGTERM)
    _, said = training.communicate(timeout=200)
    assert training.returncode == 75, said
    assert "no host is left for the evaluator: it runs on node-a, beside the training" in said
    wait_for(lambda: not processes(run), 30)

    training = hosts.begin(*where)
    at_step(120)
    training.kill()  # with it go its ssh, and with them what they hold
    training.communicate(timeout=30)
    wait_for(lambda: not processes(run), 30)

    training = hosts.begin(*where)
    at_step(200)
    held = [pid for pid, one in processes(run).items() if one.command.startswith("ssh ") and "node-b" in one.command]
    os.kill(held[0], signal.SIGKILL)  # one host is lost: the others end too, and say so
    _, said = training.communicate(timeout=200)
    assert training.returncode == 1, said
    assert "the same command goes on" in said or "another rank" in said, said
    wait_for(lambda: not processes(run), 30)

    assert "going on from step" in hosts.launch(*where).stderr
    assert json.loads((run / "state.json").read_text())["step"] == 400
    assert len(losses(run)) == 400


def test_mpirun_trains_over_hosts_that_it_reaches_by_ssh(
    hosts: Hosts, tiny_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run, agent = tmp_path / "run", f"ssh {hosts.environment['VERNIER_SSH_OPTIONS']}"
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=none", "launch.nodes=2", "nproc=1"]
    environment = {**hosts.environment, "OMPI_MCA_plm_rsh_agent": agent, "GLOO_SOCKET_IFNAME": "lo"}
    with silent_display():
        said = vernier("launch", TINY, *where, "--on", "mpi", "--hosts", "node-a,node-b", env=environment).stderr
    assert "rank 0 of 2, told by mpirun; address 127.0.0.1:" in said
    assert losses(run) == losses(tiny_run)
    given = load_config(run / "train-config.yaml")  # what hangs on a machine was left to the hosts
    assert (given.nproc, given.precision, given.deterministic, given.eval.dtype) == (1, None, None, None)


def test_a_dry_run_shows_what_would_be_started(hosts: Hosts, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "it's a; run"
    where = [f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate", "launch.nodes=2", "--dry-run"]
    told = hosts.launch(*where, "--hosts", "node-a,me@node-b,node-c", HF_TOKEN="hf_secret", NCCL_DEBUG="a b").stdout
    first, second, score = told.splitlines()
    words = shlex.split(second)
    assert words[0] == "ssh"
    assert words[-2] == "me@node-b"
    there = shlex.split(words[-1])
    assert there[:4] == ["cd", str(ROOT), "&&", "exec"]
    assert "NCCL_DEBUG=a b" in there
    assert there[there.index("--node-rank") + 1] == "1"
    assert there[-1] == str(run / "train-config.yaml")
    assert " node-a " in first
    assert " node-c " in score
    assert " eval " in score
    assert "hf_secret" not in told
    assert not run.exists()


def test_hosts_that_cannot_be_used_are_named(hosts: Hosts, tiny_data: Path, tmp_path: Path) -> None:
    if hosts.private is None:
        pytest.skip("unshare --mount is not allowed on this machine")
    where = [f"data.dir={tiny_data}", "eval.placement=none", "launch.nodes=2", "nproc=1"]
    run = hosts.private / "run"
    said = hosts.launch(*where, f"run.dir={run}", "--hosts", "node-dead,node-apart", code=2).stderr.splitlines()
    assert said[0].startswith("error: --hosts: node-dead: cannot be reached: ")
    assert "refused" in said[0]
    assert said[1].startswith(f"error: --hosts: node-apart does not see {hosts.private} as it is here; run.dir must be")
    assert len(said) == 2
    site = tmp_path / "site.yaml"
    site.write_text("python: /no/such/python\n")
    said = hosts.launch(*where, f"run.dir={run}", "--hosts", "node-a,node-b", "--site", site, code=2).stderr
    assert "error: --hosts: node-a: cannot run /no/such/python in " in said
    assert "No such file" in said
    assert hosts.launch(*where, f"run.dir={run}", code=2).stderr.startswith("error: --on: ssh: name the hosts with")
    assert not run.exists()
