"""`python -m launcher.preflight RUN`: at a job's start, one task a node looks whether every node is fit for the run.

Each task looks at its own node and tells; the first one gathers, judges and names those that are bad. Starts nothing,
resubmits nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.console import tell
from configs.devices import gpu_count
from configs.errors import EXIT_DONE, EXIT_FAILED, VernierError
from configs.files.atomic import write_atomic
from configs.process import die_with_parent
from configs.run.directory import RunDir
from launcher.preflight.bandwidth import EXCHANGE_S, exchange_within
from launcher.preflight.channel import PHASES, Board, Who, connect, node_names, who_am_i
from launcher.preflight.gpu import gpu_facts
from launcher.preflight.imports import import_facts
from launcher.preflight.judge import LAG, Verdict, best_pair, better, judge, lagging
from launcher.preflight.node import clock_facts, folder_facts, speed_facts, versions

LIMIT_S = 120.0  # a first import of torch from a cold file server takes a minute
GRACE_S = 5.0  # each task waits so much longer than the one before, until it judges in its place
IMPORT_SHARE = 0.4  # of the time: torch is imported once more, then from memory, and all is measured
LINGER_S = 5.0
WRITING_S = 30.0  # for another task to have written the verdict down
AFTER_S = 3 * (EXCHANGE_S + GRACE_S) + WRITING_S  # the exchange, and all waiting for others to judge and write
LOOKS = 3  # at speed, until a node is called slow: whatever else runs there takes its share now and then
TURNS_S = 4.0  # a node: its turns, and that much again
CHECK_IN = "first.txt"  # what the first task writes and all others look for
SEES_S = 10.0  # a network file system may hold on to what it knows of a folder for some seconds


@dataclass(frozen=True)
class Options:
    """How to look."""

    one_after_another: bool
    collective: bool
    limit_s: float
    gpus: int | None


def parse(arguments: list[str]) -> tuple[Path, Options]:
    """(run directory, options) of the command line."""
    parser = argparse.ArgumentParser(prog="python -m launcher.preflight", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run, on the shared file system")
    parser.add_argument("--one-after-another", action="store_true", help="nodes take turns, as those of one machine do")
    parser.add_argument("--collective", action=argparse.BooleanOptionalAction, default=True, help="exchange data too")
    parser.add_argument(
        "--timeout", type=float, default=LIMIT_S, metavar="S", help="for a node to answer (%(default)s)"
    )
    parser.add_argument("--gpus", type=int, default=None, metavar="N", help="that each node should have")
    given = parser.parse_args(arguments)
    return given.run, Options(given.one_after_another, given.collective, given.timeout, given.gpus)


def preflight(run_dir: Path, options: Options) -> int:
    """This task's part; the exit code: 1 where a node is bad (as far as this task knows)."""
    begun = time.monotonic()
    who = who_am_i()
    # Whatever hangs here must not hold the job for ever: this ends the process, with its stacks.
    faulthandler.dump_traceback_later(options.limit_s + TURNS_S * who.world + AFTER_S, exit=True)
    board = Board(run_dir / "preflight" / who.attempt, who)
    board.tell(node=who.node, rank=who.rank, pid=os.getpid(), time=time.time(), machine=machine_id())
    board.tell(phase="started", at="its start")
    connect(board, options.limit_s / 2)
    names = node_names(who) if who.rank == 0 else []  # the others hear them from it
    _look(board, run_dir, options, begun)
    members, names = _members(board, names, options, begun)
    if members is not None and who.rank in members:
        _together(board, members, names, options)
        board.tell(phase="done", at="all")
    return _end(board, run_dir, names, members, options, begun)


