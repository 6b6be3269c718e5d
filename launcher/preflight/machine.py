"""What `vernier doctor` looks at besides ranks: the runs' folder, limits, shared memory, build locks, schedulers."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.preflight.node import clock_facts, folder_facts

GIB = 1 << 30
DISK_BAD, DISK_WATCH = GIB, 20 * GIB  # a checkpoint of a model of a billion parameters is 12 GiB
FILES_WATCH = 4096  # shards, safetensors, sockets to every rank: each is an open file
SHM_WATCH = GIB  # NCCL and data loaders share memory there; containers have 64 MiB unless told otherwise
SHM_TRY = 16 << 20
BUILD_S = 900.0  # no build of an op takes longer without writing a file
CLOCK_WATCH_S = 2.0
ASK_S = 20.0


@dataclass(frozen=True)
class Finding:
    """What a check has found, and what to do about it."""

    name: str
    state: Literal["ok", "warning", "bad"]
    said: str
    todo: str | None = None


def check_folder(folder: Path) -> list[Finding]:
    """Writes, renames, reads and locks in the folder of the runs, and holds the clock against its server's."""
    name = "runs folder"
    made = not folder.exists()
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        work = Path(tempfile.mkdtemp(prefix=".doctor.", dir=there))
    except OSError as error:
        todo = "choose another one (run.dir), or have it made writable for you"
        return [Finding(name, "bad", f"{there} cannot be written ({error.strerror})", todo)]
    try:
        facts = folder_facts(work, socket.gethostname())
        clock = clock_facts(work, socket.gethostname())
        locks = _locks(work / "lock")
        free = shutil.disk_usage(work).free
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if "error" in facts:
        return [Finding(name, "bad", f"{there} {facts['error']}", "choose another one (run.dir)")]
    kind = file_system(there)
    words = f"{there}{' (runs will be made there)' if made else ''}: {kind}, {free / GIB:,.1f} GiB free, "
    words += f"1 MiB written, renamed and read in {1000 * facts['seconds']:.0f} ms"
    out = [Finding(name, "ok", words)]
    if free < DISK_WATCH:
        state: Literal["warning", "bad"] = "bad" if free < DISK_BAD else "warning"
        out.append(Finding("disk", state, f"{free / GIB:.1f} GiB free at {there}", "make room; see vernier plan"))
    if kind in ("tmpfs", "ramfs", "overlay"):
        todo = "choose a run.dir on a disk that stays"
        out.append(Finding(name, "warning", f"{there} is {kind}: runs are gone with the machine or container", todo))
    if locks is not None:
        todo = "have it mounted with locks (NFS: without nolock; Lustre: with flock)"
        out.append(Finding("locks", "bad", f"{there}: {locks}; two trainers could write one run", todo))
    behind = clock.get("behind_s", 0.0)
    if abs(behind) - clock.get("within_s", 0.0) > CLOCK_WATCH_S:
        words = f"this clock is {abs(behind):.1f} s {'behind' if behind > 0 else 'ahead of'} the file server's"
        out.append(Finding("clock", "warning", words, "have it synchronised (chrony, ntpd)"))
    return out


def _locks(path: Path) -> str | None:
    """Why a lock on a file does not keep another one out; None where it does."""
    with open(path, "w") as one, open(path, "w") as other:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"cannot lock files ({error.strerror})"
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return "a lock keeps nobody out"


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that a path lies on, as the kernel calls it."""
    best, kind = "", "unknown"
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return kind
    for _, point, what, *_ in rows:
        point = point.replace("\\040", " ")
        if (f"{path}/").startswith(f"{point.rstrip('/')}/") and len(point) >= len(best):
            best, kind = point, what
    return kind


def check_limits() -> list[Finding]:
    """Limits of this process, which its ranks inherit."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    words = f"{_limit(files)} open files, {_limit(locked, GIB, ' GiB')} of locked memory"
    out = [Finding("limits", "ok", words)]
    if files != resource.RLIM_INFINITY and files < FILES_WATCH:
        room = most_files == resource.RLIM_INFINITY or most_files >= FILES_WATCH
        todo = f"ulimit -n {FILES_WATCH * 16 if most_files < 0 else min(most_files, FILES_WATCH * 16)}"
        todo = todo if room else "have nofile raised in /etc/security/limits.conf (and in slurmd's unit)"
        out.append(Finding("limits", "warning", f"only {files:,} open files", todo))
    if list(Path("/sys/class/infiniband").glob("*")) and locked != resource.RLIM_INFINITY:
        todo = "ulimit -l unlimited; under Slurm: LimitMEMLOCK=infinity in slurmd's unit"
        words = f"only {_limit(locked, GIB, ' GiB')} of locked memory, and InfiniBand registers its buffers in it"
        out.append(Finding("limits", "bad", words, todo))
    return out


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{value:,}" if unit == 1 else f"{value / unit:.3g}{name}"


