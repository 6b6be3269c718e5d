"""What scoring costs: tokens/s and memory of our Scorer beside a plain forward pass and lm-evaluation-harness.

One model, the same windows of token ids for all. Ways of scoring take turns batch by batch in one process, and ratios
of a turn are what counts: the machine is shared. Memory is that of a process which scores in one way only.
`--chunks` measures our Scorer with other sizes of a chunk of logits instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WAYS = {
    "ours": "Scorer",
    "logits": "a forward pass with logits and no loss",
    "labels": "a forward pass with labels",
    "harness": "lm_eval's loglikelihood_rolling",
}
CHUNKS_MIB = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Case:
    """A model and the batches that it is measured on."""

    name: str
    config: dict[str, Any]
    sequence_length: int
    batch: int
    turns: int  # batches of every way in a round
    rounds: int
    goals: dict[str, float] = field(default_factory=dict)  # our tokens/s ÷ that way's, at least
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * self.sequence_length

    @property
    def logits_bytes(self) -> int:
        """What a batch's logits take as the model makes them."""
        return self.tokens * int(self.config["vocab_size"]) * (4 if self.dtype == "fp32" else 2)


LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
LARGE_VOCABULARY = {
    **LLAMA,
    "vocab_size": 151_936,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
DEMO = {**LLAMA, "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
CASES = (
    Case("vocabulary 2,048", DEMO, 256, 16, turns=12, rounds=3, goals={"logits": 0.95, "harness": 1.0}),
    Case("vocabulary 151,936", LARGE_VOCABULARY, 512, 2, turns=2, rounds=2, goals={"logits": 0.95, "harness": 1.5}),
)
MEMORY = Case("vocabulary 151,936", LARGE_VOCABULARY, 2048, 2, turns=1, rounds=1)
MOST_OF_NAIVE_LOGITS = 0.10  # goal: what we take above the model ÷ the logits that a plain forward pass makes


def make_model(case: Case, directory: Path) -> None:
    """Saves the case's model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from eval.scoring.models import DTYPES

    torch.manual_seed(1)
    sizes = {name: value for name, value in case.config.items() if name != "model_type"}
    config = AutoConfig.for_model(case.config["model_type"], **sizes)
    AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype]).save_pretrained(directory)


def way_of_scoring(way: str, model: Any, case: Case) -> Callable[[Any], None]:
    """Scores ids, int64 [B, T + 1] on the CPU: a prefix token and T targets a row. Results come back to the CPU."""
    import torch

    if way == "ours":
        from eval.scoring.losses import Scorer

        scorer = Scorer(model, case.sequence_length)

        def ours(ids: torch.Tensor) -> None:
            rows = torch.ones(len(ids), dtype=torch.int64)
            scorer.score(ids, rows, rows * ids.shape[1])

        return ours
    if way == "harness":
        return _harness(model, case)

    @torch.no_grad()
    def plain(ids: torch.Tensor) -> None:
        fed = ids[:, :-1].to(case.device)
        if way == "labels":
            model(input_ids=fed, labels=fed, use_cache=False).loss.item()
        else:
            model(input_ids=fed, use_cache=False).logits[0, 0, 0].item()

    return plain


def _harness(model: Any, case: Case) -> Callable[[Any], None]:
    """lm_eval as it is, but that a document's text is a number, whose token ids it is given."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, "<s>")), bos_token="<s>"
    )
    given: dict[str, list[int]] = {}

    class Given(HFLM):
        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return given[string]

    harness = Given(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        max_length=case.sequence_length,
        batch_size=case.batch,
        device=case.device,
    )

    def rolling(ids: torch.Tensor) -> None:
        given.update({str(row): ids[row, 1:].tolist() for row in range(len(ids))})
        asked = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(str(row),), idx=row)
            for row in range(len(ids))
        ]
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            harness.loglikelihood_rolling(asked, disable_tqdm=True)

    return rolling


def loaded(case: Case, directory: Path) -> tuple[Any, Callable[[], Any]]:
    """(the model, what draws a batch of ids)."""
    import torch

    from eval.scoring.models import load_for_scoring

    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.sequence_length + 1)
    model = load_for_scoring(directory, case.dtype, torch.device(case.device))
    return model, lambda: torch.randint(0, case.config["vocab_size"], shape, generator=generator)


def measure_speed(case: Case, directory: Path, ways: list[str]) -> dict[str, list[float]]:
    """Seconds of each way's turns, in this process."""
    model, draw = loaded(case, directory)
    scored_by = {way: way_of_scoring(way, model, case) for way in ways}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(-1, case.turns):  # the first is for warming up
        ids = draw()
        for way in ways if turn % 2 else reversed(ways):
            started = time.perf_counter()
            scored_by[way](ids)
            if turn >= 0:
                found[way].append(time.perf_counter() - started)
    return found


