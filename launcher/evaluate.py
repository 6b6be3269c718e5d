"""`vernier eval`: scores model directories on a reference set over a rank-group on this machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.devices import gpu_count
from configs.errors import EXIT_DONE, EXIT_USAGE, ConfigError, DataError, VernierError
from configs.whole import read_json
from launcher.processes import end, last_lines, start, torchrun


def run_eval(
    models: list[Path],
    reference_dir: Path,
    *,
    nproc: int,
    threads: int,
    out: Path | None,
    dtype: str | None,
    force: bool,
    shuffle_batches: int | None,
    trust_remote_code: bool,
    json_out: bool,
    console: Console,
) -> int:
    """Scores each model that has no table yet (all with `force`); prints where the tables are."""
    from eval.models import check_fits, check_model, scored_fingerprint, weights_fingerprint
    from eval.reference import load_reference
    from eval.tables import read_table

    if dtype is None:
        dtype = "bf16" if gpu_count() else "fp32"
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype: {dtype!r} should be fp32 or bf16")
    reference = load_reference(reference_dir)
    wanted: list[tuple[Path, Path]] = []
    tables: dict[Path, Path] = {}
    for model in models:
        check_model(model)
        check_fits(model, reference)
        path = table_for(model, reference.short_name, dtype, out)
        if path in tables.values():
            raise ConfigError(
                f"{model}: another of the models is named {model.name} as well; score it with its own --out"
            )
        tables[model] = path
        if path.is_file() and not force:
            meta = read_table(path).meta
            expected = scored_fingerprint(weights_fingerprint(model), dtype)
            if meta.get("model") == expected and meta.get("reference") == reference.tokens_fingerprint:
                console.print(f"{model}: scored already (--force scores it again)", markup=False, soft_wrap=True)
                continue
            raise ConfigError(
                f"{path}: holds the losses of another model; name another --out, or --force to replace them"
            )
        wanted.append((model, path))
    if wanted:
        _score(wanted, reference_dir, nproc, threads, dtype, shuffle_batches, trust_remote_code, console)
    rows = [{"model": str(m), "table": str(p), **_summary(p)} for m, p in tables.items()]
    if json_out:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['model']}: {row['loss']:.4f} ± {row['se']:.4f} nats per token  {row['table']}")
    return EXIT_DONE


def table_for(model: Path, reference: str, dtype: str, out: Path | None) -> Path:
    """Where a model's loss table goes: its run's `losses/` for a snapshot of a run, else `losses/` here."""
    from eval.scoring import OBJECTIVE
    from eval.tables import table_name

    model = model.absolute()
    name = table_name(model.name, OBJECTIVE, dtype)
    if out is not None:
        return out / name
    if model.parent.name == "snapshots" and (model.parent.parent / "config.yaml").is_file():
        return model.parent.parent / "losses" / reference / name
    return Path("losses") / reference / name


def _summary(path: Path) -> dict[str, float | int]:
    from eval.statistics import clustered_ratio
    from eval.tables import read_table

    table = read_table(path)
    mean = clustered_ratio(table.loss, table.tokens, table.document)
    return {"loss": mean.value, "se": mean.se, "samples": len(table.sample)}


def _score(
    wanted: list[tuple[Path, Path]],
    reference_dir: Path,
    nproc: int,
    threads: int,
    dtype: str,
    shuffle_batches: int | None,
    trust_remote_code: bool,
    console: Console,
) -> None:
    logs = Path(tempfile.mkdtemp(prefix="vernier-eval-"))
    arguments = ["--reference", str(reference_dir.absolute()), "--dtype", dtype, "--threads", str(threads)]
    arguments += ["--log-dir", str(logs)]
    if shuffle_batches is not None:
        arguments += ["--shuffle-batches", str(shuffle_batches)]
    if trust_remote_code:
        arguments += ["--trust-remote-code"]
    arguments += ["--models", *(str(m.absolute()) for m, _ in wanted)]
    arguments += ["--tables", *(str(p.absolute()) for _, p in wanted)]
    command, environment = torchrun("eval", arguments, nproc=nproc, threads=threads)
    process = start(command, environment, logs / "torchrun.log")
    try:
        code = process.wait()
    except KeyboardInterrupt:
        end(process)
        raise
    if code:
        for file in sorted(logs.glob("error-*.json")):
            raise told_by_rank(read_json(file))
        raise VernierError(
            f"eval: the rank-group failed (torchrun's exit code {code}); its logs are in {logs}\n"
            + last_lines(logs / "rank-0.log")
        )
    shutil.rmtree(logs, ignore_errors=True)


def told_by_rank(told: dict[str, Any]) -> VernierError:
    """The error that a rank wrote down, with its own exit code."""
    return DataError(told["error"]) if told["exit_code"] == EXIT_USAGE else VernierError(told["error"])
