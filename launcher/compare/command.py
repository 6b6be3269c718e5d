"""`vernier compare`: choose what to compare, compare, present, hold the gate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from configs.console import tell, waiting
from configs.errors import EXIT_DONE, EXIT_VERDICT, ConfigError
from launcher.compare.options import Options, check_options
from launcher.compare.results import Result, compare_pair, compare_targets
from launcher.text import say, signed
from launcher.watch.next_command import say_next

if TYPE_CHECKING:
    from eval.compare.gate import Gate, Question
    from eval.compare.pair import Comparison
    from eval.compare.recipes import RecipeComparison

NOTHING = Options()
OF = {"weights": "these weights", "run": "runs, with their noise", "recipe": "recipes"}


def run_compare(targets: list[str], *, json_out: bool, console: Console, options: Options = NOTHING) -> int:
    """Compares and prints; gives the exit code: 0, or 3 where a gate does not hold.

    Args:
        targets: two tables, snapshots, `RUN@STEP`s or runs; three or more of them; one run; or one sweep.

    Raises:
        ConfigError, DataError: usage, or nothing that can be compared.
    """
    gate, _, question = options.wanted_gate, options.margin_percent, options.question  # what is wrong is said first
    if question != "recipe" and options.against:
        raise ConfigError(f"--of {question}: --against compares recipes; use --of recipe, or leave it out")
    check_options(targets, options)
    with waiting("reading the losses"):
        from launcher.sweep.table import compare_sweep

        swept = compare_sweep(targets, options.given(), json_out=json_out, console=console, plots=options.plots)
    if swept is not None:
        return swept
    if options.advantage is not None:
        return _advantage(targets, json_out, options, console)
    with waiting("comparing"):
        result = compare_targets(targets, options)
    upper = None if gate is None or result.gated is None else upper_percent(result.gated, question)
    present(result, console, json_out=json_out, parquet=options.parquet, plots=options.plots)
    if gate is None or result.gated is None or upper is None:
        if not json_out:
            say_next(console, *result.next_commands(targets))
        return EXIT_DONE
    return _hold(result.gated, upper, gate, options, json_out, console)


def present(
    result: Result, console: Console, *, json_out: bool, parquet: Path | None = None, plots: Path | None = None
) -> None:
    """Says it, as JSON or in words, and writes what was asked for.

    Raises:
        DataError: a file cannot be written.
    """
    if json_out:
        print(json.dumps(result.to_json(), indent=2, allow_nan=False))
        for note in result.notes:
            tell(note, sys.stderr)
    else:
        result.show(console)
    if parquet is not None:
        from eval.compare.parquet import write_rows

        rows = result.rows()
        replaced = write_rows(parquet, rows)
        count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
        _tell(f"wrote {parquet}, {count}{', in the place of an older result' * replaced}", json_out, console)
    for path in result.plot(plots) if plots is not None else ():
        _tell(f"wrote {path}, and as .pdf and .svg", json_out, console)


def _advantage(targets: list[str], json_out: bool, options: Options, console: Console) -> int:
    from launcher.compare.advantage import say_advantage
    from launcher.compare.report import print_comparison

    comparison = compare_pair(targets, NOTHING).comparison
    if not json_out:
        print_comparison(comparison, console)
    rule = (str(options.advantage), str(options.half_life), str(options.age))
    return say_advantage(comparison, *rule, json_out=json_out, console=console)


def _tell(line: str, json_out: bool, console: Console) -> None:
    if json_out:
        tell(line, sys.stderr)  # stdout is the JSON's alone
    else:
        say(console, line)


def upper_percent(gated: Comparison | RecipeComparison, question: Question) -> float:
    """The upper bound of a change that a gate is held against.

    Raises:
        ConfigError: that question cannot be answered.
    """
    from eval.compare.gate import upper_bound
    from eval.compare.recipes import RecipeComparison

    return gated.ci95_percent[1] if isinstance(gated, RecipeComparison) else upper_bound(gated, question)


def _hold(
    gated: Comparison | RecipeComparison, upper: float, gate: Gate, options: Options, json_out: bool, console: Console
) -> int:
    from eval.compare.gate import gate_holds

    question, margin_percent = options.question, options.margin_percent
    holds = gate_holds(gated, gate, margin_percent, upper_percent=upper)
    limit = -margin_percent if gate == "better" else margin_percent
    line = (
        f"gate {gate}, of {OF[question]}, {gated.a.name} → {gated.b.name}: {'holds' if holds else 'does not hold'}; "
        f"the upper 95 % bound of the change is {signed(upper, 3)} %, to be below {limit + 0.0:g} %"
    )
    if gated.verdict in ("identical", "same weights"):
        line = f"{line.partition(';')[0]}; the two are {gated.verdict.replace('same', 'the same')}"
    if json_out:
        tell(line, sys.stderr)
    else:
        say(console, line, "green" if holds else "red")
    return EXIT_DONE if holds else EXIT_VERDICT
