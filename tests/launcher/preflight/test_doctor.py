"""`vernier doctor` and what a preflight judges by: real checks of this machine; canned words only of GPUs."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, lines
from faults.running import processes
from rich.console import Console

from configs.errors import EXIT_DONE, EXIT_FAILED, DataError
from launcher.preflight import bandwidth
from launcher.preflight.bandwidth import rings
from launcher.preflight.channel import node_names, who_am_i
from launcher.preflight.doctor import _ranks_findings, run_doctor
from launcher.preflight.gpu import gpu_facts, gpu_findings, parse_xids
from launcher.preflight.judge import better, judge
from launcher.preflight.machine import check_folder, check_shm, file_system, stale_locks
from launcher.preflight.node import config_digest

# What nvidia-smi prints of two sound GPUs, and of one that is none of what it should be.
SOUND = """0, NVIDIA H100 80GB HBM3, GPU-aa, 00000000:19:00.0, 550.54.15, 81559, 4, 0, 0, No, 0x0000000000000001
1, NVIDIA H100 80GB HBM3, GPU-bb, 00000000:3B:00.0, 550.54.15, 81559, 4, 0, [N/A], [N/A], 0x0000000000000004
"""
SICK = """0, NVIDIA A100-SXM4-40GB, GPU-cc, 00000000:07:00.0, 535.1, 40960, 39120, 97, 2, Yes, 0x0000000000000048
"""
DMESG = """[    0.000000] Linux version 6.1
[  900.100000] NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 1000.500000] NVRM: Xid (PCI:0000:07:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 2000.500000] NVRM: Xid (PCI:0000:07:00): 31, pid=77, name=python, Ch 00000008
"""


def fake(folder: Path, name: str, script: str) -> None:
    """A command of this name, put first on the PATH by `tools`."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def says(folder: Path, printed: str, log: str = "") -> None:
    (folder / "printed").write_text(printed)
    (folder / "log").write_text(log)
    fake(folder, "nvidia-smi", f"cat {folder}/printed")
    fake(folder, "dmesg", f"cat {folder}/log")


