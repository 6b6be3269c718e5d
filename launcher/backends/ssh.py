"""`vernier launch --on ssh`: one torchrun on each of a list of hosts, over ssh, watched from here.

The hosts share the file system that the run, its data and the working directory are on. Here stays a `vernier` that
must not end before the run does: with the connection of a host its ranks die.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import EXIT_USAGE, ConfigError
from configs.log_stream import ask_for_marks
from configs.ports import RANK_PORTS
from launcher.backends.agent import RankGroup
from launcher.backends.hosts import divided
from launcher.backends.process import Started, carried, start
from launcher.backends.ssh_agent import STOP
from launcher.jobs.plan import Component, JobPlan

PROBE_S = 45.0
CONNECTION = (
    *("-T", "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=15", "-oServerAliveCountMax=4"),
    *("-oControlMaster=no", "-oClearAllForwardings=yes"),  # no other connection hangs on one that may be killed
)
# A line of the site's set-up that fails ends what it prepares, with that line; not one inside of a file it reads.
FAILS = (
    """trap 'code=$?; [ -n "${BASH_SOURCE[0]-}" ] || { echo "error: site profile: $BASH_COMMAND: """
    """exit code $code" >&2; exit 1; }' ERR"""
)
LONE_S = 30.0  # for the other hosts' torchruns to end after one has failed


