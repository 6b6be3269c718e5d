"""Runs a command for as long as its stdin stays open: what ssh starts on another machine dies with the connection.

ssh without a terminal leaves what it started running when it goes. `python -m launcher.tether COMMAND…` kills it: its
stdin is the connection. A byte `s` on it asks the command to stop (SIGTERM). `--probe PATH…` tells of this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from configs.parent import kill_with_parent

STOP = b"s"


def main(arguments: list[str]) -> int:
    """Runs the command; gives its exit code."""
    if arguments[:1] == ["--probe"]:
        print(json.dumps(probe(arguments[1:])))
        return 0
    child = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=kill_with_parent)
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
    from eval.rank_environment import outward_address

    return {
        "host": socket.gethostname(),
        "machine": [_read("/proc/sys/kernel/random/boot_id"), _network()],
        "address": outward_address(),
        "torch": importlib.util.find_spec("torch") is not None,
        "missing": [path for path in paths if not Path(path).exists()],
    }


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
    sys.exit(main(sys.argv[1:]))
