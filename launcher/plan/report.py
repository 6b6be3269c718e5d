"""A plan in words, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from configs.console import columns_of
from configs.devices import gpu_count
from configs.memory.scoring import gib
from configs.memory.training import RankMemory
from launcher.plan.estimate import Plan, warnings
from launcher.plan.scaling import STAGES, Row
from launcher.text import duration, new_table, print_table, say

FLOPS_RULE = "6N + 12·L·H·Q·T (PaLM, appendix B)"
WIDTH = 80
ROOMY = 115  # columns from which on a cell has its memory and its time beside each other
WHAT_IT_IS = {
    "weights": "",
    "gradients": "",
    "optimizer": "masters and both moments",
    "average": "moving average of the weights",
    "activations": "kept for the backward pass",
    "logits": "and their gradients, a chunk of targets at a time",
    "buffers": "DeepSpeed's buckets and gathered weights",
    "saving": "copies that saves are written from",
    "gaps": "what the allocator holds between blocks",
    "start": "the whole model, and what DeepSpeed makes of it",
}


PEOPLE_SAY = {"gaps": "fragmentation", "saving": "save copies"}  # of the parts' names in the JSON


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: counts, bytes, seconds."""
    config, state, saving, here = plan.config, plan.job.state, plan.saving, plan.here
    tokens = config.batch.global_ * config.sequence_length
    rows, left_out = plan.table
    return {
        "model": plan.model.name,
        "parameters": plan.model.parameters,
        "notes": _notes(plan),
        "weight_decay": _decay_json(plan),
        "ranks": plan.ranks,
        "ranks_a_node": plan.ranks_here,
        "micro": here.micro,
        "largest_micro": plan.largest_micro,
        "accumulation": here.accumulation,
        "batch": config.batch.global_,
        "sequence_length": config.sequence_length,
        "tokens_a_step": tokens,
        "steps": config.steps,
        "tokens": tokens * config.steps,
        "windows": plan.windows,
        "precision": config.precision,
        "zero_stage": config.zero.stage,
        "on_gpu": plan.on_gpu,
        "memory_a_rank": {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "average": state.average,
            "device": state.device,
            "host": state.host,
        },
        "peak_a_rank": {
            **_memory_json(plan.memory),
            "start": plan.memory.start,
            "activations": asdict(plan.job.activations) if plan.activations_known else None,
            "moments": [{"name": m.name, "parts": m.parts, "total": m.total} for m in plan.memory.moments],
            "memory": plan.device_bytes,
            "fits": here.fits(plan.device_bytes),
        },
        "saving_a_rank": {
            "background": config.checkpoint.background,
            "checkpoint": saving.checkpoint,
            "snapshot": saving.snapshot,
            "average": saving.average,
            "most": saving.most,
        },
        "time": {
            "flops_a_token": plan.work.flops_a_token,
            "flops": None if plan.speed is None else plan.speed.flops,
            "flops_source": None if plan.speed is None else plan.speed.source,
            "rank_bandwidth": plan.links.rank_bandwidth,
            "node_bandwidth": plan.links.node_bandwidth,
            "latency_s": plan.links.latency_s,
            **_time_json(here),
            "run_s": None if here.time is None else here.time.total_s * config.steps,
        },
        "scaling": [
            {
                "ranks": row.ranks,
                "nodes": row.nodes,
                "zero_stage": row.stage,
                "micro": row.micro,
                "accumulation": row.accumulation,
                **_memory_json(row.memory),
                "fits": row.fits(plan.device_bytes),
                **_time_json(row),
            }
            for row in rows
        ],
        "scaling_left_out": left_out,
        "machine": {
            "needed": plan.host_bytes,
            "starting": plan.starting_bytes,
            "memory": plan.machine_bytes,
            "gpus": gpu_count(),
        },
        "disk": {
            "checkpoint": plan.checkpoint,
            "checkpoints": plan.checkpoints,
            "snapshot": plan.snapshot,
            "snapshots": plan.snapshots,
            "needed": plan.disk_bytes,
            "free": plan.free_disk_bytes,
        },
        "warnings": warnings(plan),
    }


def _memory_json(memory: RankMemory) -> dict[str, Any]:
    return {
        "moment": memory.moment,
        "parts": memory.parts,
        "at_work": memory.at_work,
        "own": memory.own,
        "fixed": memory.fixed,
        "total": memory.total,
    }


