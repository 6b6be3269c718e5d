"""`python -m benchmarks.plan_memory [--quick] [--more] [--gpu]`: memory as `vernier plan` has it, beside trainings.

Each case is a real training of two ranks and a few steps. On CPU the most memory that rank 0 has held (VmHWM) is taken,
less what imports and a process group take without a model; with `--gpu` torch's max_memory_allocated, on the GPUs there
are. DeepSpeed's own estimators stand beside it. Ends with 1 where a plan is off by more than 15 %.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.devices import gpu_count

TOLERANCE = 0.15
RANKS = 2
STEPS = 2
MIB = 1 << 20
SEQUENCE = 128


@dataclass(frozen=True)
class Size:
    """A Llama, by the fields of its config, with a vocabulary of 8192."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int


SMALL = Size("50M", 640, 1728, 8, 10)
LARGE = Size("150M", 1024, 2944, 10, 16)


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    size: Size
    stage: int
    micro: int
    further: tuple[str, ...] = field(default=())  # settings, key=value

    @property
    def name(self) -> str:
        return " ".join([f"{self.size.name} ZeRO-{self.stage} {self.micro} × {SEQUENCE}", *self.further])


def cases(*, quick: bool, more: bool) -> list[Case]:
    """Two models, four stages, two micro-batches; with `more`, settings that the model was not fitted to."""
    sizes, micros = ((SMALL,), (1,)) if quick else ((SMALL, LARGE), (1, 8))
    found = [Case(size, stage, micro) for size in sizes for micro in micros for stage in (0, 1, 2, 3)]
    if more:
        found += [
            Case(SMALL, 2, 4),
            Case(SMALL, 2, 8, ("gradient_checkpointing=true",)),
            Case(SMALL, 2, 2, ("batch.global=8",)),
            Case(SMALL, 2, 2, ("steps=3", "checkpoint.every=1")),
            Case(SMALL, 1, 2, ("ema.decay=0.9",)),
            Case(SMALL, 2, 1, ("precision=bf16",)),
            Case(SMALL, 3, 1, ("precision=bf16",)),
            Case(SMALL, 2, 1, ("precision=amp",)),
            Case(SMALL, 2, 1, ("zero.offload=cpu",)),
        ]
    return found


def settings(case: Case, data: Path, ranks: int) -> list[str]:
    """The overrides of the demo's recipe that make the case."""
    size = case.size
    model = f"hidden_size: {size.hidden}, intermediate_size: {size.intermediate}, num_hidden_layers: {size.layers}"
    model += f", num_attention_heads: {size.heads}, num_key_value_heads: {size.heads}, vocab_size: 8192"
    return [
        f"model={{type: llama, {model}, tie_word_embeddings: false, max_position_embeddings: {SEQUENCE}}}",
        f"data.dir={data}",
        "data.vocab_size=8192",
        f"sequence_length={SEQUENCE}",
        f"steps={STEPS}",
        f"nproc={ranks}",
        "threads_per_rank=1",
        "eval.placement=none",
        "schedule.warmup_steps=0",
        "snapshot.every=100",
        "snapshot.at=[]",
        "checkpoint.every=100",
        f"batch.global={ranks * case.micro}",
        f"batch.micro={case.micro}",
        f"zero.stage={case.stage}",
        *case.further,
    ]


def most_held() -> int:
    """Bytes of memory that this process has held at most (VmHWM)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def rank(out: str, arguments: list[str]) -> int:
    """A rank of a real training, which then writes down what it has held."""
    from trainer.__main__ import main as train

    code = train(arguments)
    _write(out)
    return code


def fixed(out: str) -> int:
    """A rank that imports what a training imports, joins the process group, and writes down what it has held."""
    import importlib

    import torch
    import torch.distributed as dist

    from eval.distributed.ranks import join, leave
    from trainer.engine.build import import_deepspeed

    for name in ("trainer.run", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    join(1)
    import_deepspeed()
    dist.all_reduce(torch.zeros(1))
    _write(out)
    leave()
    return 0


def _write(out: str) -> None:
    Path(f"{out}.{os.environ.get('RANK', '0')}").write_text(str(most_held()))


def _torchrun(arguments: list[str], ranks: int, log: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "-m", "benchmarks.plan_memory", *arguments]
    with open(log, "wb") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, "MALLOC_ARENA_MAX": "1"}, check=False, timeout=900
        )
    if done.returncode:
        sys.exit(f"benchmarks.plan_memory: {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")


def measure_fixed(folder: Path) -> int:
    """Bytes that a rank holds before it has a model."""
    _torchrun(["rank-fixed", str(folder / "fixed")], RANKS, folder / "fixed.log")
    return int((folder / "fixed.0").read_text())


def measure(case: Case, folder: Path, data: Path, *, ranks: int, gpu: bool) -> int:
    """Bytes that rank 0 of the training has held at most: on its GPU, else as a process."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["demo", *settings(case, data, ranks), f"run.dir={run}"]
    _torchrun(["rank", str(folder / "held"), *arguments], ranks, folder / "train.log")
    if not gpu:
        return int((folder / "held.0").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["memory_gib"] * 2**30)


