"""`vernier compare`: says in words what two loss tables, or a run's checkpoints, show; holds gates."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.errors import EXIT_DONE, EXIT_VERDICT, ConfigError

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare import Comparison, Gate, RunComparison

STYLES = {"better": "green", "worse": "red", "no difference seen": "dim", "identical": "dim"}


def run_compare(targets: list[str], *, json_out: bool, gate: str | None, margin: str, console: Console) -> int:
    """Compares and prints; gives the exit code: 0, or 3 where a gate does not hold.

    Args:
        targets: two tables, snapshots, `RUN@STEP`s or runs; or one run.
        gate: None, "better" or "not-worse". On a run: the last step against the one scored before.
        margin: of the gate, in percent, such as "0.05%".

    Raises:
        ConfigError: usage, or nothing that can be compared.
    """
    wanted = _gate(gate)
    margin_percent = parse_margin(margin)
    comparison: Comparison | None
    if len(targets) == 2:
        comparison = _pair(targets, json_out, console)
    elif len(targets) == 1:
        comparison = _along_run(targets[0], json_out, wanted, console)
    else:
        raise ConfigError(f"compare: expected two tables, snapshots or RUN@STEPs, or one run; got {len(targets)}")
    if wanted is None or comparison is None:
        return EXIT_DONE
    return _hold(comparison, wanted, margin_percent, json_out, console)


def _gate(text: str | None) -> Gate | None:
    if text is None or text == "better" or text == "not-worse":
        return text  # type: ignore[return-value]
    raise ConfigError(f"--gate: {text!r} is not a verdict; use better or not-worse")


def parse_margin(text: str) -> float:
    """Percent in a margin such as `0.05%`, `0.05 %` or `0.05`."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"--margin: {text!r} is not a percentage of 0 or more, such as 0.05%")
    return value


def _pair(targets: list[str], json_out: bool, console: Console) -> Comparison:
    from eval.compare import compare_tables
    from eval.targets import resolve_pair

    a, b, names = resolve_pair(targets[0], targets[1])
    comparison = compare_tables(a, b, names=names)
    if json_out:
        _print_json(comparison.to_json())
    else:
        print_comparison(comparison, console)
    return comparison


def _along_run(target: str, json_out: bool, gate: Gate | None, console: Console) -> Comparison | None:
    from eval.compare import compare_run
    from eval.targets import parse_target

    parsed = parse_target(target)
    if parsed.run is None or parsed.step is not None:
        raise ConfigError(f"compare: {target} is one set of losses; give a second to compare it with, or a run")
    comparison = compare_run(parsed.run)
    last = comparison.checkpoints[-1]
    if gate is not None and last.versus_previous is None:
        raise ConfigError(f"--gate: only step {last.step} of {target} is scored; a gate needs one before it")
    if json_out:
        _print_json(comparison.to_json())
        for note in comparison.notes:
            print(note, file=sys.stderr)
    else:
        print_run_table(comparison, console)
    return last.versus_previous


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))


def _hold(comparison: Comparison, gate: Gate, margin_percent: float, json_out: bool, console: Console) -> int:
    from eval.compare import gate_holds

    holds = gate_holds(comparison, gate, margin_percent)
    upper = comparison.difference.ci95_percent[1]
    limit = -margin_percent if gate == "better" else margin_percent
    line = (
        f"gate {gate}, {comparison.a.name} → {comparison.b.name}: {'holds' if holds else 'does not hold'}; "
        f"the upper 95 % bound of the change is {_signed(upper, 3)} %, to be below {limit + 0.0:g} %"
    )
    if json_out:
        print(line, file=sys.stderr)  # stdout is the JSON's alone
    else:
        _say(console, line, "green" if holds else "red")
    return EXIT_DONE if holds else EXIT_VERDICT


