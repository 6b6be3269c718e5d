"""`vernier eval`: scores model directories on a reference set over a rank-group on this machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.console import console as people
from configs.console import tell, waiting
from configs.devices import gpu_count
from configs.errors import EXIT_DONE, EXIT_USAGE, ConfigError, DataError, VernierError
from configs.files.atomic import read_json
from configs.files.paths import path_problems
from launcher.backends.agent import one_thread
from launcher.backends.local import local_group, start_here
from launcher.backends.mpi import mpirun
from launcher.backends.process import Started, end, last_lines, start
from launcher.compare.options import parse_margin
from launcher.restarts import RestartPolicy
from launcher.text import NATS, perplexity, typed
from launcher.watch.next_command import say_next

if TYPE_CHECKING:
    from eval.reference.set import ReferenceSet

CHOICES = {
    "dtype": ("fp32", "bf16"),
    "weights": ("auto", "replicated", "sharded"),
    "by": ("torchrun", "mpirun"),
    "start": ("fork", "exec"),
}
MOST_DEATHS = 1  # of rank-groups in a row without anything more scored; what they scored stays


@dataclass(frozen=True)
class EvalOptions:
    """How to score, and by what ranks. `settled` fills in what is left open."""

    nproc: int = 1
    threads: int = 1
    by: str = "torchrun"
    start: str = "fork"
    dtype: str = ""  # by the machine
    objective: str = ""  # the reference set's own
    weights: str = "auto"
    ensemble: str | None = None
    against: str | None = None
    margin: str = "0%"
    force: bool = False
    shuffle_batches: int | None = None
    trust_remote_code: bool = False


def run_eval(
    models: list[Path], reference_dir: Path, asked: EvalOptions, *, out: Path | None, json_out: bool, console: Console
) -> int:
    """Scores each model (or the ensemble of all) that has no table yet; prints where the tables are.

    Raises:
        ConfigError, DataError: as `score`.
    """
    rows = score(models, reference_dir, asked, out=out, console=console)
    if json_out:
        print(json.dumps(rows, indent=2))
        return EXIT_DONE
    for row in rows:
        size = f"{row['loss']:.4f} ± {row['se']:.4f} {row['unit']}"
        size += f", perplexity {perplexity(row['loss'])}" if row["unit"] == NATS else ""
        tell(f"{row['model']}: {size}  {row['table']}")
        if row.get("until_verdict"):
            tell(verdict_words(row["model"], row["until_verdict"]))
    tables = [typed(Path(row["table"])) for row in rows]
    say_next(people(), f"compare {' '.join(tables if len(tables) > 1 else ['OTHER', *tables])}")
    return EXIT_DONE


def score(
    models: list[Path], reference_dir: Path, asked: EvalOptions, *, out: Path | None, console: Console
) -> list[dict[str, Any]]:
    """Scores each model (or the ensemble of all) that has no table yet. Gives for each: `model`, `table` (its path),
    `loss` and `se` (nats per token, clustered by document), `samples`, and what a scoring until a verdict found.

    Raises:
        ConfigError, DataError: usage, or a model that cannot be scored on this set. Nothing is scored then.
    """
    with waiting("loading the libraries"), one_thread():
        from eval.reference.set import load_reference
        from eval.scoring.models import check_fits, check_model

    named = [("MODEL", model) for model in models] + [("--reference", reference_dir), ("--out", out or Path("."))]
    problems = [problem for key, path in named for problem in path_problems(key, path)]
    if problems:
        raise ConfigError(*problems)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is there and is no directory")
    with waiting("checking the reference set and the models"):
        reference = load_reference(reference_dir)
        for model in models:
            check_model(model)
            check_fits(model, reference)
    groups = [models] if asked.ensemble else [[model] for model in models]
    tables: list[Path] = []
    for group in groups:
        path = table_for(group[0], asked.ensemble, reference, asked, out)
        if path in tables:
            raise ConfigError(
                f"{group[0]}: another of the models is named {group[0].name} as well; score it with its own --out"
            )
        tables.append(path)
    against = _against(asked, reference)
    pairs = zip(groups, tables, strict=True)
    wanted = [pair for pair in pairs if not _is_scored(*pair, reference, asked, against, console)]
    if wanted:
        _score(wanted, reference_dir, asked, against, console)
    summaries = [_summary(table, reference, against, asked) for table in tables]
    return [{"model": _name(g), **summary} for g, summary in zip(groups, summaries, strict=True)]


def table_for(model: Path, ensemble: str | None, reference: ReferenceSet, asked: EvalOptions, out: Path | None) -> Path:
    """Where a loss table goes: a snapshot's run's `losses/`, else `losses/` here."""
    from eval.tables import table_name

    model = model.absolute()
    label, folder = ensemble or model.name, model.parent.name
    run = model.parent.parent
    of_run = folder in ("snapshots", "ema") and (run / "config.yaml").is_file()
    if folder == "ema" and of_run and not ensemble:
        label = f"{label}.ema"
    name = table_name(label, asked.objective, asked.dtype)
    if out is not None:
        return out / name
    return (run / "losses" if of_run else Path("losses")) / reference.short_name / name


def settled(asked: EvalOptions, reference_dir: Path) -> EvalOptions:
    """`asked` with dtype and objective filled in where they were left open: by the machine, by the reference set.

    Raises:
        ConfigError: which option has no such value.
    """
    with waiting("loading the libraries"), one_thread():
        from eval.reference.set import load_reference

    own = load_reference(reference_dir, check=False).objective
    out = replace(asked, dtype=asked.dtype or ("bf16" if gpu_count() else "fp32"), objective=asked.objective or own)
    if out.objective not in ("masked", "pll", own):
        raise ConfigError(f"--objective: {out.objective!r} does not fit this reference set; use {own}, masked or pll")
    for option, values in CHOICES.items():
        if getattr(out, option) not in values:
            raise ConfigError(f"--{option}: {getattr(out, option)!r} should be {' or '.join(values)}")
    if out.against is None and out.margin != "0%":
        raise ConfigError("--margin: goes with --until-verdict --against A")
    if out.against is not None and out.force:
        raise ConfigError("--force: scores the whole set again; leave out --until-verdict")
    return out


def _against(asked: EvalOptions, reference: ReferenceSet) -> Path | None:
    if asked.against is None:
        return None
    from eval.compare.targets import Scale, resolve_scale
    from eval.scoring.early_stop import UntilVerdict
    from eval.tables import read_table

    scale = Scale(reference.tokens_fingerprint[:8], asked.objective, asked.dtype)
    path = resolve_scale(asked.against, scale)
    UntilVerdict(reference, read_table(path), parse_margin(asked.margin))  # refuses now what it would refuse later
    return path


def _name(group: list[Path]) -> str:
    return str(group[0]) if len(group) == 1 else " + ".join(str(model) for model in group)


def _is_scored(
    group: list[Path], path: Path, reference: ReferenceSet, asked: EvalOptions, against: Path | None, console: Console
) -> bool:
    """Whether there is nothing to do for a table. Refuses to replace the losses of another model."""
    from eval.scoring.models import scored_fingerprint, settings_fingerprint, weights_fingerprint
    from eval.scoring.score import ensemble_source
    from eval.tables import partial_path, read_table

    if asked.force:
        return False
    source = ensemble_source([weights_fingerprint(model) for model in group])
    expected = scored_fingerprint(source, asked.dtype, "".join(settings_fingerprint(model) for model in group))

    def same(meta: dict[str, Any]) -> bool:
        return bool(meta.get("model") == expected and meta.get("reference") == reference.tokens_fingerprint)

    if path.is_file():
        if not same(read_table(path).meta):
            raise ConfigError(
                f"{path}: holds the losses of another model; name another --out, or --force to replace them"
            )
        console.print(f"{_name(group)}: scored already (--force scores it again)", markup=False, soft_wrap=True)
        return True
    part = partial_path(path)
    if against is None or not part.is_file() or not same(read_table(part).meta):
        return False
    if _looks(part, reference, against, asked)["verdict"] == "not settled":
        return False
    console.print(f"{_name(group)}: scored until this verdict already", markup=False, soft_wrap=True)
    return True


def _looks(table: Path, reference: ReferenceSet, against: Path, asked: EvalOptions) -> dict[str, Any]:
    """What the looks at a table's losses come to: of a part as it was stopped, or of all."""
    from eval.scoring.early_stop import UntilVerdict
    from eval.tables import read_table

    look = UntilVerdict(reference, read_table(against), parse_margin(asked.margin))
    look.all_looks(read_table(table).loss)
    return {**look.to_json(), "against_label": asked.against}


