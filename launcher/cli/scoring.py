"""Verbs that score and compare: eval, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.errors import ConfigError
from launcher.cli.base import JsonOption, app, example, people


@app.command(
    "eval",
    epilog=example(
        "vernier eval runs/demo/snapshots/step-00000240 --reference data/demo/reference --nproc 2",
        "vernier eval A B C --ensemble abc --reference REF",
        "vernier eval B --reference REF --until-verdict --against A",
    ),
)
def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Hugging Face model directories.")],
    reference: Annotated[Path, typer.Option(help="Directory of a reference set.")],
    nproc: Annotated[int, typer.Option(min=1, help="Ranks to score with.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads a rank; tables agree to the bit at equal ones.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory for the loss tables.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; default fp32 on CPU, bf16 on GPU.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="masked or pll for masked language models; default the reference set's own.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="replicated on every rank, sharded over them, or auto: by what a device holds.")
    ] = "auto",
    ensemble: Annotated[
        str | None, typer.Option(metavar="NAME", help="Score the mean of all the models' probabilities as NAME.")
    ] = None,
    until_verdict: Annotated[
        bool, typer.Option("--until-verdict", help="Stop as soon as the model is told apart from --against.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="A", help="A loss table, RUN@STEP or RUN, for --until-verdict.")
    ] = None,
    margin: Annotated[str, typer.Option(help="With --until-verdict: less than this is a verdict too.")] = "0%",
    by: Annotated[str, typer.Option(help="What starts the ranks: torchrun or mpirun.")] = "torchrun",
    force: Annotated[bool, typer.Option("--force", help="Score also what has its table.")] = False,
    start: Annotated[str, typer.Option(help="fork ranks once all is imported, or exec each.")] = "fork",
    shuffle_batches: Annotated[
        int | None, typer.Option(metavar="SEED", help="Meet batches in another order; the table must not change.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")
    ] = False,
    json_out: JsonOption = False,
) -> int:
    """Score models on a reference set, sample by sample."""
    from launcher.eval import EvalOptions, run_eval, settled

    if until_verdict != (against is not None):
        raise ConfigError("--until-verdict and --against A go together")
    asked = EvalOptions(
        nproc=nproc,
        threads=threads,
        by=by,
        start=start,
        dtype=dtype or "",
        objective=objective or "",
        weights=weights,
        ensemble=ensemble,
        against=against,
        margin=margin,
        force=force,
        shuffle_batches=shuffle_batches,
        trust_remote_code=trust_remote_code,
    )
    return run_eval(models, reference, settled(asked, reference), out=out, json_out=json_out, console=people())


@app.command(
    epilog=example(
        "vernier compare runs/demo",
        "vernier compare runs/demo@200 runs/demo@240 --json",
        "vernier compare runs/a runs/b --gate better --margin 0.05%",
        "vernier compare runs/a runs/b runs/c --parquet board.parquet",
        "vernier compare 'runs/a-*' --against 'runs/b-*' --gate better",
    )
)
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET", help="Loss tables, snapshots, RUN@STEP or RUN; one RUN: along it; three: all pairs."
        ),
    ],
    gate: Annotated[str | None, typer.Option(help="better or not-worse: exit 3 where it does not hold.")] = None,
    margin: Annotated[str | None, typer.Option(help="Of --gate: by how much, such as 0.05%; default 0.")] = None,
    of: Annotated[
        str | None,
        typer.Option(help="What --gate asks of: weights (default), run (with its noise), or recipe."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="B", help="Compare recipes over seeds: the runs of B, as a pattern or several times."),
    ] = None,
    seeds_from: Annotated[
        list[str] | None,
        typer.Option(metavar="RUNS", help="With --against: earlier runs that tell what seeds do; a pattern."),
    ] = None,
    power: Annotated[
        str | None, typer.Option(metavar="CHANGE", help="How many documents seeing a change of, say, 0.001% needs.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Break down by source, length, position (comma-separated).")] = None,
    changed: Annotated[int | None, typer.Option(metavar="N", help="Show the N samples that changed most.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The reference set, for --by and --changed; default the run's.")
    ] = None,
    advantage: Annotated[
        str | None, typer.Option(help="What B must gain over a new A, such as 0.4%; fades (--half-life, --age).")
    ] = None,
    half_life: Annotated[str | None, typer.Option(help="Time in which --advantage halves, such as 7d.")] = None,
    age: Annotated[str | None, typer.Option(help="How old A is, such as 14d.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Pair the training losses of two runs.")] = False,
    from_step: Annotated[int | None, typer.Option(min=0, help="First step of --training.")] = None,
    to_step: Annotated[int | None, typer.Option(min=0, help="Last step of --training.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw it there.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as flat rows too.")] = None,
    json_out: JsonOption = False,
) -> int:
    """Say whether B is really better than A, and how sure that is."""
    from launcher.compare.command import run_compare
    from launcher.compare.options import Options

    options = Options(
        gate=gate,
        margin=margin,
        of=of,
        against=tuple(against or ()),
        seeds_from=tuple(seeds_from or ()),
        power=power,
        by=by,
        changed=changed,
        reference=reference,
        parquet=parquet,
        plots=plots,
        training=training,
        from_step=from_step,
        to_step=to_step,
        advantage=advantage,
        half_life=half_life,
        age=age,
    )
    return run_compare(targets, json_out=json_out, console=people(out=True), options=options)


@app.command(epilog=example("vernier export runs/chat-lora --out my-model", "vernier export RUN@9 --out DIR --adapter"))
def export(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run: its best scored snapshot; or RUN@STEP.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model goes; a directory that is not there.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Adapters (LoRA) as they are, not added to the base's weights.")
    ] = False,
) -> int:
    """Write a checkpoint as a Hugging Face model directory of its own, with a model card."""
    from launcher.export import run_export

    return run_export(source, out, adapter=adapter)
