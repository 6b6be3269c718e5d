"""Runs a command for as long as its stdin stays open: what ssh starts on another machine dies with the connection.

ssh without a terminal leaves what it started running when it goes. `python -m launcher.backends.ssh_agent COMMAND…`
kills it: its stdin is the connection. A byte `s` on it asks the command to stop (SIGTERM). `--probe PATH…` tells of
this machine. `--environment FILE` reads variables for the command; `--across` says that its ranks meet those of other
machines.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from configs.console import open_streams, tell
from configs.errors import EXIT_USAGE, ConfigError
from configs.process import kill_with_parent

STOP = b"s"
SIOCGIFADDR = 0x8915  # man 7 netdevice: the address of an interface


def main(arguments: list[str]) -> int:
    """Runs the command; gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.backends.ssh_agent", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--environment", type=Path)
    parser.add_argument("--across", action="store_true")
    parser.add_argument("--probe", nargs="*", metavar="PATH")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(arguments)
    try:
        told = read_environment(asked.environment) if asked.environment is not None else {}
    except ConfigError as error:
        tell(f"error: {error}", sys.stderr)
        return EXIT_USAGE
    if asked.probe is not None:
        print(json.dumps(probe(asked.probe)))
        return 0
    environment = {**os.environ, **told}
    if asked.across and "GLOO_SOCKET_IFNAME" not in environment:
        environment |= gloo_interface()
    child = subprocess.Popen(
        asked.command,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=kill_with_parent,
    )
    threading.Thread(target=_hold, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _hold(child: subprocess.Popen[bytes]) -> None:
    while word := os.read(0, 1):
        if word == STOP:
            child.send_signal(signal.SIGTERM)
    child.kill()  # torchrun; its ranks die with it


def probe(paths: list[str]) -> dict[str, Any]:
    """What a launch has to know of this machine: which it is, its address, what is there of `paths` and of Python."""
    from eval.distributed.environment import outward_address

    return {
        "host": socket.gethostname(),
        "machine": [_read("/proc/sys/kernel/random/boot_id"), _network()],
        "address": outward_address(),
        "torch": importlib.util.find_spec("torch") is not None,
        "missing": [path for path in paths if not Path(path).exists()],
    }


def read_environment(path: Path) -> dict[str, str]:
    """The variables of a site's `environment_file`: lines of NAME=value, to the letter, as jobs of Slurm read them.

    Raises:
        ConfigError: names the file and the line, and never what is in it.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ConfigError(f"environment_file: {path} cannot be read: {error.strerror}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.removeprefix("export ").partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in value:
            raise ConfigError(f"environment_file: {path}: line {number}: expected NAME=value")
        found[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] in "\"'" else value
    return found


def gloo_interface() -> dict[str, str]:
    """GLOO_SOCKET_IFNAME, where this machine's name means loopback to itself, as on Debian, or nothing at all.

    gloo would have the ranks of other machines meet it there.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return {}
    except OSError:
        pass  # gloo takes loopback then
    interface = _outward_interface()
    return {"GLOO_SOCKET_IFNAME": interface} if interface is not None else {}


def _outward_interface() -> str | None:
    """The network interface by which this machine speaks to others; None where it has none."""
    from eval.distributed.environment import outward_address

    address = outward_address()
    if address.startswith("127."):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return socket.gethostname()


def _network() -> str:
    """The network that this process is in: containers of one machine may each have one."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


if __name__ == "__main__":
    open_streams()
    sys.exit(main(sys.argv[1:]))