def sentence(comparison: Comparison) -> str:
    """What a person would say of a comparison."""
    a, b, found = comparison.a.name, comparison.b.name, comparison.difference
    items = f"{comparison.paired_by}s"
    verdict = comparison.verdict
    if verdict == "identical":
        return f"{b} and {a} are identical: the difference is exactly 0 on every one of the {items}"
    change, half = plus_minus(found.percent, comparison.half_width_percent)
    p = f"p = {found.p:.1g}" if found.p > 0 else "p < 1e-300"
    tail = f"smallest change this set could show at 80 % power: {_digits(comparison.detectable_percent)} %"
    if found.pairing_gain is not None:
        tail += f"; pairing gained {_gain(found.pairing_gain)}×"
    if verdict == "no difference seen":
        return (
            f"no difference seen between {a} and {b}: {_minus(change)} % ± {half} % (95 %), {p}; "
            f"{b} lower on {100 * found.win_rate:.0f} % of {items}; {tail}"
        )
    share = found.win_rate if verdict == "better" else 1 - found.win_rate
    return (
        f"{b} is {verdict} than {a} by {change.lstrip('+-')} % ± {half} % (95 %), {p}; "
        f"on {100 * share:.0f} % of {items}; {tail}"
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The sentence, the two losses it rests on, the test with and without pairing, and the cautions."""
    _say(console, sentence(comparison), STYLES[comparison.verdict].replace("dim", "none"))
    found = comparison.difference
    table = _table()
    for heading in ("", f"loss, {comparison.unit}", "documents", "samples", "tokens"):
        table.add_column(heading, justify="right" if heading else "left")
    for side in (comparison.a, comparison.b):
        loss, error = plus_minus(side.loss, side.se, signed=False, at_least=4)
        counts = (f"{count:,}" for count in (side.documents, side.samples, side.tokens))
        table.add_row(Text(side.name), f"{loss} ± {error}", *counts)
    _print_table(table, console)
    _say(
        console,
        f"  paired t = {_signed(found.t, 2)} (clustered by document); "
        f"unpaired t = {_signed(found.t_unpaired, 2)}; losses ± standard error",
    )
    for caution in comparison.cautions:
        _say(console, f"  caution: {caution}", "yellow")


def print_run_table(comparison: RunComparison, console: Console) -> None:
    """The scored checkpoints of a run, a row each, then what single optimizer steps did."""
    table = _table()
    table.add_column("step", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("loss ± SE", justify="right")
    table.add_column("change, % (95 %)", justify="right")
    table.add_column("verdict")
    for heading in ("win\nrate", "paired\nt", "unpaired\nt"):
        table.add_column(heading, justify="right")
    for point in comparison.checkpoints:
        loss, error = plus_minus(point.side.loss, point.side.se, signed=False, at_least=4)
        tokens = "" if point.tokens is None else _count(point.tokens)
        row = [str(point.step), tokens, f"{loss} ± {error}"]
        versus = point.versus_previous
        if versus is not None:
            found = versus.difference
            change, half = plus_minus(found.percent, versus.half_width_percent)
            row += [f"{_minus(change)} ± {half}", Text(versus.verdict, STYLES[versus.verdict])]  # type: ignore[list-item]
            row += [f"{100 * found.win_rate:.0f} %", _signed(found.t, 2), _signed(found.t_unpaired, 2)]
        table.add_row(*row)
    _print_table(table, console)
    for line in single_steps(comparison):
        _say(console, line)
    cautions = dict.fromkeys(c for p in comparison.checkpoints if p.versus_previous for c in p.versus_previous.cautions)
    for note in (*comparison.notes, *(f"caution: {c}" for c in cautions)):
        _say(console, f"  {note}", "yellow")


def single_steps(comparison: RunComparison) -> list[str]:
    """A line for each two scored checkpoints exactly one optimizer step apart."""
    lines = []
    for before, after in zip(comparison.checkpoints, comparison.checkpoints[1:], strict=False):
        versus = after.versus_previous
        if versus is None or after.step != before.step + 1:
            continue
        found = versus.difference
        change, half = plus_minus(found.percent, versus.half_width_percent)
        lines.append(
            f"One optimizer step, {before.step} → {after.step}: paired t = {_signed(found.t, 2)} "
            f"(clustered by document) where the unpaired t = {_signed(found.t_unpaired, 2)}; "
            f"the change is {_minus(change)} % ± {half} %"
        )
    return lines


def plus_minus(value: float, error: float, *, signed: bool = True, at_least: int = 0) -> tuple[str, str]:
    """A value and its error as text: to two digits of the error, and `at_least` so many decimals."""
    decimals = min(12, max(at_least, 1 - math.floor(math.log10(error)))) if error > 0 else 4
    return f"{value:{'+' if signed else ''}.{decimals}f}", f"{error:.{decimals}f}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _signed(value: float, digits: int) -> str:
    """A number of `digits` digits, or whole where it has more than those before the point."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    return _minus(f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix("."))


def _digits(value: float) -> str:
    return plus_minus(value, value, signed=False)[0]


def _gain(gain: float) -> str:
    return f"{gain:,.0f}" if gain >= 10 else f"{gain:.1f}"


def _count(count: int) -> str:
    """1,234,567 in full; from ten million on, three digits and a unit, to keep the table narrow."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size and count >= 10**7:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count:,}"


def _table() -> Table:
    return Table(box=SIMPLE, pad_edge=False, collapse_padding=True, header_style="bold")


def _print_table(table: Table, console: Console) -> None:
    """Prints a table at its own width; rich would cut columns to the terminal's, or to the 80 of a pipe."""
    table.width = console.measure(table, options=console.options.update(width=1000)).maximum
    console.print(table, soft_wrap=True)


def _say(console: Console, line: str, style: str = "none") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
