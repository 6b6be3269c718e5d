"""A real family of runs: what single steps, pairing, verdicts and twins are worth on it, and whether error rates hold.

Fourteen runs of `benchmarks/family.yaml`: five seeds (s1–s5), the first seed at four learning rates that differ by a
thousandth of a percent (p2–p5), five seeds at a learning rate a tenth higher (q1–q5); and six twins of s1. About an
hour on two cores. `python -m benchmarks.family [--dir DIR]` trains what is not there yet, then prints everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.calibration import calibrate
from benchmarks.null_pairs import null_pairs
from configs.run.directory import RunDir, step_name
from eval.compare.pair import compare_tables
from eval.tables import LossTable, read_table

RECIPE = Path(__file__).with_name("family.yaml")
RUNS = {
    "s1": ["seed=1", "checkpoint.keep_every=60"],
    **{f"s{seed}": [f"seed={seed}"] for seed in range(2, 6)},
    **{f"p{at}": ["seed=1", f"optimizer.lr={lr}"] for at, lr in ((2, 2.99994e-3), (3, 2.99997e-3))},
    **{f"p{at}": ["seed=1", f"optimizer.lr={lr}"] for at, lr in ((4, 3.00003e-3), (5, 3.00006e-3))},
    **{f"q{seed}": [f"seed={seed}", "optimizer.lr=3.3e-3"] for seed in range(1, 6)},
}
SPLITS = {0: 480, 120: 200, 300: 180}  # steps from which s1 has twins, and how many each makes
TWINS = 2
PAIRS = (90, 110, 130, 150, 170, 190, 210, 230)  # and the step after each, as the recipe says
LAST = 480


def vernier(*arguments: object, shown: bool = True) -> str:
    """Runs a command as a user would; prints it with what it says."""
    words = [str(argument) for argument in arguments]
    if shown:
        print(f"\n$ vernier {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "launcher.cli", *words]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if shown:
        print(done.stdout.rstrip(), flush=True)
    return done.stdout


def table(run: Path, step: int) -> LossTable:
    """The loss table of a step."""
    return read_table(next(RunDir(run).losses.glob(f"*/{step_name(step)}@causal.fp32.parquet")))


def train(folder: Path) -> None:
    """Prepares the data and trains each run, and each twin, that is not done."""
    data = f"data.dir={folder / 'data'}"
    if not (folder / "data").exists():
        vernier("prepare", RECIPE, data)
    for name, settings in RUNS.items():
        if RunDir(folder / name).read_state().get("state") != "done":
            vernier("train", RECIPE, data, f"run.dir={folder / name}", *settings)
    for at, steps in SPLITS.items():
        vernier("twin", folder / "s1", "--at", at, "--count", TWINS, "--steps", steps, shown=False)


def single_steps(run: Path) -> None:
    """All eight pairs of neighbouring steps, whatever they show."""
    print("\nOne optimizer step: paired (clustered) and unpaired")
    for step in PAIRS:
        found = compare_tables(table(run, step), table(run, step + 1)).difference
        print(
            f"  {step:>3} → {step + 1}: change {found.percent:+.4f} % ± {found.se_percent:.4f} % (SE), "
            f"paired t {found.t:+6.2f}, unpaired t {found.t_unpaired:+.3f}, pairing gained {found.pairing_gain:.0f}×"
        )


def same_or_not(folder: Path) -> None:
    """The same weights at another world size are identical; in another dtype they are called that."""
    base, reference = folder / "s1", folder / "data" / "reference"
    model = base / "snapshots" / step_name(LAST)
    for option, value in (("--nproc", 1), ("--nproc", 3), ("--dtype", "bf16")):
        out = folder / "again" / f"{option.strip('-')}-{value}"
        vernier("eval", model, "--reference", reference, option, value, "--out", out, shown=False)
        vernier("compare", f"{base}@{LAST}", next(out.glob("*.parquet")))


def calibration(folder: Path) -> None:
    """False claims and coverage on the tables of these runs."""
    base = folder / "s1"
    pairs = {
        "s1, 420 → 480": (table(base, 420), table(base, LAST)),
        "s1, 150 → 151": (table(base, 150), table(base, 151)),
        "s1 → q1": (table(base, LAST), table(folder / "q1", LAST)),
        "s1 → s2": (table(base, LAST), table(folder / "s2", LAST)),
        "s2 → s3": (table(folder / "s2", LAST), table(folder / "s3", LAST)),
        "s1 → p2": (table(base, LAST), table(folder / "p2", LAST)),
    }
    print(
        "\nDocuments swapped at random 10,000 times: claims at 5 %; 95 % intervals from random quarters, 10,000 times"
    )
    print("  pair              documents (worth)  clustered  by window  coverage (of documents)")
    for name, (a, b) in pairs.items():
        print(_row(name, a, b))
    print("  the first documents only (reported, not promised):")
    for count in (40, 60, 80, 100):
        print(_row(f"{count}, 420 → 480", *pairs["s1, 420 → 480"], count))


def _row(name: str, a: LossTable, b: LossTable, documents: int | None = None) -> str:
    found = calibrate(a, b, documents=documents)
    return (
        f"  {name:<18}{found.documents:>8} ({found.effective:.0f})  {found.claims:>11.3f}"
        f"  {found.claims_by_window:>9.3f}  {found.coverage:>8.3f} ({found.part})"
    )


def learning_rates(folder: Path) -> None:
    """What is said of a learning rate that is a tenth higher: by seed, and of the recipe."""
    print("\nLearning rate 3e-3 against 3.3e-3, seed by seed, of these weights:")
    for seed in range(1, 6):
        found: Any = json.loads(vernier("compare", folder / f"s{seed}", folder / f"q{seed}", "--json", shown=False))
        told = found["difference"]
        print(f"  seed {seed}: {found['verdict']}, {told['percent']:+.2f} %, p = {told['p']:.1g}")
    vernier("compare", f"{folder}/s*", "--against", f"{folder}/q*", "--gate", "better")
    vernier("compare", folder / "s1", folder / "q1", "--training", "--from-step", 60)


def main() -> None:
    """Trains the family where need be, and prints what it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/family"))
    folder = parser.parse_args().dir
    train(folder)
    facts = json.loads((folder / "data" / "dataset.json").read_text())["reference"]
    share = 100 * facts["largest_document_share"]
    families = f", {facts['families']} families" if "families" in facts else ""
    print(
        f"\nreference set: {facts['documents']} documents{families}, {facts['samples']} samples, largest {share:.2f} %"
    )
    vernier("compare", folder / "s1")
    single_steps(folder / "s1")
    vernier("compare", *(f"{folder / name}@{LAST}" for name in ("s1", "s2", "s3", "s4", "s5")))
    vernier("compare", f"{folder / 's1'}@{LAST}", f"{folder / 'q1'}@{LAST}", "--power", "0.01%")
    same_or_not(folder)
    learning_rates(folder)
    null_pairs(folder, list(combinations(["s1", "p2", "p3", "p4", "p5"], 2)))
    calibration(folder)


if __name__ == "__main__":
    main()