class SshGroup:
    """A rank-group with a torchrun on each host: the ssh processes here that hold them."""

    def __init__(self, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.processes = processes
        self.failed_at: float | None = None

    @property
    def returncode(self) -> int | None:
        codes = [process.returncode for process in self.processes.values()]
        if any(code is None for code in codes):
            return None
        return next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        """The exit code once all have ended. Where one has failed, the others are given a while, then killed."""
        codes = [process.poll() for process in self.processes.values()]
        if any(codes):
            self.failed_at = self.failed_at or time.monotonic()
            if time.monotonic() - self.failed_at > LONE_S:
                self.kill()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        for process in self.processes.values():
            process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return self.returncode or 0

    def send_signal(self, sig: int) -> None:
        """Asks every torchrun to stop; whatever the signal, they have SIGTERM."""
        for process in self.processes.values():
            try:
                assert process.stdin is not None
                process.stdin.write(STOP)
                process.stdin.flush()
            except OSError:
                pass  # it has ended

    def terminate(self) -> None:
        self.send_signal(0)

    def kill(self) -> None:
        """Cuts the connections: what they held is killed over there."""
        for process in self.processes.values():
            process.kill()


@dataclass(frozen=True)
class Ssh:
    """Starts rank-groups over ssh. `environment`: variables that ranks get besides those carried from here."""

    plan: JobPlan
    hosts: tuple[str, ...]
    eval_hosts: tuple[str, ...]
    address: str
    eval_address: str
    environment: dict[str, str] = field(default_factory=dict)
    name: str = "ssh"
    marked: bool = True
    far: bool = True

    @property
    def training_log(self) -> str:
        return f"torchrun-{self.hosts[0]}.log"

    def train(self, arguments: list[str], logs: Path) -> Started:
        return self._start(self.plan.train, self.hosts, self.address, arguments, logs, "torchrun")

    def score(self, arguments: list[str], logs: Path) -> Started:
        assert self.plan.eval is not None
        return self._start(self.plan.eval, self.eval_hosts, self.eval_address, arguments, logs, "eval-torchrun")

    def _start(
        self, component: Component, hosts: tuple[str, ...], address: str, arguments: list[str], logs: Path, log: str
    ) -> Started:
        port = random.choice(RANK_PORTS)
        processes = {}
        for number, host in enumerate(hosts):
            command = self.command(component, hosts, number, address, port, arguments)
            processes[host] = start(command, dict(os.environ), logs / f"{log}-{host}.log", held=True)
        return SshGroup(processes)

    def command(
        self,
        component: Component,
        hosts: tuple[str, ...],
        number: int,
        address: str,
        port: int,
        arguments: list[str],
    ) -> list[str]:
        """The ssh command that holds one host's agent."""
        group = RankGroup(
            component.module,
            tuple(arguments),
            component.ranks_per_node,
            component.patience_s,
            nodes=len(hosts),
            node_rank=number,
            address=address,
            port=port,
            start=self.plan.config.launch.start,
        )
        inherited = {name: os.environ[name] for name in carried(os.environ) if name != "OMP_NUM_THREADS"}
        environment = self.environment | self.plan.site.environment
        environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if component.threads is not None:
            environment["OMP_NUM_THREADS"] = str(component.threads)
        if component.name == "train":
            ask_for_marks(environment)
        # The site's file of variables comes between: it has the last word on what is inherited, not on what is set.
        command = ["env", *_words(environment), *group.command(python_of(self.plan))]
        across = ["--across"] if len(hosts) > 1 else []
        return over_ssh(self.plan, hosts[number], tethered(self.plan, [*across, *command], inherited))


def tethered(plan: JobPlan, arguments: list[str], environment: dict[str, str] | None = None) -> list[str]:
    """The command that runs `launcher.backends.ssh_agent` on a host, with the site's file of variables."""
    file = plan.site.environment_file
    read = ["--environment", str(file)] if file is not None else []
    # Without PYTHONSAFEPATH a folder there that is named like a module of ours would be taken for it.
    words = _words({**(environment or {}), "PYTHONSAFEPATH": "1"})
    return ["env", *words, python_of(plan), "-m", "launcher.backends.ssh_agent", *read, *arguments]


def _words(environment: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in environment.items()]


def show_ssh(plan: JobPlan, hosts: tuple[str, ...]) -> list[str]:
    """The commands that `run_ssh` would start here, a line each, to be read or pasted. Asks no host.

    What only the hosts can tell is left open: ADDRESS of the first one, and a PORT, drawn at each start.
    """
    hosts, eval_hosts = hosts_of(plan, hosts)
    show = Ssh(plan, hosts, eval_hosts, "ADDRESS", "ADDRESS")
    groups = [(plan.train, hosts)] + ([(plan.eval, eval_hosts)] if plan.eval is not None else [])
    lines = []
    for component, group in groups:
        for number in range(len(group)):
            address = _told_address(hosts, group) or ("127.0.0.1" if len(group) == 1 else "ADDRESS")
            command = show.command(component, group, number, address, 0, list(component.arguments))
            lines.append(shlex.join(command).replace("--master-port 0", "--master-port PORT"))
    return lines


def hosts_of(plan: JobPlan, hosts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(hosts to train on, hosts to score on).

    Raises:
        ConfigError: they do not add up with the plan, or it wants what ssh does not do.
    """
    if not hosts:
        raise ConfigError("--on: ssh: name the hosts with --hosts a,b,c or --hosts FILE")
    if plan.site.container.kind != "none":
        raise ConfigError(
            f"--site: container.kind: {plan.site.container.kind} is for Slurm; with ssh, set `python` to one that the "
            "hosts have"
        )
    return divided(hosts, plan.config)


def python_of(plan: JobPlan) -> str:
    """The Python of ranks on the hosts."""
    return plan.site.python or sys.executable


def over_ssh(plan: JobPlan, host: str, command: list[str]) -> list[str]:
    """The command that runs `command` on a host, in the working directory, after the site's set-up."""
    site = plan.site
    folder, last = f"cd {shlex.quote(str(plan.work_dir))}", "exec " + shlex.join(command)
    script = f"{folder} && {last}"
    if site.modules or site.setup:
        modules = [f"module load {shlex.quote(module)}" for module in site.modules]
        lines = [f"{folder} || exit 1", FAILS, *modules, *site.setup, "trap - ERR", last]  # as they are: comments, too
        script = "\n".join(lines)
        script = f"exec bash -lc {shlex.quote(script)}"
    return ["ssh", *CONNECTION, *ssh_options(plan), host, script]


def ssh_options(plan: JobPlan) -> list[str]:
    """The site's options of ssh, then those of VERNIER_SSH_OPTIONS."""
    lines = [*plan.site.ssh_options, os.environ.get("VERNIER_SSH_OPTIONS", "")]
    return [word for line in lines for word in shlex.split(line)]


def probe_hosts(plan: JobPlan, hosts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What each host tells of itself (see `launcher.backends.ssh_agent.probe`); all are asked at once.

    Raises:
        ConfigError: a line for every host that cannot be reached, has no Python, or does not see our files.
    """
    config, run = plan.config, plan.run
    run.path.parent.mkdir(parents=True, exist_ok=True)
    token = run.path.parent / f".vernier-shared-{secrets.token_hex(8)}"
    token.touch()
    paths = [str(path) for path in (token, config.data_dir / "dataset.json", config.reference_dir / "reference.json")]
    try:
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: _probe(plan, host, paths), hosts))
    finally:
        token.unlink(missing_ok=True)
    problems = []
    for host, told in zip(hosts, answers, strict=True):
        if isinstance(told, str):
            problems.append(f"--hosts: {host}: {told}")
        elif str(token) in told["missing"]:
            problems.append(
                f"--hosts: {host} does not see {run.path.parent} as it is here; "
                "run.dir must be on a file system that all hosts share"
            )
        elif told["missing"]:
            problems.append(f"--hosts: {host} does not see {told['missing'][0]}; share data.dir with all hosts too")
        elif not told["torch"]:
            problems.append(f"--hosts: {host}: {python_of(plan)} has no torch there; install Vernier, or set `python`")
    if problems:
        raise ConfigError(*problems)
    return {host: told for host, told in zip(hosts, answers, strict=True) if isinstance(told, dict)}


def _probe(plan: JobPlan, host: str, paths: list[str]) -> dict[str, Any] | str:
    """What a host tells; or, as text, why it does not."""
    command = over_ssh(plan, host, tethered(plan, ["--probe", *paths]))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"has not answered for {PROBE_S:.0f} s"
    except OSError:
        return "ssh is not on this machine's PATH"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 255:
        return f"cannot be reached: {said[-1] if said else 'ssh ended with 255'}"
    if done.returncode == EXIT_USAGE and said and said[-1].startswith("error: "):
        return said[-1].removeprefix("error: ")
    if done.returncode != 0:
        return (
            f"cannot run {python_of(plan)} in {plan.work_dir}: {said[-1] if said else f'exit code {done.returncode}'}"
        )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))  # what its shell greets with is before that
    except (ValueError, IndexError):
        return f"answered {done.stdout[-100:]!r}"


def _told_address(hosts: tuple[str, ...], group: tuple[str, ...]) -> str | None:
    """MASTER_ADDR, for a group whose first host is the one that it is an address of: the first that trains."""
    return os.environ.get("MASTER_ADDR") if group[:1] == hosts[:1] else None


def address_of(hosts: tuple[str, ...], facts: dict[str, dict[str, Any]], told: str | None) -> str:
    """Where the ranks of a group meet: `told` if it is, else how its first host speaks to others.

    Raises:
        ConfigError: it speaks to nobody.
    """
    if told:
        return told
    if len({tuple(facts[host]["machine"]) for host in hosts}) == 1:
        return "127.0.0.1"
    address = str(facts[hosts[0]]["address"])
    if address.startswith("127."):
        raise ConfigError(
            f"--hosts: {hosts[0]} has no network to meet at; give it a route to the others (of the first host, "
            "MASTER_ADDR may name an address)"
        )
    return address