def _summary(table: Path, reference: ReferenceSet, against: Path | None, asked: EvalOptions) -> dict[str, Any]:
    from eval.statistics import clustered_ratio
    from eval.tables import partial_path, read_table, unit_of

    path = table if table.is_file() else partial_path(table)
    found = read_table(path)
    mean = clustered_ratio(found.loss, found.tokens, found.cluster)
    out = {"table": str(path), "loss": mean.value, "se": mean.se, "samples": len(found), "unit": unit_of(found)}
    if against is not None:
        out["until_verdict"] = _looks(path, reference, against, asked)
    return out


def verdict_words(model: str, told: dict[str, Any]) -> str:
    """What a scoring until a verdict found: the interval that holds at every look, not the inflated estimate."""
    documents = f"{told['documents']} of {told['of_documents']} documents"
    part = f"{told['samples']:,} of {told['of_samples']:,} samples ({documents})"
    low, high = told["interval95_percent"]
    say = {
        "better": f"is better than {told['against_label']}",
        "worse": f"is worse than {told['against_label']}",
        "not settled": f"and {told['against_label']} are not told apart",
    }.get(told["verdict"], f"differs from {told['against_label']} by less than {told['margin_percent']:g} %")
    return (
        f"  {Path(model).name} {say}: the change lies between {low:+.3g} % and {high:+.3g} % "
        f"(95 %, valid at every look); after {part}"
    ).replace(" -", " −")