def check_shm(place: Path = Path("/dev/shm")) -> list[Finding]:
    """Writes to shared memory, by which NCCL, gloo and data loaders talk within a machine."""
    todo = "mount a tmpfs there; docker: --shm-size=16g (or --ipc=host)"
    try:
        size = os.statvfs(place)
        with tempfile.TemporaryFile(dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, SHM_TRY)
    except OSError as error:
        return [Finding("shared memory", "bad", f"{place} cannot be written ({error.strerror})", todo)]
    whole, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    words = f"{place}: {free / GIB:.3g} of {whole / GIB:.3g} GiB free"
    if free < SHM_WATCH:
        return [Finding("shared memory", "warning", words, todo)]
    return [Finding("shared memory", "ok", words)]


def stale_locks() -> list[Finding]:
    """Locks that a killed build of a DeepSpeed op has left: every later process that wants the op waits for ever."""
    roots = extension_folders()
    locks = [lock for root in roots for depth in ("lock", "*/lock", "*/*/lock") for lock in root.glob(depth)]
    out = []
    for lock in sorted(set(locks)):
        idle_s = _idle(lock)
        if idle_s > BUILD_S:
            words = f"{lock}: a build that was killed {idle_s / 3600:.1f} h ago; whoever needs it waits for ever"
            out.append(Finding("build lock", "bad", words, f"rm '{lock}'"))
        else:
            words = f"{lock}: a build is at work, or was killed {idle_s:.0f} s ago"
            out.append(Finding("build lock", "warning", words, f"if nothing compiles any more: rm '{lock}'"))
    return out or [Finding("build lock", "ok", f"none in {', '.join(map(str, roots))}")]


def extension_folders() -> list[Path]:
    """Where torch builds C++ extensions, DeepSpeed's ops among them."""
    if told := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(told)]
    return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"]


def _idle(lock: Path) -> float:
    """Seconds since anything in a build's folder was last written."""
    newest = 0.0
    for path in lock.parent.rglob("*"):
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:  # a compiler's, gone by now
            continue
    return max(0.0, time.time() - newest)


def check_schedulers() -> list[Finding]:
    """Slurm and MPI: asked, where they are here."""
    return [_slurm(), _mpi()]


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "ok", "not on this machine; jobs cannot be submitted from here")
    works, said = _ask("sinfo", "-h", "-o", "%R")
    if not works:
        todo = "is SLURM_CONF right, and slurmctld up? (scontrol ping)"
        return Finding("Slurm", "warning", f"does not answer: {said}", todo)
    partitions = ", ".join(sorted(set(said.split()))) or "none"
    return Finding("Slurm", "ok", f"{_ask('sinfo', '--version')[1]}, partitions {partitions}")


def _mpi() -> Finding:
    if shutil.which("mpirun") is None:
        return Finding("MPI", "ok", "not on this machine; torchrun starts ranks")
    version = (_ask("mpirun", "--version")[1] or "mpirun").splitlines()[0]
    works, _ = _ask("mpirun", "-n", "1", "true")
    if works:
        return Finding("MPI", "ok", f"{version}, starts processes")
    as_root = os.getuid() == 0 and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ
    todo = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or do not be root"
    todo = todo if as_root else "run `mpirun -n 1 true` to see why"
    return Finding("MPI", "warning", f"{version}: cannot start a process", todo)


def _ask(*command: str) -> tuple[bool, str]:
    """(whether a command ends well, what it prints; where it does not, the last line of why)."""
    # As in launcher.backends.process: mpirun would look for GPUs by way of X displays, and could wait there for ever.
    environment = {"HWLOC_COMPONENTS": "-gl", **os.environ}
    try:
        said = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {ASK_S:.0f} s"
    except OSError as error:
        return False, str(error.strerror)
    if said.returncode:
        return False, ((said.stderr or said.stdout).strip().splitlines() or [f"exit code {said.returncode}"])[-1]
    return True, said.stdout.strip()
