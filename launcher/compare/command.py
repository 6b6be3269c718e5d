"""`vernier compare`: what was asked, whether it makes sense, and what it ends with; the words are in `report`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.console import tell
from configs.errors import EXIT_DONE, EXIT_VERDICT, ConfigError
from launcher.compare.report import power_words, print_comparison, print_leaderboard, print_run_table
from launcher.text import say, signed

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.pair import Comparison, Gate
    from eval.compare.targets import Found
    from eval.tables import LossTable


BY = ("source", "length", "position")


@dataclass(frozen=True)
class More:
    """What may be asked besides the verdict; each named as its option is."""

    power: str | None = None
    by: str | None = None
    changed: int | None = None
    reference: Path | None = None
    parquet: Path | None = None
    plots: Path | None = None
    training: bool = False
    from_step: int | None = None
    to_step: int | None = None
    advantage: str | None = None
    half_life: str | None = None
    age: str | None = None

    def given(self) -> set[str]:
        """The options that were given, as they are typed."""
        empty = More()
        return {
            f"--{field.name.replace('_', '-')}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(empty, field.name)
        }


NOTHING = More()


def run_compare(
    targets: list[str],
    *,
    json_out: bool,
    gate: str | None,
    margin: str | None,
    console: Console,
    more: More = NOTHING,
) -> int:
    """Compares and prints; gives the exit code: 0, or 3 where a gate does not hold.

    Args:
        targets: two tables, snapshots, `RUN@STEP`s or runs; three or more of them; or one run.
        gate: None, "better" or "not-worse". On a run: the last step against the one scored before.
        margin: of the gate, in percent, such as "0.05%"; None: 0, and the only one without a gate.

    Raises:
        ConfigError: usage, or nothing that can be compared.
    """
    wanted = _gate(gate)
    margin_percent = parse_margin("0%" if margin is None else margin)
    _check(targets, more, gated=wanted is not None, with_margin=margin is not None)
    from launcher.sweep.table import compare_sweep

    gated = ["--gate"] * (gate is not None) + ["--margin"] * (margin is not None)
    swept = compare_sweep(targets, [*sorted(more.given()), *gated], json_out=json_out, console=console)
    if swept is not None:
        return swept
    power_percent = None if more.power is None else _parse_power(more.power)
    by = _parse_by(more.by)
    if more.training:
        from launcher.compare.training import run_curves

        return run_curves(
            *targets, first=more.from_step, last=more.to_step, json_out=json_out, plots=more.plots, console=console
        )
    if len(targets) > 2:
        return _leaderboard(targets, json_out, more, console)
    if len(targets) == 1:
        comparison = _along_run(targets[0], json_out, wanted, power_percent, more, console)
    elif more.advantage is not None:
        return _advantage(targets, json_out, more, console)
    else:
        comparison = _pair(targets, json_out, power_percent, by, more, console)
    if wanted is None or comparison is None:
        return EXIT_DONE
    return _hold(comparison, wanted, margin_percent, json_out, console)


def _check(targets: list[str], more: More, *, gated: bool, with_margin: bool) -> None:
    """Refuses what makes no sense together, in one line.

    Raises:
        ConfigError: names the option and what it goes with.
    """
    given = more.given()
    gate = ["--gate"] * gated + ["--margin"] * with_margin
    if not targets:
        raise ConfigError("compare: expected two or more tables, snapshots, runs or RUN@STEPs, or one run; got none")
    count = len(targets)
    pair_only = sorted(given & {"--by", "--changed", "--advantage"})
    if pair_only and count != 2:
        raise ConfigError(f"{pair_only[0]}: is about two; {count} given, expected A B")
    if "--changed" in given and (more.changed or 0) < 1:
        raise ConfigError(f"--changed: {more.changed} is not a number of samples of 1 or more")
    if more.training:
        if count != 2:
            raise ConfigError(f"--training: compares the training losses of two runs; {count} given")
        other = sorted(given - {"--training", "--plots", "--from-step", "--to-step"}) + gate
        if other:
            raise ConfigError(f"--training: does not go with {other[0]}, which is about loss tables")
        return
    steps = sorted(given & {"--from-step", "--to-step"})
    if steps:
        raise ConfigError(f"{steps[0]}: is about training losses; give --training too")
    if "--reference" in given and not given & {"--by", "--changed"}:
        raise ConfigError(
            "--reference: only --by and --changed read a reference set; a comparison needs the tables alone"
        )
    three = {"--advantage", "--half-life", "--age"}
    if given & three:
        if not three <= given:
            raise ConfigError(f"{sorted(given & three)[0]}: --advantage, --half-life and --age go together")
        other = sorted(given - three) + gate
        if other:
            raise ConfigError(f"--advantage: does not go with {other[0]}; ask for the two one after the other")
    if with_margin and not gated:
        raise ConfigError("--margin: is how much a gate allows; give --gate better or --gate not-worse too")
    if count > 2 and gated:
        raise ConfigError(f"--gate: holds one comparison; {count} targets given, expected A B or one run")
    if count > 2 and "--power" in given:
        raise ConfigError(f"--power: goes by the spread of one pair; {count} targets given, expected A B or one run")


def _gate(text: str | None) -> Gate | None:
    if text is None or text == "better" or text == "not-worse":
        return text  # type: ignore[return-value]
    raise ConfigError(f"--gate: {text!r} is not a verdict; use better or not-worse")


def parse_margin(text: str) -> float:
    """Percent in a margin such as `0.05%`, `0.05 %` or `0.05`."""
    value = _percent(text)
    if not value >= 0:
        raise ConfigError(f"--margin: {text!r} is not a percentage of 0 or more, such as 0.05%")
    return value


def _parse_power(text: str) -> float:
    value = _percent(text)
    if not value >= 1e-9:  # below, the count of documents is beyond any number that could be meant
        raise ConfigError(f"--power: {text!r} is not a percentage above 0, such as 0.001%")
    return value


def _percent(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _parse_by(text: str | None) -> list[str]:
    if text is None:
        return []
    wanted = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in wanted:
        if word not in BY:
            raise ConfigError(f"--by: {word!r} is none of {', '.join(BY)}")
    return wanted


def _compare_two(targets: list[str]) -> tuple[Comparison, LossTable, LossTable, list[Found]]:
    from eval.compare.along_run import with_wobble
    from eval.compare.pair import compare_tables
    from eval.compare.targets import find_tables
    from eval.tables import read_table

    found = find_tables(targets)
    a, b = (read_table(one.path) for one in found)
    comparison = compare_tables(a, b, names=(found[0].name, found[1].name))
    return with_wobble(comparison, found[0], found[1], {}), a, b, found


def _pair(
    targets: list[str], json_out: bool, power_percent: float | None, by: list[str], more: More, console: Console
) -> Comparison:
    from eval.compare.targets import find_reference

    comparison, a, b, found = _compare_two(targets)
    content = comparison.to_json()
    reference = find_reference(more.reference, a, found) if by or more.changed is not None else None
    breakdowns: list[Any] = []
    changed: Any = None
    if by:
        from eval.compare.breakdown import breakdown

        sources, length = _sources(reference) if "source" in by else None, _length(reference)
        breakdowns = [breakdown(a, b, one, sources=sources, sequence_length=length) for one in by]
        breakdowns = [replace(one, a=found[0].name, b=found[1].name) for one in breakdowns]  # labels are but steps
        content["breakdown"] = [one.to_json() for one in breakdowns]
    if more.changed is not None:
        from eval.compare.most_changed import most_changed

        if reference is None:
            raise ConfigError("--changed: needs the texts, and no run here says where they are; give --reference REF")
        changed = most_changed(a, b, reference, more.changed)
        changed = replace(changed, a=found[0].name, b=found[1].name)
        content["changed"] = changed.to_json()
    if json_out:
        _print_json(_with_power(content, comparison, power_percent))
    else:
        print_comparison(comparison, console)
        _say_power(comparison, power_percent, console)
    if not json_out and (breakdowns or changed is not None):
        from launcher.compare.breakdown import print_breakdown, print_changed

        for one in breakdowns:
            print_breakdown(one, console)
        if changed is not None:
            print_changed(changed, console)
    if more.parquet is not None:
        from eval.compare.parquet import comparison_row

        _write_parquet(more.parquet, [comparison_row(comparison)], json_out, console)
    if more.plots is not None:
        from eval.compare.plots import plot_pair

        _wrote(plot_pair(a, b, comparison, more.plots), json_out, console)
    return comparison


def _advantage(targets: list[str], json_out: bool, more: More, console: Console) -> int:
    from launcher.compare.advantage import say_advantage

    comparison = _compare_two(targets)[0]
    if not json_out:
        print_comparison(comparison, console)
    assert more.advantage is not None
    assert more.half_life is not None
    assert more.age is not None
    return say_advantage(comparison, more.advantage, more.half_life, more.age, json_out=json_out, console=console)


def _along_run(
    target: str,
    json_out: bool,
    gate: Gate | None,
    power_percent: float | None,
    more: More,
    console: Console,
) -> Comparison | None:
    from eval.compare.along_run import compare_run
    from eval.compare.targets import parse_target

    parsed = parse_target(target)
    if parsed.run is None or parsed.step is not None:
        raise ConfigError(f"compare: {target} is one set of losses; give a second to compare it with, or a run")
    comparison = compare_run(parsed.run)
    last = comparison.checkpoints[-1]
    for option, wanted in (("--gate", gate), ("--power", power_percent)):
        if wanted is not None and last.versus_previous is None:
            raise ConfigError(f"{option}: only step {last.step} of {target} is scored; it needs one before it")
    if json_out:
        _print_json(_with_power(comparison.to_json(), last.versus_previous, power_percent))
        for note in comparison.notes:
            tell(note, sys.stderr)
    else:
        print_run_table(comparison, console)
        _say_power(last.versus_previous, power_percent, console)
    if more.parquet is not None:
        from eval.compare.parquet import run_rows

        _write_parquet(more.parquet, run_rows(comparison), json_out, console)
    if more.plots is not None:
        from eval.compare.plots import plot_run

        _wrote(plot_run(comparison, comparison.tables, more.plots), json_out, console)
    return last.versus_previous


def _leaderboard(targets: list[str], json_out: bool, more: More, console: Console) -> int:
    from eval.compare.along_run import with_wobble
    from eval.compare.leaderboard import leaderboard
    from eval.compare.targets import find_tables
    from eval.tables import read_table

    found = find_tables(targets)
    wobbles: dict[tuple[Path, str], float | None] = {}
    board = leaderboard(
        [read_table(one.path) for one in found],
        [one.name for one in found],
        finish=lambda comparison, a, b: with_wobble(comparison, found[a], found[b], wobbles),
    )
    if json_out:
        _print_json(board.to_json())
    else:
        print_leaderboard(board, console)
    if more.parquet is not None:
        from eval.compare.parquet import leaderboard_rows

        _write_parquet(more.parquet, leaderboard_rows(board), json_out, console)
    if more.plots is not None:
        from eval.compare.plots import plot_leaderboard

        _wrote(plot_leaderboard(board, more.plots), json_out, console)
    return EXIT_DONE


def _with_power(content: dict[str, Any], comparison: Comparison | None, wanted: float | None) -> dict[str, Any]:
    if wanted is None or comparison is None:
        return content
    power = comparison.power(wanted)
    return {**content, "power": power and power.to_json()}


def _say_power(comparison: Comparison | None, wanted: float | None, console: Console) -> None:
    if wanted is not None and comparison is not None:
        say(console, f"  {power_words(comparison.power(wanted), wanted)}")


def _sources(reference: Path | None) -> list[str]:
    from eval.reference.set import read_documents

    if reference is None:
        raise ConfigError("--by source: needs the sources of the texts; give --reference REF")
    return list(read_documents(reference)[0])


def _length(reference: Path | None) -> int | None:
    from configs.facts import read_reference_facts

    return None if reference is None else int(read_reference_facts(reference, "sequence_length")["sequence_length"])


def _write_parquet(path: Path, rows: list[dict[str, Any]], json_out: bool, console: Console) -> None:
    from eval.compare.parquet import write_rows

    replaced = write_rows(path, rows)
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    _tell(f"wrote {path}, {count}{', in the place of an older result' * replaced}", json_out, console)


def _wrote(paths: list[Path], json_out: bool, console: Console) -> None:
    for path in paths:
        _tell(f"wrote {path}", json_out, console)


def _tell(line: str, json_out: bool, console: Console) -> None:
    if json_out:
        tell(line, sys.stderr)  # stdout is the JSON's alone
    else:
        say(console, line)


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def _hold(comparison: Comparison, gate: Gate, margin_percent: float, json_out: bool, console: Console) -> int:
    from eval.compare.pair import gate_holds

    holds = gate_holds(comparison, gate, margin_percent)
    upper = comparison.difference.ci95_percent[1]
    limit = -margin_percent if gate == "better" else margin_percent
    line = (
        f"gate {gate}, {comparison.a.name} → {comparison.b.name}: {'holds' if holds else 'does not hold'}; "
        f"the upper 95 % bound of the change is {signed(upper, 3)} %, to be below {limit + 0.0:g} %"
    )
    if comparison.verdict == "identical":
        line = f"{line.partition(';')[0]}; the two are identical"
    if json_out:
        tell(line, sys.stderr)
    else:
        say(console, line, "green" if holds else "red")
    return EXIT_DONE if holds else EXIT_VERDICT