def _score(
    wanted: list[tuple[list[Path], Path]],
    reference_dir: Path,
    asked: EvalOptions,
    against: Path | None,
    console: Console,
) -> None:
    logs = Path(tempfile.mkdtemp(prefix="vernier-eval-"))
    arguments = _arguments(wanted, reference_dir, asked, against, logs)
    restarts = RestartPolicy(MOST_DEATHS)
    while True:
        for file in logs.glob("fault-*.json"):
            file.unlink()
        with waiting("starting the ranks: PyTorch and the model are loaded"):
            process = _start(arguments, asked, logs / "ranks.log")
        try:
            code = process.wait()
        except KeyboardInterrupt:
            end(process)
            raise
        if code == 0:
            shutil.rmtree(logs, ignore_errors=True)
            return
        for file in sorted(logs.glob("error-*.json"), key=lambda told: told.stat().st_mtime):
            raise told_by_rank(read_json(file))
        started = any(logs.glob("rank-*.log"))
        if started and restarts.after(_kept(wanted)) is not None:
            console.print("a rank died; what was scored stays, the rest is scored now", style="yellow")
        else:
            break
    faults = sorted(logs.glob("fault-*.json"), key=lambda told: told.stat().st_mtime)
    said = read_json(faults[0])["error"] if faults else last_lines(logs / "ranks.log")
    raise VernierError(
        f"eval: the rank-group failed (exit code {code}); what was scored is kept, and the same command goes on; "
        f"logs: {logs}\n{said}"
    )


def _kept(wanted: list[tuple[list[Path], Path]]) -> int:
    """Tables, and pieces of tables, on disk: more after a death than before says that another start is worth it."""
    from eval.scoring.journal import folder_of

    return sum(table.is_file() + len(list(folder_of(table).glob("*"))) for _, table in wanted)


def _start(arguments: list[str], asked: EvalOptions, log: Path) -> Started:
    if asked.by == "mpirun":
        return start(*mpirun("eval", arguments, nproc=asked.nproc, threads=asked.threads), log)
    return start_here(*local_group("eval", arguments, nproc=asked.nproc, threads=asked.threads, start=asked.start), log)


def _arguments(
    wanted: list[tuple[list[Path], Path]], reference_dir: Path, asked: EvalOptions, against: Path | None, logs: Path
) -> list[str]:
    arguments = ["--reference", str(reference_dir.absolute()), "--dtype", asked.dtype, "--threads", str(asked.threads)]
    arguments += ["--objective", asked.objective, "--weights", asked.weights, "--log-dir", str(logs), "--checked"]
    if asked.force:
        arguments += ["--fresh"]
    if asked.shuffle_batches is not None:
        arguments += ["--shuffle-batches", str(asked.shuffle_batches)]
    if asked.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if asked.ensemble:
        arguments += ["--ensemble"]
    if against is not None:
        arguments += ["--against", str(against.absolute()), "--margin", str(parse_margin(asked.margin))]
    arguments += ["--models", *(str(model.absolute()) for group, _ in wanted for model in group)]
    arguments += ["--tables", *(str(table.absolute()) for _, table in wanted)]
    return arguments


def told_by_rank(told: dict[str, Any]) -> VernierError:
    """The error that a rank wrote down, with its own exit code."""
    return DataError(told["error"]) if told["exit_code"] == EXIT_USAGE else VernierError(told["error"])