def planned(case: Case, data: Path, ranks: int) -> Any:
    """The memory of a rank as `vernier plan` has it."""
    from configs.load import load_config, resolve
    from launcher.plan.estimate import Given, make_plan

    return make_plan(resolve(load_config("demo", settings(case, data, ranks))), Given(flops=1e12))


def estimated(case: Case, parameters: int, ranks: int) -> int | None:
    """What DeepSpeed's own estimator says of a GPU: model states for Adam in 16 bits, without activations."""
    from trainer.engine.build import import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    size = case.size
    world = {"num_gpus_per_node": ranks, "num_nodes": 1, "cpu_offload": False}
    if case.stage == 2:
        return int(estimate_zero2_model_states_mem_needs(parameters, **world)[1])
    if case.stage == 3:
        largest = max(8192 * size.hidden, size.hidden * size.intermediate)
        return int(estimate_zero3_model_states_mem_needs(parameters, largest, **world, cpu_offload_params=False)[1])
    return None


def report(chosen: list[Case], folder: Path, data: Path, *, gpu: bool) -> bool:
    """Prints a line for each case; gives whether all plans are within TOLERANCE."""
    ranks = gpu_count() if gpu else RANKS
    floor = 0 if gpu else measure_fixed(folder)
    where = "GPU" if gpu else f"CPU; imports and a process group take {floor / MIB:,.0f} MiB"
    print(f"{ranks} ranks on {where}", flush=True)
    heads = f"{'case':<48} {'measured':>9} {'planned':>9} {'ratio':>6} {'fixed':>6} {'DeepSpeed':>10}"
    print(f"{heads}   MiB, measured and planned without fixed", flush=True)
    ratios = []
    for case in chosen:
        plan = planned(case, data, ranks)
        held = measure(case, folder, data, ranks=ranks, gpu=gpu) - floor
        own = plan.memory.own
        ratios.append(own / held)
        guess = estimated(case, plan.model.parameters, ranks)
        other = "–" if guess is None else f"{guess / MIB:,.0f}"
        print(
            f"{case.name:<48} {held / MIB:>9,.0f} {own / MIB:>9,.0f} {own / held:>6.2f} "
            f"{plan.memory.fixed / MIB:>6,.0f} {other:>10}   {plan.memory.moment}",
            flush=True,
        )
    off = sum(abs(ratio - 1) > TOLERANCE for ratio in ratios)
    print(
        f"planned ÷ measured: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}; "
        f"{off} of {len(ratios)} off by more than {TOLERANCE:.0%}"
    )
    return off == 0


def main(arguments: list[str]) -> int:
    """Runs the benchmark, or is one of its ranks."""
    match arguments:
        case ["rank", out, *rest]:
            return rank(out, rest)
        case ["rank-fixed", out]:
            return fixed(out)
    unknown = set(arguments) - {"--quick", "--more", "--gpu"}
    if unknown:
        print(f"benchmarks.plan_memory: {sorted(unknown)[0]!r}; expected --quick, --more, --gpu", file=sys.stderr)
        return 2
    gpu = "--gpu" in arguments
    if gpu != (gpu_count() > 0):
        why = "no GPU is visible" if gpu else "there is a GPU: say --gpu, or hide it (CUDA_VISIBLE_DEVICES=)"
        print(f"benchmarks.plan_memory: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        folder = Path(name)
        data = folder / "data"
        prepare = ["prepare", "demo", f"data.dir={data}", "data.vocab_size=8192", "data.max_bytes=3000000"]
        subprocess.run([sys.executable, "-m", "launcher.cli", *prepare], check=True, capture_output=True)
        chosen = cases(quick="--quick" in arguments, more="--more" in arguments)
        return 0 if report(chosen, folder, data, gpu=gpu) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