def _look(board: Board, run_dir: Path, options: Options, begun: float) -> None:
    """All that a node finds out by itself. An error that nobody thought of is told, and ends no preflight."""
    who = board.who
    try:
        board.tell(unreached=board.problem, versions=versions(run_dir), at="its versions")
        if not run_dir.is_dir():
            board.tell(folder={"error": f"is not there ({run_dir})"}, at="its folder")
        else:
            board.tell(folder=folder_facts(board.folder, who.node), at="its folder")
            board.tell(clock=clock_facts(board.folder, who.node), at="its clock")
        if who.rank == 0:
            board.say(CHECK_IN.removesuffix(".txt"), who.node)
        if "error" not in board.told["folder"]:
            board.tell(sees=_sees(board), at="the folder")
        left_s = begun + options.limit_s - time.monotonic()
        board.tell(imports=import_facts(run_dir, left_s * IMPORT_SHARE), at="importing what ranks need")
        board.tell(gpu=gpu_facts(who.local_rank), gpu_count=gpu_count(), at="its GPUs")
        import torch  # noqa: F401  # before the turns: it takes seconds of everybody's time

        board.tell(phase="ready", at="the import of torch", turns=_takes_turns(board, options))
        if board.told["turns"]:  # whoever still imports would make the others slow
            board.wait_for("ready", list(range(who.world)), begun + options.limit_s / 2)
        speed = speed_facts(_lock(board), who.local_rank)
        board.tell(speed=speed, phase="measured", at="its matrix products")
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        board.tell(error=said, phase="done", at="an error")


