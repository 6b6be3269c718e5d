"""`vernier` for tests as a fork of one process that has imported everything: the same command at a tenth of its price.

`subprocess.Popen` and `run` of `python -m` one of `PROGRAMS` come here, except in tests marked `real`, which are about
processes themselves, and where the environment says something that only a new process would heed.
tests/launcher/train/test_start.py holds forked and exec'd against each other.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
VERNIER = [sys.executable, "-m", "launcher.cli"]
PROGRAMS = ("launcher.cli", "launcher.backends.agent", "tests.trainer.faults.hanging")
# Heeded while Python and libraries are loaded, so never by a fork.
AT_START = re.compile(
    r"(PYTHON|LD_|ATEN_|OMP_|MKL_|KMP_|TORCH|HF_|TRANSFORMERS_|DS_|CUDA_|MALLOC_|VERNIER_(LOGITS|JOURNAL)_).*"
)
STREAMS = (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread"))
EXEC = subprocess.Popen
SIGNATURE = inspect.signature(EXEC._execute_child)  # type: ignore[attr-defined]


class Vernier(EXEC):  # type: ignore[type-arg]
    """`subprocess.Popen`, but our programs are forked where that comes to the same."""

    real = False  # whether the test at work is marked so
    address = ""  # of this worker's server
    cpu_s = 0.0  # that forked commands have cost, their children included

    def _execute_child(self, *arguments: Any) -> None:
        given = SIGNATURE.bind(self, *arguments).arguments
        self.line: socket.socket | None = None
        environment = {os.fsdecode(k): os.fsdecode(v) for k, v in (given["env"] or os.environ).items()}
        words = [os.fsdecode(word) for word in given["args"]] if isinstance(given["args"], list | tuple) else []
        as_given = given["preexec_fn"] is None and not given["executable"] and not given["shell"]
        ours = words[:2] == VERNIER[:2] and words[2:3] and words[2] in PROGRAMS
        if Vernier.real or not ours or not as_given or not _is_heeded(environment):
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        asked = {
            "words": words[2:],
            "environment": environment,
            "directory": os.path.abspath(given["cwd"] or "."),
            "session": given["start_new_session"],
        }
        streams = [given[ours] for ours, _ in STREAMS]
        self.line = _ask(asked, [own if own != -1 else number for number, own in enumerate(streams)])
        self.pid = int(self.line.recv(64))
        self._child_created = True
        self._close_pipe_fds(*(given[name] for pair in STREAMS for name in _in_order(pair)))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self.line is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        if wait_flags & os.WNOHANG and not select.select([self.line], [], [], 0)[0]:
            return 0, 0
        said = self.line.recv(64).split()
        self.line.close()
        status, cpu_s = (int(said[0]), float(said[1])) if said else (signal.SIGKILL, 0.0)  # the server itself is gone
        Vernier.cpu_s += cpu_s
        return self.pid, status

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if getattr(self, "line", None) is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc, no-any-return]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def _in_order(pair: tuple[str, str]) -> tuple[str, str]:
    """As `_close_pipe_fds` takes the ends of a pipe: the one to read from first."""
    return pair if pair[0].endswith("read") else pair[::-1]


def _is_heeded(environment: dict[str, str]) -> bool:
    """Whether a fork of this process heeds all that an environment says."""
    names = {name for name in {*environment, *os.environ} if AT_START.fullmatch(name)}
    return all(environment.get(name) == os.environ.get(name) for name in names)


def _ask(asked: dict[str, Any], descriptors: list[int]) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    line.connect(_server())
    socket.send_fds(line, [json.dumps(asked).encode()], descriptors)
    return line


def _server() -> str:
    """Where this worker's server listens; starts it when it is first asked."""
    if not Vernier.address:
        Vernier.address = os.path.join(tempfile.mkdtemp(prefix="vernier-forks-"), "server")
        ready, said = os.pipe()
        EXEC(
            [sys.executable, __file__, Vernier.address, str(said)], cwd=ROOT, pass_fds=[said], stdin=subprocess.DEVNULL
        )
        os.close(said)
        assert os.read(ready, 1), "the fork server did not start"
        os.close(ready)
    return Vernier.address


def serve(address: str, ready: int) -> NoReturn:
    """Forks commands until its parent ends. Has one thread, and has initialised nothing."""
    from configs.process import kill_with_parent

    kill_with_parent()
    import_everything()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.collect()
    gc.freeze()
    os.write(ready, b"1")
    lines: dict[int, socket.socket] = {}
    while True:
        if listener in select.select([listener, woken], [], [])[0]:
            line, _ = listener.accept()
            message, descriptors, *_ = socket.recv_fds(line, 1 << 20, 3)
            pid = os.fork()
            if pid == 0:
                live(json.loads(message), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            line.send(str(pid).encode())
            lines[pid] = line
            continue
        os.read(woken, 4096)
        while lines:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if not pid:
                break
            line = lines.pop(pid)
            with suppress(OSError):  # nobody waits for it any more
                line.send(f"{status} {used.ru_utime + used.ru_stime:.2f}".encode())
            line.close()


def live(asked: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """The life of a forked command."""
    from setproctitle import setproctitle

    from configs.process import end_at_once
    from launcher.backends.agent import unheard

    code = 1
    try:
        unheard()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if asked["session"]:
            os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.closerange(3, 1024)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
        setproctitle(" ".join([*VERNIER[:2], *asked["words"]]))
        os.environ.clear()
        os.environ.update(asked["environment"])
        time.tzset()
        os.chdir(asked["directory"])
        program = import_module(asked["words"][0])
        sys.argv = [str(program.__file__), *asked["words"][1:]]
        sys.modules["__main__"].__package__ = program.__package__  # by which click tells `python -m`
        code = program.main() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        end_at_once(code)


def import_everything() -> None:
    """All that any verb and any rank comes to import."""
    from launcher.backends.agent import import_once

    for module in ("trainer", "eval"):
        import_once(module, ("llama", "gpt2"))
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        if path.stem not in ("__main__", "skypilot"):
            import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in (
        "matplotlib.figure",
        "scipy.stats",
        "pyarrow.parquet",
        "datasets",
        "eval.compare.plots",
        "trainer.data.prepare",
    ):
        import_module(name)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve(sys.argv[1], int(sys.argv[2]))
