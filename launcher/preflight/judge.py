"""Which nodes are bad: what each told, held against the others. Arithmetic on facts; nothing is measured here."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.preflight.gpu import gpu_findings
from launcher.preflight.node import UNKNOWN

Facts = dict[str, Any]

# A rank-group goes at the pace of its slowest member. Healthy nodes of one kind are within some 10 % of one another, on
# machines that others use as well within 30 %; below this a node costs the others more than it brings.
LAG = 0.6
WATCH = 0.8  # from here on down it is worth a word
CLOCK_BAD_S = 30.0  # half of what a run's lock may be silent before another host takes it for dead
CLOCK_WATCH_S = 2.0
FOLDER_WATCH_S = 5.0  # for one MiB
FOLDER_TIMES = 20.0  # the others' median


@dataclass(frozen=True)
class Verdict:
    """What a preflight found. Each entry is {"node", "why"}; `bad` are all to be left out, those in `slow` too."""

    bad: list[dict[str, str]]
    slow: list[dict[str, str]]
    watch: list[dict[str, str]]  # not a reason to leave a node out
    failed: str | None  # what is wrong with all of them together, where no node can be named
    shares: dict[str, dict[str, float]]  # of the median of the others, by node: `speed`, `exchange`

    @property
    def good(self) -> bool:
        return not self.bad and self.failed is None


def judge(facts: dict[int, Facts], names: Sequence[str], limit_s: float, *, gpus: int | None = None) -> Verdict:
    """Who is bad.

    Args:
        facts: by rank, what each task has told.
        names: of the nodes, by rank.
        limit_s: how long was waited for those who have told nothing.
        gpus: that each node should have; None: as many as most have.
    """
    bad: list[tuple[int, str]] = []
    slow: list[tuple[int, str]] = []
    watch: list[tuple[int, str]] = []
    for rank in range(len(names)):
        if rank not in facts:
            why = f"did not answer within {limit_s:.0f} s"
            bad.append((rank, f"{why}: its shared folder cannot be written, or the node hangs or is gone"))
            continue
        its_bad, its_watch = _alone(facts[rank])
        bad += [(rank, why) for why in its_bad]
        watch += [(rank, why) for why in its_watch]
    bad += _cut_off(facts)
    bad += _unequal(facts, gpus)
    far, off = _clocks(facts)
    bad += far
    watch += [*off, *_folders(facts)]
    shares: dict[str, dict[str, float]] = {}
    for name, rank, share, said in lagging(facts):
        shares.setdefault(names[rank], {})[name] = round(share, 3)
        if share < LAG:
            slow.append((rank, said))
        elif share < WATCH:
            watch.append((rank, said))
    failed = _failed(facts, bad, slow)
    sure = {rank for rank, _ in bad}
    # A node whose exchange failed because another one's link is dead is not to blame: it exchanged with the rest.
    return Verdict(
        bad=_entries([*bad, *((rank, f"slow: {why}") for rank, why in slow)], names),
        slow=_entries(slow, names),
        watch=_entries([(rank, why) for rank, why in watch if rank not in sure], names),
        failed=failed,
        shares=shares,
    )


def lagging(facts: dict[int, Facts]) -> list[tuple[str, int, float, str]]:
    """(`speed` or `exchange`, rank, share of the others' median, that in words) of each node that has been measured."""
    return [
        (name, rank, share, f"{words(value)}, {100 * share:.0f} % of the others' median ({words(others)})")
        for name, value_of, words in (("speed", _speed, _flops), ("exchange", best_pair, _bandwidth))
        for rank, (share, value, others) in _held_against_others(facts, value_of).items()
    ]


def better(first: Facts, second: Facts) -> Facts:
    """Of two looks at a node's speed and exchange the better: what is slow is slow in all."""
    speed = max((one["speed"] for one in (first, second)), key=lambda one: one["flops"])
    before, after = first["exchange"], second["exchange"]
    pairs = {name: max(rate, after["pairs"].get(name, 0)) for name, rate in before.get("pairs", {}).items()}
    return {
        "speed": speed,
        "exchange": {**before, **after, "pairs": pairs} if pairs and "error" not in after else before,
    }


def _entries(found: list[tuple[int, str]], names: Sequence[str]) -> list[dict[str, str]]:
    """One a node, in the order of ranks."""
    by_rank: dict[int, list[str]] = {}
    for rank, why in found:
        by_rank.setdefault(rank, []).append(why)
    return [{"node": names[rank], "why": "; ".join(dict.fromkeys(by_rank[rank]))} for rank in sorted(by_rank)]


def _alone(found: Facts) -> tuple[list[str], list[str]]:
    """(what is wrong with a node by itself, what is to be looked at)."""
    bad, watch = gpu_findings(found.get("gpu", {}))
    folder = found.get("folder", {})
    if "error" in folder:
        bad.append(f"its shared folder {folder['error']}")
    elif found.get("sees") is False:
        bad.append("does not see what the first node wrote: is the folder shared with it?")
    imports = found.get("imports", {})
    if "error" in imports:
        bad.append(f"cannot import what ranks need: {imports['error']}")
    elif "slow_s" in imports:
        watch.append(f"importing what ranks need takes over {imports['slow_s']} s")
    if "error" in found:
        bad.append(str(found["error"]))
    elif found.get("phase") != "done":
        bad.append(f"did not finish: it hangs or crawls after {found.get('at', 'its start')}")
    return bad, watch


def _cut_off(facts: dict[int, Facts]) -> list[tuple[int, str]]:
    """Nodes that cannot reach the first one although others can: where nobody can, that is not their fault."""
    told = {rank: one["unreached"] for rank, one in facts.items() if rank and "unreached" in one}
    if all(told.values()):
        return []
    return [(rank, f"cannot reach the first node: {why}") for rank, why in told.items() if why]


def _unequal(facts: dict[int, Facts], gpus: int | None) -> list[tuple[int, str]]:
    """Nodes with other versions, settings or devices than most; where it is even, than the first."""
    return [*_other_versions(facts), *_other_counts(facts, gpus), *_other_kinds(facts)]


def _other_versions(facts: dict[int, Facts]) -> Iterator[tuple[int, str]]:
    told = {rank: one["versions"] for rank, one in facts.items() if "versions" in one}
    for key in sorted({key for one in told.values() for key in one}):
        known = {rank: one.get(key) for rank, one in told.items() if one.get(key) != UNKNOWN}
        usual = _most(known, lambda value: value)
        what = "reads other settings and job scripts in the run's folder" if key == "config" else f"has {key}"
        yield from ((rank, f"{what} {value}, the others {usual}") for rank, value in known.items() if value != usual)


def _other_counts(facts: dict[int, Facts], gpus: int | None) -> Iterator[tuple[int, str]]:
    counts = {rank: one["gpu_count"] for rank, one in facts.items() if "gpu_count" in one}
    wanted = gpus if gpus is not None else _most(counts, lambda one: one)
    for rank, count in counts.items():
        if wanted is not None and (count < wanted or (gpus is None and count != wanted)):
            whose = "should have" if gpus is not None else "the others have"
            yield rank, f"has {count} {'GPU' if count == 1 else 'GPUs'}, {whose} {wanted}"


def _other_kinds(facts: dict[int, Facts]) -> Iterator[tuple[int, str]]:
    kinds = {rank: one["speed"]["kind"] for rank, one in facts.items() if "kind" in one.get("speed", {})}
    usual = _most(kinds, lambda one: one)
    yield from ((rank, f"computes on {kind}, the others on {usual}") for rank, kind in kinds.items() if kind != usual)


def _most(values: dict[int, Any], of: Callable[[Any], Any]) -> Any:
    counts = Counter(of(values[rank]) for rank in sorted(values))  # the first of equals is the lowest rank's
    return counts.most_common(1)[0][0] if counts else None


def _clocks(facts: dict[int, Facts]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """(far off, off): clocks against the median of all; each was held against the file server's, to compare them."""
    behind = {rank: one["clock"] for rank, one in facts.items() if "behind_s" in one.get("clock", {})}
    if not behind:
        return [], []
    bad, watch = [], []
    middle = statistics.median(one["behind_s"] for one in behind.values())
    if len(behind) < 3:
        middle = 0.0  # of two, none is the one that is right: the file server's is
    for rank, one in behind.items():
        off = one["behind_s"] - middle
        said = f"its clock is {abs(off):.1f} s {'behind' if off > 0 else 'ahead'}"
        if abs(off) - one["within_s"] > CLOCK_BAD_S:
            bad.append((rank, said))
        elif abs(off) - one["within_s"] > CLOCK_WATCH_S:
            watch.append((rank, said))
    return bad, watch


def _folders(facts: dict[int, Facts]) -> list[tuple[int, str]]:
    """Nodes on which the shared folder takes far longer than on the others."""
    watch = []
    taken = _held_against_others(facts, lambda one: one.get("folder", {}).get("seconds"))
    for rank, (share, seconds, others) in taken.items():
        if seconds > FOLDER_WATCH_S and share > FOLDER_TIMES:
            watch.append((rank, f"writing a MiB to the shared folder took {seconds:.1f} s ({others:.1f} s elsewhere)"))
    return watch


def _held_against_others(
    facts: dict[int, Facts], value_of: Callable[[Facts], float | None]
) -> dict[int, tuple[float, float, float]]:
    """(share of the others' median, value, that median) of each rank that has a value; empty where only one has."""
    values = {rank: value for rank, one in facts.items() if (value := value_of(one)) is not None}
    found = {}
    for rank, value in values.items():
        others = [other for its, other in values.items() if its != rank]
        if others and statistics.median(others) > 0:
            middle = statistics.median(others)
            found[rank] = (value / middle, value, middle)
    return found


def _speed(found: Facts) -> float | None:
    return found.get("speed", {}).get("flops")


def best_pair(found: Facts) -> float | None:
    """Bytes a second with the better of a node's neighbours: a slow neighbour is not its own fault.

    None where all it has is one pair: of two, it cannot be told whose link is slow.
    """
    pairs = found.get("exchange", {}).get("pairs", {})
    return max(pairs.values()) if len(pairs) > 1 else None


def _failed(facts: dict[int, Facts], bad: list[tuple[int, str]], slow: list[tuple[int, str]]) -> str | None:
    """Why nodes cannot talk to each other, where no node is named for anything and so for that neither."""
    unreached = {rank: one["unreached"] for rank, one in facts.items() if one.get("unreached")}
    errors = {rank: one["exchange"]["error"] for rank, one in facts.items() if "error" in one.get("exchange", {})}
    if bad or slow or not (unreached or errors):
        return None
    if unreached:
        why = f"the first node cannot be reached: {unreached[min(unreached)]}"
        return f"{why}; are MASTER_ADDR and MASTER_PORT right, and is the port free?"
    return (
        f"the nodes cannot exchange data: {errors[min(errors)]}; "
        "is the network interface the right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)?"
    )


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GFLOP/s"


def _bandwidth(value: float) -> str:
    return f"{value / 1e9:.2f} GB/s"