def test_sound_gpus_are_read_with_what_they_do_not_tell(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(tools, SOUND)
    facts = gpu_facts()
    assert [gpu["name"] for gpu in facts["gpus"]] == ["NVIDIA H100 80GB HBM3"] * 2
    assert [gpu["ecc_uncorrected"] for gpu in facts["gpus"]] == [0, None]
    assert facts["gpus"][0]["driver"] == "550.54.15"
    assert gpu_findings(facts) == ([], [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu["index"] for gpu in gpu_facts()["gpus"]] == [1]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [gpu["index"] for gpu in gpu_facts(local_rank=1)["gpus"]] == [1]


def test_a_sick_gpu_is_described(tools: Path) -> None:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    first, second = min(3600.0, 0.8 * uptime), min(1800.0, 0.4 * uptime)  # ago, on a machine that may just be up
    stamped = DMESG.replace("1000.500000", f"{uptime - first:.6f}").replace("2000.500000", f"{uptime - second:.6f}")
    says(tools, SICK, stamped)
    bad, watch = gpu_findings(gpu_facts())
    assert bad == [
        "GPU 0 has 2 uncorrected ECC errors; reset it",
        "GPU 0 could not remap a memory row; it is to be replaced",
        "GPU 0 is slowed down by its hardware",
        "GPU 0 is slowed down by its hardware: too hot",
        "GPU 0 is not idle (39,120 MiB in use, busy 97 % of the time)",
        f"Xid 79 at PCI 0000:07:00 {first / 3600:.1f} h ago: fallen off the bus",
    ]
    assert watch == [f"Xid 31 at PCI 0000:07:00 {second / 3600:.1f} h ago"]


def test_xids_of_long_ago_do_not_count() -> None:
    assert [xid.number for xid in parse_xids(DMESG, 2100.0)] == [79, 79, 31]
    assert [xid.number for xid in parse_xids(DMESG, 24 * 3600 + 1500.0)] == [31]


def test_a_driver_that_does_not_know_a_field_is_asked_without_it(tools: Path) -> None:
    known = SOUND.replace("No, ", "").replace("[N/A], 0x", "0x")
    (tools / "printed").write_text(known)
    unknown = 'Field "remapped_rows.failure" is not a valid field to query.'
    fake(tools, "nvidia-smi", f"case \"$1\" in *remapped*) echo '{unknown}'; exit 2;; esac; cat {tools}/printed")
    assert len(gpu_facts()["gpus"]) == 2


def test_a_driver_that_fails_makes_a_bad_node(tools: Path) -> None:
    fake(tools, "nvidia-smi", 'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the driver."; exit 9')
    bad, _ = gpu_findings(gpu_facts())
    assert bad == ["nvidia-smi fails: NVIDIA-SMI has failed because it couldn't communicate with the driver."]


def told(rank: int, **more: object) -> dict:
    """What a fit node has told."""
    return {
        "rank": rank,
        "phase": "done",
        "at": "all",
        "unreached": None,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "commit": "abc"},
        "folder": {"seconds": 0.01},
        "sees": True,
        "clock": {"behind_s": 0.0, "within_s": 0.001},
        "gpu": {},
        "gpu_count": 8,
        "speed": {"flops": 1e12 * (1 + rank / 100), "kind": "H100"},
        "exchange": {"pairs": {"left": 1e9, "right": 1e9}},
        **more,
    }


def judged(*facts: dict, **options: object):
    """The verdict on nodes n0, n1, …"""
    found = {rank: told(rank) | one for rank, one in enumerate(facts)}
    return judge(found, [f"n{rank}" for rank in range(len(facts))], 60, **options)  # type: ignore[arg-type]


def test_fit_nodes_are_good() -> None:
    verdict = judged({}, {}, {}, {})
    assert verdict.good
    assert verdict.watch == []
    assert verdict.shares["n3"]["speed"] == pytest.approx(1.03 / 1.01, abs=0.001)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"speed": {"flops": 5e11, "kind": "H100"}}, "slow: 500.0 GFLOP/s, 50 % of the others' median (1.0 TFLOP/s)"),
        ({"exchange": {"pairs": {"a": 5e8, "b": 4e8}}}, "slow: 0.50 GB/s, 50 % of the others' median (1.00 GB/s)"),
        ({"folder": {"error": "cannot be written (Read-only file system)"}}, "Read-only file system"),
        ({"versions": {"python": "3.11.7", "torch": "2.6.0", "commit": "abc"}}, "has torch 2.6.0, the others 2.13.0"),
        ({"gpu_count": 7}, "has 7 GPUs, the others have 8"),
        ({"speed": {"flops": 1e12, "kind": "A100"}}, "computes on A100, the others on H100"),
        ({"sees": False}, "does not see what the first node wrote"),
        ({"clock": {"behind_s": 90.0, "within_s": 0.0}}, "its clock is 90.0 s behind"),
        ({"phase": "ready", "at": "the import of torch"}, "did not finish: it hangs or crawls after"),
        ({"unreached": "no answer at a:1"}, "cannot reach the first node: no answer at a:1"),
        ({"error": "RuntimeError: broken", "phase": "done"}, "RuntimeError: broken"),
    ],
)
def test_a_node_that_fails_or_lags_is_named_with_why_and_no_other(facts: dict, why: str) -> None:
    verdict = judged({}, {}, facts, {})
    assert [entry["node"] for entry in verdict.bad] == ["n2"]
    assert why in verdict.bad[0]["why"]
    assert [entry["node"] for entry in verdict.slow] == (["n2"] if why.startswith("slow") else [])


def test_a_commit_that_is_not_known_is_no_reason() -> None:
    unknown = {"versions": {"python": "3.11.7", "torch": "2.13.0", "commit": "unknown"}}
    assert judged(unknown, unknown, {}).good
    other = {"versions": {"python": "3.11.7", "torch": "2.13.0", "commit": "def"}}
    assert [entry["node"] for entry in judged(unknown, {}, {}, other, unknown).bad] == ["n3"]


def test_an_exchange_that_hangs_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(bandwidth, "exchange_facts", lambda *_, **__: over.wait(60))
    try:
        assert bandwidth.exchange_within(limit_s=0.2) == {"error": "no answer within 0 s"}
    finally:
        over.set()
    monkeypatch.setattr(bandwidth, "exchange_facts", lambda *asked, look: {"pairs": {}, "look": look})
    assert bandwidth.exchange_within("store", look=2) == {"pairs": {}, "look": 2}


