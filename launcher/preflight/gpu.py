"""What nvidia-smi and the kernel's log tell of this machine's GPUs: there, idle, sound, not slowed down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ASK_S = 30.0  # nvidia-smi that hangs is a sick driver
IDLE_PATIENCE_S = 4.0  # what an earlier attempt had running may still be going
BUSY_PERCENT = 20  # of the time with a kernel at work; a display server has a few
BUSY_MIB = 2048  # somebody's; a driver and its daemons hold some hundred
RECENT_S = 24 * 3600  # a GPU is reset without a reboot, and old lines stay in the log

# What may be asked for, besides the index and the name; a driver that does not know one is asked without it.
QUERY = (
    "index",
    "name",
    "uuid",
    "pci.bus_id",
    "driver_version",
    "memory.total",
    "memory.used",
    "utilization.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.failure",
    "clocks_throttle_reasons.active",
)
_UNKNOWN_FIELD = re.compile(r'[Ff]ield "([^"]+)" is not a valid field')

# Bits of clocks_throttle_reasons.active (nvml.h, nvmlClocksEventReasons) that mean broken hardware or its surroundings.
SLOWED = {
    0x08: "slowed down by its hardware",
    0x40: "slowed down by its hardware: too hot",
    0x80: "slowed down by its hardware: the power supply asks for it",
}
HOT = 0x20  # the driver slows it down, so that it does not get too hot

# Of "XID Errors" in NVIDIA's documentation, those that are about hardware, or need a reset; others are a program's.
HARDWARE_XIDS = {
    48: "double-bit ECC error",
    62: "its microcontroller halted",
    64: "a row could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    92: "many single-bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "its GSP does not answer",
    120: "its GSP has an error",
    140: "unrecovered ECC error",
}
_XID = re.compile(r"^\[\s*(\d+\.\d+)\].*NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)")


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it; None where it does not tell."""

    index: int
    name: str
    bus: str | None
    driver: str | None
    memory_mib: float | None
    used_mib: float | None
    busy_percent: float | None
    ecc_uncorrected: int | None
    remap_failed: bool
    throttle: int


@dataclass(frozen=True)
class Xid:
    """An error that the driver has told the kernel."""

    bus: str
    number: int
    age_s: float


