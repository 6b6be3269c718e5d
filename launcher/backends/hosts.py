"""`--hosts`: the hosts of a run, and how many ranks each takes."""

from __future__ import annotations

import re
from pathlib import Path

from configs.errors import ConfigError
from configs.schema import Config

HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")  # ssh and mpirun would take a dash in front for an option


def read_hosts(given: str) -> tuple[str, ...]:
    """The hosts of `--hosts`: names with commas between, or a file with one a line, as mpirun takes it.

    Slots (`a slots=4`, `a:4`) are passed over: how many ranks a host has is a setting.

    Raises:
        ConfigError: no host, a name that cannot be one, or one twice.
    """
    path = Path(given)
    if path.is_file():
        rows = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [row[0] for row in rows if row]
    else:
        names = [name.strip() for name in given.split(",") if name.strip()]
    hosts = tuple(name.partition(":")[0] for name in names)
    if not hosts:
        raise ConfigError(f"--hosts: {given!r} names no host; expected a,b,c or a file with one host a line")
    for host in hosts:
        if not HOST.fullmatch(host):
            raise ConfigError(f"--hosts: {host!r} is no host (nor a file that is there); expected a,b,c or a file")
        if hosts.count(host) > 1:
            raise ConfigError(f"--hosts: {host} is there twice; ranks a host are launch.ranks_per_node")
    return hosts


def divided(hosts: tuple[str, ...], config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(hosts to train on, hosts to score on): the first `launch.nodes`, then `eval.nodes` of those left, else the first
    again.

    Raises:
        ConfigError: there are not so many, or more than anybody asked for.
    """
    nodes, eval_nodes = config.launch.nodes, config.eval.nodes
    evaluator = config.eval.is_beside
    used = nodes + (eval_nodes if evaluator else 0)
    if len(hosts) < nodes:
        raise ConfigError(f"--hosts: {len(hosts)} are given, launch.nodes is {nodes}")
    if len(hosts) > used and "nodes" not in config.launch.model_fields_set:
        raise ConfigError(f"launch.nodes: say how many of the {len(hosts)} hosts train; it is {nodes} unless set")
    left = hosts[nodes:]
    if not evaluator:
        return hosts[:nodes], ()
    if not left and eval_nodes == 1:
        return hosts[:nodes], hosts[:1]
    if len(left) < eval_nodes:
        raise ConfigError(
            f"--hosts: {len(hosts)} are given, launch.nodes + eval.nodes are {used}; "
            "give so many, or eval.placement=inline"
        )
    return hosts[:nodes], left[:eval_nodes]
