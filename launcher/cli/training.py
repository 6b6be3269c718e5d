"""Verbs that make data and train: init, prepare, train, twin, launch, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.console import tell
from configs.errors import ConfigError
from launcher.cli.base import ConfigArgument, JsonOption, OverridesArgument, RunArgument, app, example, people


@app.command(epilog=example("vernier init my-project"))
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")] = Path("."),
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe, such as chat-lora; see the list above.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="What data.source is.")] = None,
    model: Annotated[str | None, typer.Option(metavar="DIR", help="The model that a recipe trains on.")] = None,
) -> int:
    """Write a commented starter config, or a recipe filled in, asking nothing.

    Recipes: demo, wsb, continue, chat-lora, classify, code, roberta-mlm, nanogpt-char, pretrain-7b-64gpu.
    """
    from launcher.init import run_init
    from launcher.text import typed
    from launcher.watch.next_command import say_next

    path = run_init(directory, recipe, data, model)
    tell(f"wrote {path}")
    say_next(people(out=True), f"prepare {typed(path)}", f"plan {typed(path)}")
    return 0


@app.command(epilog=example("vernier prepare demo", "vernier prepare my.yaml data.vocab_size=16384"))
def prepare(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a recipe.")] = None,
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


@app.command(epilog=example("vernier train demo", "vernier train my.yaml optimizer.lr=3e-4 run.dir=runs/lr3e-4"))
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
    found = load_config(config, overrides or [])
    code = run_train(found, how, wait=not no_wait, console=people())
    if not found.twins.count:
        return code
    from launcher.train.twins import after_training

    return after_training(found, code, console=people())


@app.command(epilog=example("vernier twin runs/demo", "vernier twin runs/demo --at 240 --count 3 --steps 200"))
def twin(
    run: RunArgument,
    at: Annotated[
        int, typer.Option(min=0, help="Step to start from: 0, the start, or one that has a checkpoint still.")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many twins.")] = 2,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps each makes; default to the run's end, at most 1,000.")
    ] = None,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Make their folders only, to train each with train or launch.")
    ] = False,
) -> int:
    """Measure a run's training noise: train on copies that differ in the last bit of each weight."""
    from launcher.train.twins import TwinsAsked, run_twin
    from launcher.watch.run_index import find

    return run_twin(find(run).path, TwinsAsked(count, at, steps, train=not no_train), console=people())


@app.command(
    epilog=example(
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
    """Train on a cluster: plan the jobs, submit them, resume a run."""
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
    return run_launch(config, overrides or [], how, asked, people(out=True))


@app.command(
    epilog=example(
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
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Draw the learning rate, here and into NAME-schedule.png; nothing else.")
    ] = False,
    json_out: JsonOption = False,
) -> int:
    """Estimate what a training takes, before it starts: memory, time, disk."""
    from launcher.plan.command import run_plan, run_schedule
    from launcher.plan.estimate import Given

    if schedule:
        return run_schedule(config, overrides or [], people(out=True))

    given = Given(flops, memory, bandwidth, node_bandwidth, latency)
    return run_plan(config, overrides or [], json_out=json_out, console=people(out=True), given=given)