def _time_json(row: Row) -> dict[str, Any]:
    time = row.time
    return {
        "step_s": None if time is None else time.total_s,
        "compute_s": None if time is None else time.compute_s,
        "communication_s": None if time is None else time.communication_s,
        "overlapped": None if time is None else time.overlapped,
    }


def _decay_json(plan: Plan) -> dict[str, Any] | None:
    if plan.decay is None:
        return None
    return {key: asdict(group) for key, group in zip(("decayed", "not_decayed"), plan.decay, strict=True)}


def _decay_lines(plan: Plan) -> Iterator[str]:
    """Two lines of 80 columns, with as many names as there is room for."""
    for key, what, group in zip(("decay", ""), ("decays", "does not"), plan.decay or (), strict=False):
        line = f"{key:<10}{what}: {_count(group.tensors, 'tensor')}, {group.parameters:,} parameters"
        names = [name.rpartition("layers.*.")[2] for name in group.names]
        shown = 0
        while shown < len(names) and len(", ".join(names[: shown + 1])) < WIDTH - len(line) - len(" (, …)"):
            shown += 1
        more = ", …" if shown < len(names) else ""
        yield line + (f" ({', '.join(names[:shown])}{more})" if shown else "")


def _notes(plan: Plan) -> list[str]:
    if plan.activations_known:
        return list(plan.model.notes)
    return [*plan.model.notes, "its activations and logits could not be found, and are not in any figure"]


def print_plan(plan: Plan, console: Console) -> None:
    """Prints it for people."""
    config, here, decay = plan.config, plan.here, list(_decay_lines(plan))  # a pattern may be refused: before a word
    tokens = config.batch.global_ * config.sequence_length
    ranks = "1 rank" if plan.ranks == 1 else f"{plan.ranks:,} ranks"
    say(console, f"model     {plan.model.name}, {plan.model.parameters:,} parameters")
    for note in _notes(plan):
        say(console, f"          {note}", "yellow")
    for line in decay:
        say(console, line)
    say(console, f"batch     {ranks} × {here.micro} × {here.accumulation} = {config.batch.global_:,} windows a step")
    say(console, f"tokens    {tokens:,} a step; {config.steps:,} steps: {tokens * config.steps:,}{_passes(plan)}")
    place = "of its GPU" if plan.on_gpu else "of this machine, there is no GPU"
    say(console, f"memory    a rank, {config.precision}, ZeRO-{config.zero.stage} ({place}), {plan.memory.moment}")
    _print_memory(plan, console)
    _print_micro(plan, console)
    _print_time(plan, console)
    _print_saving(plan, console)
    what = "training, copies and imports"
    if plan.on_gpu:
        what = "offloaded state, copies and imports" if plan.job.state.host else "copies and imports"
    here_ranks = "1 rank takes" if plan.ranks_here == 1 else f"{plan.ranks_here:,} ranks take"
    machine = "this machine" if plan.ranks == plan.ranks_here else "a machine"
    say(
        console,
        f"machine   {here_ranks} {gib(plan.host_bytes)} of host memory in all ({what}); of it at the start "
        f"{gib(plan.starting_bytes)}, where each builds the whole model; {machine} has {gib(plan.machine_bytes)}",
    )
    say(
        console,
        f"disk      a checkpoint {gib(plan.checkpoint)}, a snapshot {gib(plan.snapshot)}"
        f"{' with that of the average' if plan.average else ''}; at most {_count(plan.checkpoints, 'checkpoint')} and "
        f"{_count(plan.snapshots, 'snapshot')} at a time: {gib(plan.disk_bytes)}; free: {gib(plan.free_disk_bytes)}",
    )
    _print_scaling(plan, console)
    for line in warnings(plan):
        say(console, f"does not fit: {line}", "red")


def _passes(plan: Plan) -> str:
    if not plan.windows:
        return ""
    passes = plan.config.steps * plan.config.batch.global_ / plan.windows
    return f", {passes:.3g} passes over the {plan.windows:,} windows that are prepared"


def _print_memory(plan: Plan, console: Console) -> None:
    memory, table = plan.memory, new_table()
    table.add_column("         ")
    table.add_column("part")
    table.add_column("a rank", justify="right")
    table.add_column("")
    for name, size in memory.parts.items():
        table.add_row("", PEOPLE_SAY.get(name, name), gib(size), WHAT_IT_IS[name])
    if memory.at_work:
        table.add_row("", "libraries", gib(memory.at_work), "what they take while they compute")
    fixed = "CUDA and NCCL (taken, not measured)" if plan.on_gpu else "imports and the process group (measured)"
    table.add_row("", "process", gib(memory.fixed), fixed)
    has = "" if plan.device_bytes is None else f"of {gib(plan.device_bytes)} that it has"
    table.add_row("", "total", gib(memory.total), has)
    state = plan.job.state
    if state.on_host and plan.on_gpu:
        kept = state.gradients + state.optimizer + state.average
        table.add_row("", "in host memory", gib(kept), "gradients, masters and moments (zero.offload)")
    print_table(table, console)


