"""`python -m benchmarks.gpu`: training throughput on one GPU by precision and ZeRO stage, for a small Llama."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.devices import gpu_count

STEPS = 60
MODEL = (
    "model={type: llama, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 12, num_attention_heads: 12, "
)
MODEL += "max_position_embeddings: 1024, vocab_size: 8192}"


def main() -> int:
    """Prints tokens/s and peak memory of each combination."""
    if gpu_count() == 0:
        print("benchmarks.gpu: no GPU is visible", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        folder = Path(name)
        common = [
            "demo",
            MODEL,
            f"data.dir={folder / 'data'}",
            "sequence_length=1024",
            "data.vocab_size=8192",
            "nproc=1",
        ]
        subprocess.run([sys.executable, "-m", "launcher.cli", "prepare", *common], check=True)
        for precision in ("bf16", "amp", "fp32"):
            for stage in (0, 2, 3):
                run = folder / f"{precision}-{stage}"
                settings = [f"run.dir={run}", f"steps={STEPS}", f"precision={precision}", f"zero.stage={stage}"]
                settings += ["eval.placement=none", f"snapshot.every={STEPS}", "snapshot.at=[]", "checkpoint.every=60"]
                settings += ["batch.global=16", "batch.micro=16"]
                command = [sys.executable, "-m", "launcher.cli", "train", *common, *settings]
                subprocess.run(command, check=True)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                rate = statistics.median(line["tokens_per_s"] for line in lines[STEPS // 2 :])
                print(f"{precision} ZeRO-{stage}: {rate:,.0f} tokens/s, {lines[-1]['memory_gib']:.2f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
