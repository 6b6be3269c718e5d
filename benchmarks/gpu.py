"""`python -m benchmarks.gpu [train] [determinism] [score]`: on one GPU, training throughput by precision and ZeRO stage
for a small Llama, what `deterministic: true` costs it, and what scoring costs in the shape of Qwen3-0.6B."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.scoring import Case, in_own_process, known_ways, report_memory, report_speed
from configs.devices import gpu_count

STEPS = 60
ROUNDS = 3
MODEL = (
    "model={type: llama, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 12, num_attention_heads: 12, "
)
MODEL += "max_position_embeddings: 1024, vocab_size: 8192}"

QWEN3_0_6B = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SCORING = Case(
    "Qwen3-0.6B's shape",
    QWEN3_0_6B,
    2048,
    4,
    turns=20,
    rounds=3,
    goals={"logits": 0.95, "harness": 1.5},
    dtype="bf16",
    device="cuda",
)


def _prepared(folder: Path) -> list[str]:
    """Settings that all trainings here share; their data is made."""
    common = ["demo", MODEL, f"data.dir={folder / 'data'}", "sequence_length=1024", "data.vocab_size=8192", "nproc=1"]
    subprocess.run([sys.executable, "-m", "launcher.cli", "prepare", *common], check=True)
    fixed = [f"steps={STEPS}", "eval.placement=none", f"snapshot.every={STEPS}", "snapshot.at=[]"]
    return [*common, *fixed, f"checkpoint.every={STEPS}", "batch.global=16", "batch.micro=16"]


def _trained(run: Path, settings: list[str]) -> tuple[float, float]:
    """(median tokens/s over the second half of the steps, peak memory in GiB)."""
    subprocess.run([sys.executable, "-m", "launcher.cli", "train", *settings, f"run.dir={run}"], check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines[STEPS // 2 :]), lines[-1]["memory_gib"]


def train(folder: Path) -> None:
    """Prints tokens/s and peak memory of each combination of precision and stage."""
    common = _prepared(folder)
    for precision in ("bf16", "amp", "fp32"):
        for stage in (0, 2, 3):
            settings = [*common, f"precision={precision}", f"zero.stage={stage}"]
            rate, memory = _trained(folder / f"{precision}-{stage}", settings)
            print(f"{precision} ZeRO-{stage}: {rate:,.0f} tokens/s, {memory:.2f} GiB", flush=True)


def determinism(folder: Path) -> None:
    """Prints the throughput of deterministic training ÷ that of other training, in interleaved rounds."""
    common = [*_prepared(folder), "precision=bf16", "zero.stage=2"]
    ratios = []
    for turn in range(ROUNDS):
        on, off = (
            _trained(folder / f"{value}-{turn}", [*common, f"deterministic={value}"])[0] for value in ("true", "false")
        )
        ratios.append(on / off)
    print(f"deterministic: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of the tokens/s")


def score(folder: Path) -> None:
    """Prints speed and memory of scoring beside a plain forward pass and lm-evaluation-harness."""
    ways, directory = known_ways(), folder / "model"
    in_own_process("model", SCORING, directory, [])
    report_speed(SCORING, directory, ways)
    report_memory(SCORING, directory, ways)


def main(arguments: list[str]) -> int:
    """Runs what was asked for, both by default."""
    parts = {"train": train, "determinism": determinism, "score": score}
    unknown = [name for name in arguments if name not in parts]
    if unknown:
        print(f"benchmarks.gpu: {unknown[0]!r}; expected {', '.join(parts)}", file=sys.stderr)
        return 2
    if gpu_count() == 0:
        print("benchmarks.gpu: no GPU is visible", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        for part in arguments or parts:
            parts[part](Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
