"""What a save costs training: written in the background, beside the same save written while training waits.

One rank with one thread, CPU, fp32, ZeRO-2, so that a core is free for the writer. Steps and both kinds of saves
alternate in one process, and each round gives one ratio: the machine is shared.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 16
PLAIN_STEPS = 4  # before and after a save in the background
MODEL = ["model.hidden_size=512", "model.intermediate_size=2048", "model.num_hidden_layers=6"]
MODEL += ["model.num_attention_heads=8", "model.num_key_value_heads=8"]
SETTINGS = ["nproc=1", "threads_per_rank=1", "eval.placement=none", "batch.global=1", "batch.micro=1", *MODEL]


def measure(data: Path, run_dir: Path) -> None:
    """Prints the figures; in a process of its own, since it becomes a rank."""
    from configs.load import load_config, resolve
    from configs.run.directory import RunDir
    from eval.distributed.ranks import join
    from trainer.checkpoint.async_save import HostCopy, Saver
    from trainer.checkpoint.checkpoint import Clock, copy_checkpoint, write_checkpoint
    from trainer.data.prepare import load_dataset_facts
    from trainer.data.shards import Windows
    from trainer.engine.build import make_engine
    from trainer.loop import Batch, micro_batches
    from trainer.model.build import hf_config, make_model
    from trainer.objectives import objective_of
    from trainer.objectives.objective import parameter_count
    from trainer.order import windows_at

    config = resolve(load_config("demo", [f"data.dir={data}", f"run.dir={run_dir}", *SETTINGS]))
    run = RunDir(config.run_dir)
    run.checkpoints.mkdir(parents=True)
    ranks = join(1)
    objective = objective_of(config)
    model = objective.module(make_model(config, hf_config(config.model, load_dataset_facts(data))))
    parameters = parameter_count(model)
    engine, _ = make_engine(config, model, 1)
    windows = Windows(config.data_dir, config.sequence_length)
    memory = HostCopy()
    position = 0
    waits: list[float] = []

    def step() -> float:
        nonlocal position
        started = time.perf_counter()
        chosen = windows_at(position, batch=config.batch.global_, windows=len(windows), seed=config.seed)
        batch = Batch(position, chosen, targets=chosen.size * config.sequence_length)
        for inputs, _ in micro_batches(objective, windows, batch, config, ranks):
            engine.backward(engine(**inputs))
            at = time.perf_counter()
            memory.wait_until_taken()
            waits.append(time.perf_counter() - at)
            engine.step()
        position += 1
        return time.perf_counter() - started

    def fail(said: str, _last: bool, _ends: bool) -> None:
        raise RuntimeError(said)

    def saver(background: bool) -> Saver:
        return Saver(ranks, background=background, check_current=lambda: None, tell=fail, given_up=lambda: None)

    savers = {True: saver(True), False: saver(False)}

    def save(background: bool) -> float:
        started = time.perf_counter()
        copied = copy_checkpoint(engine, ranks, Clock(step=position), memory)
        savers[background].submit([lambda group: write_checkpoint(copied, run, group)], [memory], lambda good: None)
        return time.perf_counter() - started

    for _ in range(3):
        step()
    save(False)  # the first one makes the memory that the others use again
    found: dict[str, list[float]] = {name: [] for name in ("blocking", "waited", "added", "until written")}
    shares: dict[str, list[float]] = {name: [] for name in ("waited", "added", "until written")}
    for _ in range(ROUNDS):
        blocking = save(False)
        plain = [step() for _ in range(PLAIN_STEPS)]
        taken = save(True)
        waits.clear()
        first = step()  # waits, before its update, for what is not copied yet
        more = 0
        writer: Any = savers[True].thread
        started = time.perf_counter()
        while writer.is_alive():
            step()
            more += 1
        beside = time.perf_counter() - started
        savers[True].wait()
        plain += [step() for _ in range(PLAIN_STEPS)]
        usual = statistics.median(plain)
        figures = {"waited": taken + sum(waits), "added": taken + first - usual}
        figures["until written"] = figures["added"] + beside - more * usual
        found["blocking"].append(blocking)
        for name, value in figures.items():
            found[name].append(value)
            shares[name].append(value / blocking)
        for old in run.checkpoints.glob("step-*"):
            subprocess.run(["rm", "-r", str(old)], check=True)

    def told(values: list[float], unit: str, scale: float) -> str:
        low, middle, high = statistics.quantiles(values, n=4)
        return f"{scale * middle:.1f}{unit} (quartiles {scale * low:.1f} to {scale * high:.1f})"

    print(f"{parameters:,} parameters, {12 * parameters / 2**20:,.0f} MiB of state, step {1e3 * usual:.0f} ms")
    print(f"a blocking save: {told(found['blocking'], ' ms', 1e3)}")
    for name, what in (
        ("waited", "the step in which a save starts is held up"),
        ("added", "that step takes longer, the writer's share of the machine included"),
        ("until written", "all steps together, until it is written"),
    ):
        print(f"{what}: {told(found[name], ' ms', 1e3)} = {told(shares[name], ' %', 100)} of a blocking one")


def main() -> None:
    """Prepares data, and measures in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        data = Path(name) / "data"
        command = [sys.executable, "-m", "launcher.cli", "prepare", "demo", f"data.dir={data}"]
        subprocess.run(command, check=True, capture_output=True)
        command = [sys.executable, "-m", "benchmarks.saving", "--measure", str(data), str(Path(name) / "run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout if done.returncode == 0 else done.stderr, end="")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
