"""The `vernier` command line: one function a verb, which says what it takes and hands over to its module.

Nothing heavy is imported here: `vernier --help` must answer at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.console import console, open_streams, tell
from configs.errors import ConfigError
from configs.own import put_first_for_children
from configs.process import end_at_once
from launcher.ends import code_of

app = typer.Typer(
    name="vernier",
    help="Train language models, and tell to a thousandth of a percent whether a checkpoint is really better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe: demo, wsb.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _example(*lines: str) -> str:
    return "Example:\n\n" + "\n\n".join(f"  {line}" for line in lines)


@app.command(epilog=_example("vernier init my-project"))
def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write it.")] = Path("."),
) -> int:
    """Write a commented starter config, asking nothing."""
    from launcher.init import run_init

    tell(f"wrote {run_init(directory)}")
    return 0


@app.command(epilog=_example("vernier prepare demo", "vernier prepare my.yaml data.vocab_size=16384"))
def prepare(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe: demo, wsb.")] = None,
    overrides: OverridesArgument = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Prepare anew; what is there moves to NAME.old-TIME.")] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="Tokenize this reference set's documents again (with --tokenizer, --out)."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Directory with the other tokenizer.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Targets a window of the new reference set; default as before.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the new reference set goes.")] = None,
    verify: Annotated[Path | None, typer.Option(metavar="DATA", help="Hash it again; exit 3 if it changed.")] = None,
    json_out: JsonOption = False,
) -> int:
    """Turn texts into training shards and a frozen reference set."""
    from launcher.prepare import run_prepare, run_retokenize, run_verify

    if verify is not None:
        return run_verify(verify, json_out=json_out)
    if reference is not None:
        return run_retokenize(reference, tokenizer, out, sequence_length)
    return run_prepare(config, overrides or [], fresh=fresh, json_out=json_out)


@app.command(epilog=_example("vernier train demo", "vernier train my.yaml optimizer.lr=3e-4 run.dir=runs/lr3e-4"))
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; the old run moves to NAME.old-TIME.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Go on beyond the steps it was started with.")] = False,
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="Go on with settings that may not change; says what that breaks.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until all snapshots are scored.")] = False,
) -> int:
    """Train here, or go on with a run; checkpoints are scored beside it."""
    from configs.load import load_config
    from launcher.options import Resume
    from launcher.train.command import run_train

    if fresh and force_resume:
        raise ConfigError("--fresh and --force-resume exclude each other: one starts anew, the other goes on")
    how = Resume(fresh=fresh, extend=extend, force=force_resume)
    return run_train(load_config(config, overrides or []), how, wait=not no_wait, console=_console())


@app.command(
    epilog=_example(
        "vernier launch my.yaml --on slurm launch.nodes=4 launch.gpus_per_node=8",
        "vernier launch my.yaml --on slurm --site my-cluster --dry-run",
        "vernier launch my.yaml --on slurm --sweep optimizer.lr=1e-4,3e-4,1e-3 --seeds 3",
        "vernier launch my.yaml --on ssh --hosts a,b launch.nodes=2",
    )
)
def launch(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    on: Annotated[str, typer.Option(help="slurm, local, mpi, ssh or skypilot.")] = "slurm",
    site: Annotated[str | None, typer.Option(help="A site profile, by name or file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, do nothing.")] = False,
    template: Annotated[Path | None, typer.Option(help="An own job template, or a folder of them.")] = None,
    exclude_bad: Annotated[
        bool, typer.Option("--exclude-bad", help="Without the nodes that the last preflight named.")
    ] = False,
    only: Annotated[str | None, typer.Option(help="train or eval: submit that job alone.")] = None,
    hosts: Annotated[str | None, typer.Option(help="Of mpi and ssh: names with commas between, or a file.")] = None,
    runs: Annotated[str | None, typer.Option(help="Of skypilot: a bucket or volume that outlives the nodes.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="A run for each value; may be given several times.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of a sweep: so many seeds of each.")] = 1,
    sweep_dir: Annotated[Path | None, typer.Option(help="Where a sweep goes; default RUN-sweep.")] = None,
    at_once: Annotated[int, typer.Option(min=0, help="Of a sweep: runs side by side; 0: all.")] = 0,
    extend: Annotated[bool, typer.Option("--extend", help="Go on beyond the steps it was started with.")] = False,
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="Go on with settings that may not change; says what that breaks.")
    ] = False,
) -> int:
    """Train on a cluster: plan the jobs, submit them, go on with a run."""
    from launcher.launch.command import run_launch
    from launcher.options import Launch, SweepAsked

    how = Launch(
        on=on,
        site=site,
        dry_run=dry_run,
        template=template,
        exclude_bad=exclude_bad,
        extend=extend,
        force=force_resume,
        only=only,
        hosts=hosts,
        runs=runs,
    )
    asked = SweepAsked(tuple(sweep or ()), seeds, sweep_dir, at_once) if sweep or seeds > 1 else None
    if asked is None and (sweep_dir is not None or at_once):
        raise ConfigError("--sweep-dir and --at-once go with --sweep or --seeds")
    return run_launch(config, overrides or [], how, asked, _console(out=True))


@app.command(
    "eval",
    epilog=_example(
        "vernier eval runs/demo/snapshots/step-00000240 --reference data/demo/reference --nproc 2",
        "vernier eval A B C --ensemble abc --reference REF",
        "vernier eval B --reference REF --until-verdict --against A",
    ),
)
def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Hugging Face model directories.")],
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
    return run_eval(models, reference, settled(asked, reference), out=out, json_out=json_out, console=_console())


@app.command(
    epilog=_example(
        "vernier compare runs/demo",
        "vernier compare runs/demo@200 runs/demo@240 --json",
        "vernier compare runs/a runs/b --gate better --margin 0.05%",
        "vernier compare runs/a runs/b runs/c --parquet board.parquet",
    )
)
def compare(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B...]", help="Loss tables, snapshots, RUN@STEP or RUN; one RUN: along it; three: all pairs."
        ),
    ],
    gate: Annotated[str | None, typer.Option(help="better or not-worse: exit 3 where it does not hold.")] = None,
    margin: Annotated[str | None, typer.Option(help="Of --gate: by how much, such as 0.05%; default 0.")] = None,
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
    return run_compare(targets, json_out=json_out, console=_console(out=True), options=options)


@app.command(epilog=_example("vernier board runs/demo"))
def board(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories; default all.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
) -> int:
    """Watch runs in TensorBoard, on loopback, with the ssh line to paste."""
    from launcher.watch.tensorboard import run_board

    return run_board(runs or [], port=port, console=_console(out=True))


@app.command(
    epilog=_example(
        "vernier plan demo", "vernier plan my.yaml launch.nodes=8 launch.gpus_per_node=8 --memory 80GiB --flops 3e14"
    )
)
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    flops: Annotated[
        float | None, typer.Option(help="Operations/s a rank attains; default the run's own, else a trial here.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of a rank's device, such as 80GiB; default what is here.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of a rank in its node; default 200 on GPUs, 2 on CPU.")
    ] = None,
    node_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s between nodes, a node; default 50, on CPU 1.25.")
    ] = None,
    latency: Annotated[float, typer.Option(help="Microseconds of a hop between ranks.")] = 5.0,
    json_out: JsonOption = False,
) -> int:
    """Reckon what a training would take, before it starts: memory, time, host memory, disk."""
    from launcher.plan.command import run_plan
    from launcher.plan.estimate import Given

    given = Given(flops, memory, bandwidth, node_bandwidth, latency)
    return run_plan(config, overrides or [], json_out=json_out, console=_console(out=True), given=given)


@app.command(epilog=_example("vernier logs my-run", "vernier logs runs/demo --rank 3 --follow"))
def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's or sweep's folder, or a known run's name.")],
    rank: Annotated[int | None, typer.Option(min=0, help="Default: the first that failed, else 0.")] = None,
    evaluator: Annotated[bool, typer.Option("--eval", help="Of the eval rank-group.")] = False,
    job: Annotated[bool, typer.Option("--job", help="Of the job's script (with --eval: of its own).")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    lines: Annotated[int, typer.Option(min=1, help="How many to begin with.")] = 50,
) -> int:
    """Show a rank's log: the first that failed, else rank 0."""
    from launcher.watch.logs import Wanted, run_logs

    if job and rank is not None:
        raise ConfigError("--job is a log of its own; leave --rank out")
    wanted = Wanted(rank=rank, evaluator=evaluator, job=job)
    return run_logs(run, wanted, follow=follow, console=_console(out=True), lines=lines)