def measure_memory(case: Case, directory: Path, ways: list[str]) -> dict[str, int]:
    """Bytes above the loaded model at the fullest moment of scoring a batch in one way, in this process."""
    import torch

    (way,) = ways
    model, draw = loaded(case, directory)
    score, ids = way_of_scoring(way, model, case), draw()
    score(ids[:1, :17])  # what is made once, and pages of weights that are read when first used
    if case.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (proc(5))
        before = _status_bytes("VmRSS")
        score(ids)
        return {way: _status_bytes("VmHWM") - before}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    score(ids)
    return {way: torch.cuda.max_memory_allocated() - held}


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def in_own_process(what: str, case: Case, directory: Path, ways: list[str], **environment: str) -> dict[str, Any]:
    """What `measure_speed`, `measure_memory` or `make_model` gives in a process of its own."""
    asked = json.dumps({"what": what, "case": asdict(case), "directory": str(directory), "ways": ways})
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scoring", "--child", asked],
        env={**os.environ, **offline, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"benchmarks.scoring: {what} of {case.name} failed\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(asked: str) -> None:
    """What `in_own_process` starts."""
    order = json.loads(asked)
    case, directory = Case(**order["case"]), Path(order["directory"])
    do: dict[str, Callable[[], Any]] = {
        "model": lambda: make_model(case, directory),
        "speed": lambda: measure_speed(case, directory, order["ways"]),
        "memory": lambda: measure_memory(case, directory, order["ways"]),
    }
    print(json.dumps(do[order["what"]]() or {}))


def known_ways() -> list[str]:
    """All ways, without lm_eval where it is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval"):
        return list(WAYS)
    print("lm_eval is not installed, so it is left out (pip install lm_eval==0.4.13)")
    return [way for way in WAYS if way != "harness"]


def report_speed(case: Case, directory: Path, ways: list[str]) -> None:
    """Prints our tokens/s, and the ratio to every other way with its spread."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(case.rounds):
        for way, times in in_own_process("speed", case, directory, ways).items():
            found[way] += times
    rate = case.tokens / statistics.median(found["ours"])
    turns = len(found["ours"])
    print(
        f"{case.name}, batches of {case.batch} × {case.sequence_length}, {case.dtype}, {case.device}: "
        f"{rate:,.0f} tokens/s ({turns} turns in {case.rounds} processes)"
    )
    for way in ways[1:]:
        ratios = [other / own for own, other in zip(found["ours"], found[way], strict=True)]
        goal = f"; goal: {case.goals[way]} or more" if way in case.goals else ""
        print(
            f"  {statistics.median(ratios):.2f} × {WAYS[way]} (from {min(ratios):.2f} to {max(ratios):.2f}{goal})",
            flush=True,
        )


def report_memory(case: Case, directory: Path, ways: list[str], rounds: int = 1) -> None:
    """Prints what each way takes above the model, in MiB and against the logits of a batch."""
    naive = case.logits_bytes
    print(
        f"{case.name}, a batch of {case.batch} × {case.sequence_length}, {case.dtype}, {case.device}: "
        f"memory above the model; its logits are {naive / 2**20:,.0f} MiB"
    )
    for way in ways:
        taken = [in_own_process("memory", case, directory, [way])[way] for _ in range(rounds)]
        middle = statistics.median(taken)
        goal = f"; goal: {MOST_OF_NAIVE_LOGITS:.0%} or less" if way == "ours" else ""
        print(
            f"  {WAYS[way]}: {middle / 2**20:,.0f} MiB, {middle / case.tokens / 1024:,.1f} KiB a token, "
            f"{middle / naive:.1%} of the logits{goal}",
            flush=True,
        )


def report_chunks(case: Case, directory: Path) -> None:
    """Prints tokens/s and memory of our Scorer by the size of a chunk of logits."""
    found: dict[int, list[float]] = {size: [] for size in CHUNKS_MIB}
    memory = {}
    for _ in range(case.rounds):
        for size in CHUNKS_MIB:
            limit = {"VERNIER_LOGITS_BYTES": str(size << 20)}
            found[size] += in_own_process("speed", case, directory, ["ours"], **limit)["ours"]
    for size in CHUNKS_MIB:
        limit = {"VERNIER_LOGITS_BYTES": str(size << 20)}
        memory[size] = in_own_process("memory", case, directory, ["ours"], **limit)["ours"]
    for size, times in found.items():
        low, middle, high = (case.tokens / t for t in (max(times), statistics.median(times), min(times)))
        print(
            f"  chunks of {size} MiB: {middle:,.0f} tokens/s (from {low:,.0f} to {high:,.0f}), "
            f"{memory[size] / 2**20:,.0f} MiB above the model",
            flush=True,
        )


def free_bytes() -> int:
    """Memory of this machine that processes may still take."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def main(arguments: list[str] | None = None) -> None:
    """Prints speed of both models, then memory of the one with many tokens."""
    chunks = "--chunks" in (arguments or [])
    ways = known_ways()
    with tempfile.TemporaryDirectory(prefix="vernier-bench-") as name:
        for case in CASES:
            directory = Path(name) / str(case.config["vocab_size"])
            in_own_process("model", case, directory, [])
            if chunks:
                print(f"{case.name}, batches of {case.batch} × {case.sequence_length}")
                report_chunks(case, directory)
            else:
                report_speed(case, directory, ways)
        if chunks:
            return
        if free_bytes() < 4 * MEMORY.logits_bytes:
            print(f"memory is not measured: less than {4 * MEMORY.logits_bytes / 2**30:.0f} GiB are free")
            return
        report_memory(MEMORY, Path(name) / str(MEMORY.config["vocab_size"]), ["ours", "labels"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main(sys.argv[1:])
