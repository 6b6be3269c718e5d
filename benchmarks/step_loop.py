"""Training throughput of `vernier train` beside a bare torch loop over the same model, data, optimizer and threads.

One rank, CPU, fp32. Rounds are interleaved, and the ratio of each round is what counts: the machine is shared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
STEPS = 40
SETTINGS = ["nproc=1", "threads_per_rank=1", f"steps={STEPS}", "eval.placement=none", "snapshot.at=[]"]
SETTINGS += [f"snapshot.every={STEPS}", f"checkpoint.every={STEPS}", "batch.micro=16"]


def vernier_tokens_per_s(data: Path, folder: Path, stage: int) -> float:
    """Median over the second half of the steps."""
    run = folder / f"run-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "launcher.cli", "train", "demo", f"data.dir={data}", f"run.dir={run}", *SETTINGS]
    subprocess.run([*command, f"zero.stage={stage}"], check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_s"] for line in lines[STEPS // 2 :])


def bare_tokens_per_s(data: Path) -> float:
    """The same steps by hand: transformers' own loss, torch's fused AdamW, gradient clipping."""
    command = [sys.executable, "-m", "benchmarks.step_loop", "--bare", str(data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def bare(data: Path) -> None:
    """What `bare_tokens_per_s` runs in its own process."""
    import torch

    from configs.load import load_config, resolve
    from trainer.data.prepare import load_dataset_facts
    from trainer.data.shards import Windows
    from trainer.model.build import hf_config, make_model
    from trainer.order import windows_at

    torch.set_num_threads(1)
    config = resolve(load_config("demo", [f"data.dir={data}", *SETTINGS]))
    model = make_model(config, hf_config(config.model, load_dataset_facts(data)))
    windows = Windows(data, config.sequence_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rates = []
    for position in range(STEPS):
        started = time.perf_counter()
        chosen = windows_at(position, batch=config.batch.global_, windows=len(windows), seed=config.seed)
        ids = torch.from_numpy(windows.rows(chosen)[0])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(config.batch.global_ * config.sequence_length / (time.perf_counter() - started))
    print(statistics.median(rates[STEPS // 2 :]))


def main() -> None:
    """Prints the ratio of each stage's throughput to the bare loop's."""
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        folder = Path(name)
        data = folder / "data"
        command = [sys.executable, "-m", "launcher.cli", "prepare", "demo", f"data.dir={data}"]
        subprocess.run(command, check=True, capture_output=True)
        ratios: dict[int, list[float]] = {stage: [] for stage in (0, 2)}
        for _ in range(ROUNDS):
            reference = bare_tokens_per_s(data)
            for stage in ratios:
                ratios[stage].append(vernier_tokens_per_s(data, folder, stage) / reference)
        for stage, found in ratios.items():
            print(
                f"ZeRO-{stage}: {statistics.median(found):.3f} of a bare torch loop's tokens/s "
                f"(from {min(found):.3f} to {max(found):.3f}, {ROUNDS} rounds)"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare(Path(sys.argv[2]))
    else:
        main()