@app.command(epilog=_example("vernier stop my-run", "vernier stop runs/demo --now"))
def stop(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's or sweep's folder, or a known run's name.")],
    now: Annotated[bool, typer.Option("--now", help="With little patience for a checkpoint.")] = False,
) -> int:
    """Stop a run with a checkpoint, wherever it runs."""
    from launcher.watch.stop import run_stop

    return run_stop(run, now=now, console=_console(out=True))


@app.command(epilog=_example("vernier doctor", "vernier doctor runs/demo"))
def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run: its folder, its last preflight.")] = None,
    json_out: JsonOption = False,
) -> int:
    """Try whether this machine can train and score, and say what to do where it cannot."""
    from launcher.preflight.doctor import run_doctor

    return run_doctor(run, json_out=json_out, console=_console(out=True))


@app.command(epilog=_example("vernier status", "vernier status runs/demo --events"))
def status(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories; default all.")] = None,
    events: Annotated[bool, typer.Option("--events", help="What happened besides steps, oldest first.")] = False,
    all_events: Annotated[bool, typer.Option("--all", help="With --events: all, not the last 50.")] = False,
    json_out: JsonOption = False,
) -> int:
    """Say how runs stand: step, loss, time left, checkpoints, scores, and why one has ended."""
    from launcher.watch.status import run_status

    if all_events and not events:
        raise ConfigError("--all goes with --events")
    return run_status(runs or [], events=events, all_events=all_events, json_out=json_out, console=_console(out=True))


def _console(*, out: bool = False):  # type: ignore[no-untyped-def]  # rich is not imported for its name alone
    return console() if out else console(sys.stderr, soft_wrap=True)


def main() -> None:
    """Entry point of `vernier`: runs a verb, tells errors in a line, ends with the exit codes of configs.errors."""
    open_streams()
    put_first_for_children(os.environ)
    end_at_once(code_of(lambda: app(standalone_mode=False)))


if __name__ == "__main__":
    main()