def _print_micro(plan: Plan, console: Console) -> None:
    if plan.device_bytes is None or not plan.activations_known:
        why = "activations are not known" if plan.device_bytes is not None else "say --memory, there is no GPU here"
        say(console, f"micro     the largest micro-batch cannot be told: {why}")
    elif plan.largest_micro is None:
        say(console, f"micro     not even a micro-batch of 1 fits into {gib(plan.device_bytes)}")
    else:
        say(
            console,
            f"micro     the largest micro-batch that fits into nine tenths of {gib(plan.device_bytes)}: "
            f"{plan.largest_micro} (batch.micro is {plan.config.batch.micro})",
        )


def _print_time(plan: Plan, console: Console) -> None:
    time = plan.here.time
    tokens = f"{plan.work.flops_a_token:.3g} FLOPs a token, {FLOPS_RULE}"
    if time is None or plan.speed is None:
        say(console, f"time      {tokens}; the speed of a rank is not known and cannot be tried here, say --flops")
        return
    whole = duration(time.total_s * plan.config.steps)
    beside = "beside it " if time.overlapped else ""
    parts = f"computing {time.compute_s:.3g} s, {beside}sending {time.communication_s:.3g} s"
    if plan.speed.sending == (plan.ranks, plan.config.zero.stage):
        parts = "computing and sending"
    say(console, f"time      a step {time.total_s:.3g} s ({parts}), {plan.config.steps:,} steps {whole}")
    say(console, f"          {tokens}; {plan.speed.flops:.3g} FLOP/s a rank, {plan.speed.source}")


def _print_saving(plan: Plan, console: Console) -> None:
    saving, background = plan.saving, plan.config.checkpoint.background
    how = "written in the background" if background else "training waits until they are written"
    parts = {"checkpoint": saving.checkpoint, "snapshot": saving.snapshot, "snapshot of the average": saving.average}
    copies = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    say(console, f"saving    copies in host memory, a rank: {gib(saving.most)} ({copies}), {how}")


def _print_scaling(plan: Plan, console: Console) -> None:
    rows, left_out = plan.table
    links = plan.links
    say(
        console,
        f"scaling   the same batch over more ranks, {links.ranks_a_node} a node: memory of a rank, and seconds a step",
    )
    columns = columns_of(console.file)
    gap = "\n" if columns is not None and columns < ROOMY else "  "
    table = new_table()
    for heading in ("         ranks", "nodes", "micro", *(f"ZeRO-{stage}" for stage in STAGES)):
        table.add_column(heading, justify="right")
    for ranks in dict.fromkeys(row.ranks for row in rows):
        line = [row for row in rows if row.ranks == ranks]
        micro = f"{line[0].micro} × {line[0].accumulation}"
        table.add_row(f"{ranks:,}", f"{line[0].nodes:,}", micro, *(_cell(row, plan.device_bytes, gap) for row in line))
    print_table(table, console)
    if left_out:
        counts = ", ".join(f"{count:,}" for count in left_out)
        say(console, f"          without {counts} ranks, which do not divide batch.global={plan.config.batch.global_}")
    if any(row.fits(plan.device_bytes) is False for row in rows):
        say(console, "          !: does not fit into nine tenths of what a rank has")
    bandwidth = f"{links.rank_bandwidth / 1e9:g} GB/s a rank in a node, {links.node_bandwidth / 1e9:g} GB/s a node"
    say(
        console,
        f"          sending: rings, 2Ψ at ZeRO-0 to 2 and 3Ψ at 3 (ZeRO, §7), {bandwidth}, "
        f"{links.latency_s * 1e6:g} µs a hop; after computing, at ZeRO-3 beside it",
    )


def _cell(row: Row, device: int | None, gap: str) -> str:
    mark = "! " if row.fits(device) is False else ""
    seconds = "" if row.time is None else f"{gap}{row.time.total_s:.3g} s"
    return f"{mark}{gib(row.memory.total)}{seconds}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