def test_a_node_that_is_silent_is_named() -> None:
    verdict = judge({0: told(0), 2: told(2)}, ["n0", "n1", "n2"], 60)
    assert [entry["node"] for entry in verdict.bad] == ["n1"]
    assert "did not answer within 60 s" in verdict.bad[0]["why"]


def test_neighbours_of_a_slow_link_are_not_blamed() -> None:
    slow, fast = 1e8, 1e9
    pairs = [{"n3": fast, "n1": slow}, {"n0": slow, "n2": slow}, {"n1": slow, "n3": fast}, {"n2": fast, "n0": fast}]
    verdict = judged(*({"exchange": {"pairs": one}} for one in pairs))
    assert [entry["node"] for entry in verdict.bad] == ["n1"]


def test_where_nobody_reaches_the_first_node_nobody_is_named() -> None:
    verdict = judged({}, {"unreached": "no answer at a:1"}, {"unreached": "no answer at a:1"})
    assert verdict.bad == []
    assert not verdict.good
    assert "MASTER_ADDR" in str(verdict.failed)


def test_a_node_between_is_worth_a_word_and_stays() -> None:
    verdict = judged({}, {}, {"speed": {"flops": 7e11, "kind": "H100"}})
    assert verdict.good
    assert [entry["node"] for entry in verdict.watch] == ["n2"]


def test_too_few_gpus_are_told_by_the_number_asked_for() -> None:
    assert judged({}, {}, gpus=8).good
    assert [entry["node"] for entry in judged({"gpu_count": 0}, {"gpu_count": 0}, gpus=1).bad] == ["n0", "n1"]


def test_what_is_slow_is_slow_twice() -> None:
    once = {"speed": {"flops": 4e11, "kind": "H100"}, "exchange": {"pairs": {"a": 1e9, "b": 1e8}}}
    again = {"speed": {"flops": 9e11, "kind": "H100"}, "exchange": {"pairs": {"a": 9e8, "b": 9e8}}}
    found = better(once, again)
    assert found["speed"]["flops"] == 9e11
    assert found["exchange"]["pairs"] == {"a": 1e9, "b": 9e8}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_all_neighbours_meet_once_and_nobody_is_in_two_pairs_at_a_time(count: int) -> None:
    for one_after_another in (False, True):
        groups = rings(count, one_after_another=one_after_another)
        met = [frozenset(pair) for group in groups for pair in group]
        assert len(met) == len(set(met)) == (count if count > 2 else 1)
        for group in groups:
            assert len({node for pair in group for node in pair}) == 2 * len(group)
        assert one_after_another or len(groups) <= 3


def test_a_task_finds_out_who_it_is() -> None:
    slurm = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "17"}
    slurm |= {"SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "2", "SLURMD_NODENAME": "gpu7"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    who = who_am_i(slurm)
    assert (who.node, who.rank, who.world, who.attempt) == ("gpu7", 2, 3, "17-2.1")
    assert who.address == ("10.0.0.1", 29500)
    assert node_names(who, {})[2] == "gpu7"
    alone = who_am_i({})
    assert (alone.node, alone.rank, alone.world, alone.address) == (socket.gethostname(), 0, 1, None)


def test_a_file_that_differs_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "config.yaml").write_text("a: 1")
    before = config_digest(tmp_path)
    (tmp_path / "jobs" / "train.sbatch").write_text("#!/bin/sh")
    assert config_digest(tmp_path) != before


def test_a_preflight_of_one_process_writes_its_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.preflight", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "no data was exchanged: there is only one node" in done.stdout
    report = json.loads((tmp_path / "preflight.json").read_text())
    assert report["nodes"][socket.gethostname()]["speed"]["flops"] > 0
    assert [event["kind"] for event in lines(tmp_path / "events.jsonl")] == ["preflight"]


def test_a_node_that_has_a_version_and_cannot_import_it_is_bad_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "transformers"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('cut short by the file server')\n")
    environment = {**os.environ, "PYTHONPATH": f"{broken.parent}:{ROOT}"}
    command = [sys.executable, "-m", "launcher.preflight", str(tmp_path / "run")]
    (tmp_path / "run").mkdir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    (bad,) = json.loads((tmp_path / "run" / "preflight.json").read_text())["bad"]
    assert bad["why"] == "cannot import what ranks need: RuntimeError: cut short by the file server"


