"""`vernier doctor`: whether this machine can train and score, found out by trying; a line each, and what to do.

The nodes of a job are looked at by launcher.preflight, whose ranks are started here on this machine alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.devices import gpu_count
from configs.errors import EXIT_DONE, EXIT_FAILED, DataError
from configs.files.atomic import read_json
from configs.process import kill_with_parent
from launcher.backends.local import local_group
from launcher.backends.process import end
from launcher.preflight.gpu import gpu_facts, gpu_findings
from launcher.preflight.machine import Finding, check_folder, check_limits, check_schedulers, check_shm, stale_locks
from launcher.watch.run_index import find

if TYPE_CHECKING:
    from rich.console import Console

IMPORT_S = 180.0  # of torch and deepspeed, from a cold disk
RANKS_S = 180.0
END_S = 15.0  # for torchrun to end its ranks
ORDER = ("ok", "warning", "bad")
STYLES = {"ok": "green", "warning": "yellow", "bad": "red"}
_IMPORTS = """
import json, sys, platform
out = {"python": platform.python_version()}
import torch
out["torch"], out["cuda"] = torch.__version__, torch.version.cuda
out["gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
out["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if out["gpus"] else None
from trainer.engine.build import import_deepspeed
out["deepspeed"] = import_deepspeed().__version__
import transformers
out["transformers"] = transformers.__version__
print("\\n" + json.dumps(out))
"""


def run_doctor(run: Path | None, *, json_out: bool, console: Console) -> int:
    """Looks at this machine, and where a run is named at its folder and at what its last preflight found.

    Returns:
        The exit code: 1 where something is bad.

    Raises:
        DataError: what was named is no run directory.
    """
    folder = Path("runs")
    findings: list[Finding] = []
    if run is not None:
        folder = find(run).path
    steps: list[Callable[[], list[Finding]]] = [
        check_imports,
        check_devices,
        lambda: check_folder(folder),
        lambda: check_ranks(folder),
        check_limits,
        check_shm,
        stale_locks,
        check_schedulers,
    ]
    if run is not None:
        steps.append(lambda: last_preflight(folder))
    with nullcontext() if json_out else console.status("looking …"):
        for step in steps:
            findings += step()
    worst = max((finding.state for finding in findings), key=ORDER.index)
    from launcher.watch.next_command import say_next

    if json_out:
        print(json.dumps({"state": worst, "checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print_findings(findings, console)
        if worst != "bad" and run is None:
            say_next(console, "prepare demo", "train demo")
    return EXIT_FAILED if worst == "bad" else EXIT_DONE


def check_imports() -> list[Finding]:
    """Imports torch, DeepSpeed and transformers in a process of their own, which may crash or hang."""
    try:
        command = [sys.executable, "-c", _IMPORTS]
        said = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        todo = "see below for a stale build lock; else look at the disk that Python lies on"
        return [Finding("environment", "bad", f"importing torch and deepspeed takes over {IMPORT_S:.0f} s", todo)]
    if said.returncode:
        last = (said.stderr.strip().splitlines() or [f"exit code {said.returncode}"])[-1]
        return [Finding("environment", "bad", last, "install Vernier again: pip install vernier-lm, or make setup")]
    found = json.loads(said.stdout.strip().splitlines()[-1])
    words = f"Python {found['python']}, " + ", ".join(f"{p} {found[p]}" for p in ("torch", "deepspeed", "transformers"))
    if found["cuda"]:
        words += f", CUDA {found['cuda']}" + (f", NCCL {found['nccl']}" if found["nccl"] else "")
    out = [Finding("environment", "ok", words)]
    if gpu_count() > found["gpus"]:
        built = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
        todo = "install the torch that fits the driver (pytorch.org), or a newer driver"
        out.append(Finding("CUDA", "bad", f"torch sees {found['gpus']} of {gpu_count()} GPUs; it is {built}", todo))
    return out


def check_devices() -> list[Finding]:
    """The GPUs: there, idle, sound."""
    facts = gpu_facts()
    if not facts and not gpu_count():
        return [Finding("devices", "ok", f"no GPU; trains on {len(os.sched_getaffinity(0))} cores of the CPU")]
    if not facts:
        todo = "install NVIDIA's utilities beside the driver"
        return [Finding("devices", "warning", f"{gpu_count()} GPUs; nvidia-smi is not here to ask how they are", todo)]
    bad, watch = gpu_findings(facts)
    names = [gpu["name"] for gpu in facts["gpus"]]
    words = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "no GPU to use"
    driver = facts["gpus"][0]["driver"] if facts["gpus"] else None
    words += f", driver {driver}" if driver else ""
    if facts["xids"] is None:
        words += "; the kernel's log may not be read (dmesg), so Xid errors are not known"
    todo = "end what uses them (nvidia-smi names it), or have the node looked after"
    out = [Finding("devices", "bad", one, todo) for one in bad]
    out += [Finding("devices", "warning", one, "look at it when trainings fail here") for one in watch]
    return [Finding("devices", "ok", words), *out] if names or out else [Finding("devices", "warning", words)]


def check_ranks(folder: Path) -> list[Finding]:
    """Starts ranks as a training does: they multiply, exchange data, and are held against each other."""
    ranks = gpu_count() or 2
    name = "1 rank" if ranks == 1 else f"{ranks} ranks"
    place = folder if folder.is_dir() and os.access(folder, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".doctor.", dir=place, ignore_cleanup_errors=True) as work:
        arguments = [work, "--timeout", str(RANKS_S / 2)]
        group, environment = local_group("launcher.preflight", arguments, nproc=ranks, threads=1)
        process = subprocess.Popen(
            group.command(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )
        try:
            out, _ = process.communicate(timeout=RANKS_S)
        except subprocess.TimeoutExpired:
            todo = "set GLOO_SOCKET_IFNAME=lo and look whether `hostname` is in /etc/hosts"
            return [Finding(name, "bad", f"did not exchange data within {RANKS_S:.0f} s", todo)]
        finally:  # at Ctrl-C too
            end(process, END_S)
        try:
            report = read_json(Path(work) / "preflight.json")
        except DataError:
            last = (out.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            return [Finding(name, "bad", f"they cannot be started: {last}", "run it by hand to see the rest")]
    return _ranks_findings(name, report)


def _ranks_findings(name: str, report: dict[str, Any]) -> list[Finding]:
    out = []
    for entry in report["bad"]:
        words = f"{entry['node']}: {entry['why']}"
        out.append(Finding(name, "bad", words, "see whether something else runs here, then look at that device"))
    if report["failed"]:
        out.append(Finding(name, "bad", report["failed"], "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"))
    facts = list(report["nodes"].values())
    backend = facts[0].get("exchange", {}).get("backend", "")
    speeds = [one["speed"]["flops"] for one in facts if "speed" in one]
    if report["all_reduce"] is not None and speeds:
        words = f"joined by {backend}: all-reduce {report['all_reduce'] / 1e9:.2f} GB/s, "
        words += f"{min(speeds) / 1e9:,.0f} GFLOP/s each at least"
        out.insert(0, Finding(name, "ok", words))
    elif len(facts) == 1 and speeds:
        out.insert(0, Finding(name, "ok", f"{speeds[0] / 1e9:,.0f} GFLOP/s; with one there is nobody to join"))
    return out


def last_preflight(run: Path) -> list[Finding]:
    """What the last preflight of a run's jobs has found."""
    path = run / "preflight.json"
    if not path.is_file():
        return [Finding("preflight", "ok", "none has been made for this run yet")]
    report = read_json(path)
    job = f" of job {report['job']}" if report.get("job") else ""
    if report["good"]:
        return [Finding("preflight", "ok", f"all {len(report['nodes'])} nodes{job} were fit")]
    todo = "submit again without them: vernier launch … --exclude-bad"
    out = [Finding("preflight", "warning", f"{e['node']}{job}: {e['why']}", todo) for e in report["bad"]]
    if report["failed"]:
        out.append(Finding("preflight", "warning", f"{report['failed']}{job}", "see the job's log"))
    return out


def print_findings(findings: list[Finding], console: Console) -> None:
    """A table of what was found, and below it what to do."""
    from rich.text import Text

    from launcher.text import new_table, print_table, say

    table = new_table()
    for heading in ("check", "", "found"):
        table.add_column(heading)
    for one in findings:
        table.add_row(Text(one.name), Text(one.state, STYLES[one.state]), Text(one.said))
    print_table(table, console)
    for one in findings:
        if one.todo and one.state != "ok":
            say(console, f"{one.name}: {one.todo}", STYLES[one.state])
    count = {state: sum(one.state == state for one in findings) for state in ORDER}
    said = ", ".join(f"{count[state]} {state}" for state in ORDER if count[state])
    say(console, said, "bold")