def machine_id() -> str:
    """Tells machines apart, whatever their nodes are called: the kernel's number of this start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _takes_turns(board: Board, options: Options) -> bool:
    """Whether this node shares its machine and measures when the others there do not. GPUs are not shared."""
    if options.one_after_another or gpu_count() or board.who.world == 1:
        return options.one_after_another
    here = [rank for rank, facts in board.read().items() if facts.get("machine") == board.told["machine"]]
    return len(here) > 1


def _lock(board: Board) -> Path | None:
    """The folder itself: a file in it would be missing where the first node cannot write any."""
    return board.folder if board.told.get("turns") else None


def _sees(board: Board) -> bool | None:
    """Whether this node sees the file that the first one wrote; None where that one may not have written any."""
    deadline = time.monotonic() + SEES_S
    while time.monotonic() < deadline:
        if (board.folder / CHECK_IN).is_file():
            return True
        os.listdir(board.folder)  # makes NFS look again
        time.sleep(0.1)
    first = board.read().get(0, {})
    return False if first.get("folder", {}).get("seconds") is not None else None


def _members(board: Board, names: list[str], options: Options, begun: float) -> tuple[list[int] | None, list[str]]:
    """(who goes on: those who have measured when all have, or when the time is up; names of the nodes, by rank).

    Who goes on is None where the first task is silent.
    """
    who = board.who
    end = begun + options.limit_s + (TURNS_S * who.world if board.told.get("turns") else 0)
    if who.rank == 0:
        found = board.wait_for("measured", list(range(who.world)), end)
        members = sorted(rank for rank, facts in found.items() if facts.get("phase") == "measured")
        names = [found.get(rank, {}).get("node", name) for rank, name in enumerate(names)]
        turns = any(facts.get("turns") for facts in found.values())
        board.say("members", {"members": members, "names": names, "turns": turns})
        board.tell(turns=turns)  # an exchange is ordered the same way by all
        return members, names
    heard = board.hear("members", end + GRACE_S)
    if heard is None:
        return None, names
    board.tell(turns=heard["turns"])
    return [int(rank) for rank in heard["members"]], list(heard["names"])


def _together(board: Board, members: list[int], names: list[str], options: Options) -> None:
    """The exchange of data; and all measurements again where a node looks slow, since others may be at work."""
    board.tell(at="the beginning of the exchange")
    end = time.monotonic() + EXCHANGE_S + GRACE_S
    first = _exchange(board, members, names, options, look=1)
    board.tell(exchange=first, looks=1, phase="exchanged", at="the exchange")
    for look in range(2, LOOKS + 1):
        if board.who.rank == members[0]:
            found = board.wait_for("exchanged", members, end, looks=look - 1)
            board.say(f"look-{look}", any(share < LAG for _, _, share, _ in lagging(found)))
        if not board.hear(f"look-{look}", end + GRACE_S):
            return
        board.tell(at=f"the beginning of look {look}")
        look_s = TURNS_S * (board.who.world if board.told["turns"] else 1) + EXCHANGE_S + GRACE_S
        end = time.monotonic() + look_s
        faulthandler.dump_traceback_later(look_s + AFTER_S, exit=True)
        more = {"speed": speed_facts(_lock(board), board.who.local_rank)}
        more["exchange"] = _exchange(board, members, names, options, look=look)
        board.tell(**better(board.told, more), looks=look, at=f"look {look}")


def _exchange(board: Board, members: list[int], names: list[str], options: Options, *, look: int) -> dict[str, Any]:
    """What the exchange of data has found, or why there is none."""
    who = board.who
    if not options.collective:
        return {"left_out": "not asked for"}
    if who.world < 2 or len(members) < 2:
        return {"left_out": "there is only one node" if who.world < 2 else "only one node has answered"}
    if who.address is None:
        return {"left_out": "MASTER_ADDR and MASTER_PORT are not set"}
    if board.store is None:
        return {"left_out": f"the first node cannot be reached ({board.problem or 'it is gone'})"}
    if "error" in board.told.get("exchange", {}):
        return dict(board.told["exchange"])  # what is broken is not asked again; it may still be at it
    turns = bool(board.told["turns"])
    return exchange_within(board.store, members, names, who.rank, who.local_rank, look=look, one_after_another=turns)


def _end(
    board: Board, run_dir: Path, names: list[str], members: list[int] | None, options: Options, begun: float
) -> int:
    """Judges (the first task, or whoever stands in for it), writes the verdict down and says it."""
    who = board.who
    if who.rank > 0:
        silent_s = GRACE_S * who.rank if members is None else 2 * EXCHANGE_S + GRACE_S * (who.rank + 1)
        heard = board.hear("verdict", time.monotonic() + silent_s)
        if heard is not None:
            if heard["writer"] == who.rank:
                _write(run_dir, heard["report"])
                board.say("written", True)
            else:  # whoever ends badly ends all, under srun: not before the verdict is there
                board.hear("written", time.monotonic() + WRITING_S)
            board.linger([], 0)
            return EXIT_DONE if heard["report"]["good"] else EXIT_FAILED
    if members is None:
        board.tell(exchange={"left_out": "the first node is silent"}, phase="done")
        members = [rank for rank, facts in board.read().items() if facts.get("phase") in PHASES[2:]]
        names = node_names(who)
    left_s = GRACE_S if who.rank in members else 2 * EXCHANGE_S  # who took part is through when the others are
    found = board.wait_for("done", members, time.monotonic() + left_s + GRACE_S)
    names = [found.get(rank, {}).get("node", name) for rank, name in enumerate(names)]
    limit_s = options.limit_s
    verdict = judge(found, names, limit_s, gpus=options.gpus)
    report = make_report(found, names, verdict, who, time.monotonic() - begun)
    for line in lines(report):
        print(line, flush=True)
    writers = [rank for rank in members if "error" not in found.get(rank, {}).get("folder", {"error": ""})]
    writer = who.rank if who.rank in writers or not writers else writers[0]
    if writer == who.rank:
        _write(run_dir, report)
        board.say("written", True)
    board.say("verdict", {"writer": writer, "report": report})
    if writer != who.rank:
        board.hear("written", time.monotonic() + WRITING_S)
    board.linger(members, LINGER_S)
    return EXIT_DONE if verdict.good else EXIT_FAILED


def make_report(
    found: dict[int, dict[str, Any]], names: list[str], verdict: Verdict, who: Who, seconds: float
) -> dict[str, Any]:
    """What `preflight.json` holds: speeds in FLOP/s, bandwidths in bytes/s, times in seconds."""
    rates = [facts["exchange"]["all_reduce"] for facts in found.values() if "all_reduce" in facts.get("exchange", {})]
    left_out = [facts["exchange"]["left_out"] for facts in found.values() if "left_out" in facts.get("exchange", {})]
    return {
        "time": time.time(),
        "job": who.job,
        "attempt": who.attempt,
        "seconds": round(seconds, 1),
        "good": verdict.good,
        "bad": verdict.bad,
        "slow": verdict.slow,
        "watch": verdict.watch,
        "failed": verdict.failed,
        "all_reduce": min(rates) if rates else None,
        "exchange_left_out": left_out[0] if left_out else None,
        "shares": verdict.shares,
        "nodes": {names[rank]: found.get(rank, {}) for rank in range(len(names))},
    }


def lines(report: dict[str, Any]) -> list[str]:
    """A report in words: a line a node, and what concerns all."""
    wrong = {entry["node"]: entry["why"] for entry in report["bad"]}
    watch = {entry["node"]: entry["why"] for entry in report["watch"]}
    width = max(len(name) for name in report["nodes"])
    out = []
    for name, facts in report["nodes"].items():
        state = "BAD " if name in wrong else "note" if name in watch else "ok  "
        said = [wrong.get(name) or watch.get(name) or "", *_measured(facts, report["shares"].get(name, {}))]
        out.append(f"preflight: {name:{width}}  {state}  {'; '.join(one for one in said if one)}")
    if report["all_reduce"] is not None:
        out.append(f"preflight: all-reduce over all nodes: {report['all_reduce'] / 1e9:.2f} GB/s")
    if report["exchange_left_out"] is not None:
        out.append(f"preflight: no data was exchanged: {report['exchange_left_out']}")
    if report["failed"] is not None:
        out.append(f"preflight: FAILED: {report['failed']}")
    bad = ", ".join(wrong)
    out.append(f"preflight: {f'bad: {bad}' if bad else 'good' if report['good'] else 'bad'}; {report['seconds']:.1f} s")
    return out


def _measured(facts: dict[str, Any], shares: dict[str, float]) -> list[str]:
    said = []
    speed = facts.get("speed", {}).get("flops")
    if speed is not None:
        amount = f"{speed / 1e12:.1f} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.1f} GFLOP/s"
        said.append(f"{amount}{_share(shares.get('speed'))}")
    pair = best_pair(facts)
    if pair is not None:
        said.append(f"exchange {pair / 1e9:.2f} GB/s{_share(shares.get('exchange'))}")
    if "seconds" in facts.get("folder", {}):
        said.append(f"folder {1000 * facts['folder']['seconds']:.0f} ms")
    if "behind_s" in facts.get("clock", {}):
        said.append(f"clock {-facts['clock']['behind_s']:+.2f} s")
    return said


def _share(share: float | None) -> str:
    return "" if share is None else f" ({100 * share:.0f} %)"


def _write(run_dir: Path, report: dict[str, Any]) -> None:
    """Puts the report into the run, with an event; and where it is bad, says so in the run's state."""
    run = RunDir(run_dir)
    try:
        write_atomic(run_dir / "preflight.json", json.dumps(report, indent=1), durable=True)
    except OSError as error:
        print(f"preflight: {run_dir}/preflight.json cannot be written ({error.strerror})", file=sys.stderr, flush=True)
        return
    said = failure_words(report)
    run.add_event("preflight", said or f"all {len(report['nodes'])} nodes are fit", bad=report["bad"])
    if said is not None:
        run.record_failure(EXIT_FAILED, None, f"preflight: {said}")


def failure_words(report: dict[str, Any]) -> str | None:
    """Why a preflight is not good, in a line; None where it is."""
    said = [f"{entry['node']}: {entry['why']}" for entry in report["bad"]]
    said += [report["failed"]] if report["failed"] else []
    return " | ".join(said) or None


def main(arguments: list[str]) -> int:
    """Runs this task's part; the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        return preflight(*parse(arguments))
    except VernierError as error:
        tell(f"preflight: {error}", sys.stderr)
        return error.exit_code