def test_a_lock_that_a_killed_build_left_is_named_with_how_to_remove_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [one.state for one in stale_locks()] == ["ok"]
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert [one.state for one in stale_locks()] == ["warning"]  # a build may be at work
    long_ago = time.time() - 7200
    os.utime(lock, (long_ago, long_ago))
    (found,) = stale_locks()
    assert found.state == "bad"
    assert f"{lock}: a build that was killed 2.0 h ago" in found.said
    assert found.todo == f"rm '{lock}'"


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    assert {one.name for one in check_folder(tmp_path) if one.state == "bad"} <= {"disk"}
    assert list(tmp_path.iterdir()) == []
    (found,) = check_folder(Path("/proc/runs"))
    assert found.state == "bad"
    assert found.said.startswith("/proc cannot be written")
    assert [one.state for one in check_shm(Path("/proc"))] == ["bad"]


def test_the_file_system_of_a_path_is_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("d / ext4 rw 0 0\ns /home nfs4 rw 0 0\nt /home/me/scratch tmpfs rw 0 0\n")
    assert file_system(Path("/home/me/runs"), mounts) == "nfs4"
    assert file_system(Path("/home/me/scratch/runs"), mounts) == "tmpfs"
    assert file_system(Path("/homes"), mounts) == "ext4"


def test_doctor_tries_this_machine_and_tells_a_run_s_last_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: it\n")
    report = {"good": False, "job": "17", "bad": [{"node": "n3", "why": "slow"}], "failed": None, "nodes": {}}
    (run / "preflight.json").write_text(json.dumps(report))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # The exit code is of the whole machine: memlock, shared memory, clocks, and whatever else it has.
    assert run_doctor(run, json_out=True, console=Console(file=io.StringIO())) in (EXIT_DONE, EXIT_FAILED)
    found = json.loads(capsys.readouterr().out)
    ranks = [check["said"] for check in found["checks"] if check["name"] == "2 ranks"]
    assert "joined by gloo: all-reduce" in ranks[0]
    assert all("slow" in said for said in ranks[1:])
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["environment"]["said"].startswith("Python 3.")
    assert (checks["preflight"]["state"], checks["preflight"]["said"]) == ("warning", "n3 of job 17: slow")
    assert "--exclude-bad" in checks["preflight"]["todo"]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "preflight.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="who dies with whom is told to Linux's kernel")
def test_ranks_end_with_a_doctor_that_is_interrupted(tmp_path: Path) -> None:
    """By Ctrl-C, which its ranks do not get, being in a session of their own."""
    code = "import sys, pathlib, launcher.preflight.doctor as doctor; doctor.check_ranks(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, stderr=-3) as doctor:
        wait_until(lambda: len(of_preflight(tmp_path)) >= 2)  # the agent, and a rank at its start
        doctor.send_signal(signal.SIGINT)
        assert doctor.wait(30) != 0
    wait_until(lambda: not of_preflight(tmp_path))


def of_preflight(folder: Path) -> list[int]:
    return [pid for pid, one in processes(folder).items() if "launcher.preflight" in one.command]


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_gpu_has_a_line_with_its_speed() -> None:
    report = {"bad": [], "failed": None, "all_reduce": None, "nodes": {"n0": told(0, exchange={"left_out": "alone"})}}
    (found,) = _ranks_findings("1 rank", report)
    assert (found.state, found.said) == ("ok", "1,000 GFLOP/s; with one there is nobody to join")


def test_doctor_ends_with_1_where_something_is_bad_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import launcher.preflight.doctor as doctor

    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for slow in ("check_imports", "check_ranks", "check_schedulers"):  # tried in the test above
        monkeypatch.setattr(doctor, slow, lambda *_: [])
    out = io.StringIO()
    assert run_doctor(None, json_out=False, console=Console(file=out, width=300)) == EXIT_FAILED
    assert f"build lock: rm '{lock}'" in out.getvalue()
    assert "1 bad" in out.getvalue()


def test_doctor_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        run_doctor(tmp_path, json_out=False, console=Console())
