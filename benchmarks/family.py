"""A real family of runs: what single steps, pairing and verdicts are worth on it, and whether error rates hold.

Five runs of `benchmarks/family.yaml` (about ten minutes on two cores): a base, two with another seed, two with another
learning rate. `python -m benchmarks.family [--dir DIR]` trains what is not there yet, then prints everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.calibration import calibrate
from configs.run.directory import RunDir, step_name
from eval.compare.pair import compare_tables
from eval.tables import LossTable, read_table

RECIPE = Path(__file__).with_name("family.yaml")
RUNS = {
    "base": [],
    "lr33": ["optimizer.lr=3.3e-3"],
    "lr60": ["optimizer.lr=6.0e-3"],
    "seed2": ["seed=2"],
    "seed3": ["seed=3"],
}
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
    """Prepares the data and trains each run that is not done."""
    data = f"data.dir={folder / 'data'}"
    if not (folder / "data").exists():
        vernier("prepare", RECIPE, data)
    for name, settings in RUNS.items():
        if RunDir(folder / name).read_state().get("state") != "done":
            vernier("train", RECIPE, data, f"run.dir={folder / name}", *settings)


def single_steps(run: Path) -> None:
    """All eight pairs of neighbouring steps, whatever they show."""
    print("\nOne optimizer step: paired (clustered by document) and unpaired")
    for step in PAIRS:
        found = compare_tables(table(run, step), table(run, step + 1)).difference
        print(
            f"  {step:>3} → {step + 1}: change {found.percent:+.4f} % ± {found.se_percent:.4f} % (SE), "
            f"paired t {found.t:+6.2f}, unpaired t {found.t_unpaired:+.3f}, pairing gained {found.pairing_gain:.0f}×"
        )


def same_or_not(folder: Path) -> None:
    """The same weights at another world size are identical; in another dtype they are called that."""
    base, reference = folder / "base", folder / "data" / "reference"
    model = base / "snapshots" / step_name(LAST)
    for option, value in (("--nproc", 1), ("--nproc", 3), ("--dtype", "bf16")):
        out = folder / "again" / f"{option.strip('-')}-{value}"
        vernier("eval", model, "--reference", reference, option, value, "--out", out, shown=False)
        vernier("compare", f"{base}@{LAST}", next(out.glob("*.parquet")))


def training_curves(folder: Path) -> None:
    """Paired training losses of the runs that differ in learning rate only."""
    for name in ("lr33", "lr60"):
        vernier("compare", folder / "base", folder / name, "--training")


def calibration(folder: Path) -> None:
    """False claims and coverage on the tables of these runs."""
    base = folder / "base"
    pairs = {
        "base, 420 → 480": (table(base, 420), table(base, LAST)),
        "base, 150 → 151": (table(base, 150), table(base, 151)),
        "base → lr33": (table(base, LAST), table(folder / "lr33", LAST)),
        "base → lr60": (table(base, LAST), table(folder / "lr60", LAST)),
        "base → seed2": (table(base, LAST), table(folder / "seed2", LAST)),
        "seed2 → seed3": (table(folder / "seed2", LAST), table(folder / "seed3", LAST)),
    }
    print(
        "\nDocuments swapped at random 10,000 times: claims at 5 %; 95 % intervals from random quarters, 10,000 times"
    )
    print("  pair              documents (worth)  clustered  by window  coverage (of documents)")
    for name, (a, b) in pairs.items():
        print(_row(name, a, b))
    print("  the first documents only (reported, not promised):")
    for count in (40, 60, 80, 100):
        print(_row(f"{count}, 420 → 480", *pairs["base, 420 → 480"], count))


def _row(name: str, a: LossTable, b: LossTable, documents: int | None = None) -> str:
    found = calibrate(a, b, documents=documents)
    return (
        f"  {name:<18}{found.documents:>8} ({found.effective:.0f})  {found.claims:>11.3f}"
        f"  {found.claims_by_window:>9.3f}  {found.coverage:>8.3f} ({found.part})"
    )


def main() -> None:
    """Trains the family where need be, and prints what it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/family"))
    folder = parser.parse_args().dir
    train(folder)
    facts = json.loads((folder / "data" / "dataset.json").read_text())["reference"]
    share = 100 * facts["largest_document_share"]
    print(f"\nreference set: {facts['documents']} documents, {facts['samples']} samples, the largest {share:.2f} %")
    vernier("compare", folder / "base")
    single_steps(folder / "base")
    vernier("compare", *(f"{folder / name}@{LAST}" for name in RUNS))
    vernier("compare", f"{folder / 'base'}@{LAST}", f"{folder / 'lr33'}@{LAST}", "--power", "0.01%")
    same_or_not(folder)
    training_curves(folder)
    calibration(folder)


if __name__ == "__main__":
    main()
