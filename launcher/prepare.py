"""`vernier prepare`: data preparation with its progress and its report; and a reference set tokenized again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.errors import EXIT_DONE, ConfigError
from configs.load import load_config, resolve


def run_prepare(source: str | None, overrides: list[str], *, fresh: bool, json_out: bool) -> int:
    """Prepares the data of a config, or says that it is there; prints the data report."""
    if source is None:
        raise ConfigError("prepare: give CONFIG, or --reference with --tokenizer and --out")
    from trainer.data.prepare import prepare

    config = resolve(load_config(source, overrides))
    console = Console(stderr=True, highlight=False)
    report = prepare(config, fresh=fresh, say=lambda text: console.print(text, markup=False, soft_wrap=True))
    if json_out:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print_report(report, config.data_dir, Console(highlight=False))
    return EXIT_DONE


def run_retokenize(reference: Path, tokenizer: Path | None, out: Path | None) -> int:
    """Tokenizes the documents of a reference set with another tokenizer, into a new reference set."""
    if tokenizer is None or out is None:
        raise ConfigError("prepare --reference: give --tokenizer DIR and --out DIR as well")
    from trainer.data.prepare import retokenize

    retokenize(reference, tokenizer, out)
    print(f"wrote {out}")
    return EXIT_DONE


def _print_report(report: dict[str, Any], data_dir: Path, console: Console) -> None:
    console.print_json(json.dumps(report))
    table = Table(box=None, show_header=False)
    table.add_row("data", str(data_dir))
    console.print(table)