def gpu_facts(local_rank: int | None = None) -> dict[str, Any]:
    """`gpus`, `xids` (None where the log may not be read), and `error` where there is a driver that does not answer.

    GPUs that CUDA_VISIBLE_DEVICES hides are left out. Empty on a machine without nvidia-smi.

    Args:
        local_rank: only the GPU of this task, where others at work use the rest.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    end = time.monotonic() + IDLE_PATIENCE_S
    while True:
        gpus, error = ask_nvidia_smi()
        gpus = gpus if local_rank is None else gpus[local_rank : local_rank + 1]
        if error is not None or time.monotonic() > end or not any(busy(gpu) for gpu in gpus):
            break
        time.sleep(0.5)
    if error is not None:
        return {"gpus": [], "xids": None, "error": error}
    xids = kernel_xids()
    shown = None if xids is None else [asdict(x) for x in xids if any(_same(x.bus, gpu.bus) for gpu in gpus)]
    return {"gpus": [asdict(gpu) for gpu in gpus], "xids": shown}


def ask_nvidia_smi() -> tuple[list[Gpu], str | None]:
    """(the GPUs that a process here may use, why they cannot be told)."""
    fields = list(QUERY)
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
        except subprocess.TimeoutExpired:
            return [], f"nvidia-smi does not answer within {ASK_S:.0f} s"
        except OSError as error:
            return [], f"nvidia-smi cannot be started ({error.strerror})"
        unknown = _UNKNOWN_FIELD.search(said.stdout + said.stderr)
        if unknown is None or unknown.group(1) not in fields:
            break
        fields.remove(unknown.group(1))
    if said.returncode:
        lines = (said.stdout + said.stderr).strip().splitlines()
        return [], f"nvidia-smi fails: {lines[0] if lines else f'exit code {said.returncode}'}"
    return visible(parse_gpus(said.stdout, fields)), None


def parse_gpus(text: str, fields: list[str]) -> list[Gpu]:
    """The GPUs in what `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits` prints."""
    found = []
    for line in text.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(fields):
            continue
        row = dict(zip(fields, values, strict=True))
        reasons = row.get("clocks_throttle_reasons.active", "")
        ecc = _number(row.get("ecc.errors.uncorrected.volatile.total"))
        found.append(
            Gpu(
                index=int(row["index"]),
                name=row.get("name", "GPU"),
                bus=row.get("pci.bus_id"),
                driver=row.get("driver_version"),
                memory_mib=_number(row.get("memory.total")),
                used_mib=_number(row.get("memory.used")),
                busy_percent=_number(row.get("utilization.gpu")),
                ecc_uncorrected=None if ecc is None else int(ecc),
                remap_failed=row.get("remapped_rows.failure", "").lower() in ("yes", "1"),
                throttle=int(reasons, 16) if re.fullmatch(r"0x[0-9A-Fa-f]+", reasons) else 0,
            )
        )
    return found


def _number(text: str | None) -> float | None:
    """None for [N/A], [Not Supported] and the like."""
    try:
        return float(text or "")
    except ValueError:
        return None


def visible(gpus: list[Gpu]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names by number; all where it does not, or names them otherwise."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return gpus
    words = [word.strip() for word in named.split(",") if word.strip()]
    if not all(word.isdigit() for word in words):
        return gpus
    return [gpu for gpu in gpus if str(gpu.index) in words]


def busy(gpu: Gpu) -> bool:
    """Whether somebody is using it."""
    return (gpu.used_mib or 0) > BUSY_MIB or (gpu.busy_percent or 0) > BUSY_PERCENT


def kernel_xids() -> list[Xid] | None:
    """The driver's errors of the last day, oldest first; None where the kernel's log may not be read."""
    try:
        said = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=10, check=False)
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return None
    return parse_xids(said.stdout, uptime)


def parse_xids(text: str, uptime_s: float) -> list[Xid]:
    """The recent Xid lines in what `dmesg` prints, each line beginning with its seconds since the start."""
    found = []
    for line in text.splitlines():
        match = _XID.match(line)
        if match is not None:
            found.append(Xid(match.group(2), int(match.group(3)), round(uptime_s - float(match.group(1)), 1)))
    return [xid for xid in found if xid.age_s <= RECENT_S]


def _same(one: str, other: str | None) -> bool:
    """Whether two names of a PCI device mean the same: `0000:3b:00` and `00000000:3B:00.0`."""
    if other is None:
        return True
    own, its = (re.sub(r"\.\d$", "", name).lower().split(":")[-2:] for name in (one, other))
    return own == its


def gpu_findings(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what is wrong with a node's GPUs, what is to be looked at), from `gpu_facts`."""
    bad = [facts["error"]] if facts.get("error") else []
    watch: list[str] = []
    for fact in facts.get("gpus", []):
        gpu = Gpu(**fact)
        name = f"GPU {gpu.index}"
        if gpu.ecc_uncorrected:
            count = gpu.ecc_uncorrected
            bad.append(f"{name} has {count} uncorrected ECC {'error' if count == 1 else 'errors'}; reset it")
        if gpu.remap_failed:
            bad.append(f"{name} could not remap a memory row; it is to be replaced")
        bad += [f"{name} is {words}" for bit, words in SLOWED.items() if gpu.throttle & bit]
        if gpu.throttle & HOT:
            watch.append(f"{name} is slowed down by its driver: hot")
        if busy(gpu):
            used, percent = gpu.used_mib or 0, gpu.busy_percent or 0
            bad.append(f"{name} is not idle ({used:,.0f} MiB in use, busy {percent:.0f} % of the time)")
    for fact in facts.get("xids") or []:
        xid = Xid(**fact)
        said = f"Xid {xid.number} at PCI {xid.bus} {xid.age_s / 3600:.1f} h ago"
        if xid.number in HARDWARE_XIDS:
            bad.append(f"{said}: {HARDWARE_XIDS[xid.number]}")
        else:
            watch.append(said)
    return list(dict.fromkeys(bad)), list(dict.fromkeys(watch))
