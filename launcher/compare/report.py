"""Comparisons in words: the sentence of a pair, the table of a run or a leaderboard, and what a set could show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from launcher.text import (
    NATS,
    _count,
    _digits,
    gain_words,
    minus,
    new_table,
    p_words,
    perplexity,
    plus_minus,
    print_table,
    say,
    signed,
)

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.along_run import RunComparison
    from eval.compare.leaderboard import Leaderboard, Pair
    from eval.compare.pair import Comparison
    from eval.compare.twins import TwinSpread
    from eval.statistics import Power

MOST_ALIKE = 10  # pairs of a leaderboard that are spelt out
STYLES = {
    "better": "green",
    "worse": "red",
    "no difference seen": "dim",
    "identical": "dim",
    "same weights": "dim",
}


def sentence(comparison: Comparison) -> str:
    """What a person would say of a comparison."""
    a, b, found = comparison.a.name, comparison.b.name, comparison.difference
    items = f"{comparison.paired_by}s"
    verdict = comparison.verdict
    if verdict == "identical":
        return f"{b} and {a} are identical: the difference is exactly 0 on every one of the {items}"
    if verdict == "same weights":
        return f"{b} and {a} are the same weights, scored twice: {change_words(comparison)} apart, which is rounding"
    p = p_words(found.p)
    tail = f"smallest change this set could show at 80 % power: {_digits(comparison.detectable_percent)} %"
    if not math.isfinite(comparison.detectable_percent):
        tail = f"{found.clusters} documents can show no change, however large"
    if found.pairing_gain is not None:
        tail += f"; pairing gained {gain_words(found.pairing_gain)}×"
    if verdict == "no difference seen":
        return (
            f"no difference seen between {a} and {b}: {change_words(comparison)} (95 %), {p}; "
            f"{b} lower on {100 * found.win_rate:.0f} % of {items}; {tail}"
        )
    share = found.win_rate if verdict == "better" else 1 - found.win_rate
    change, half = plus_minus(found.percent, comparison.half_width_percent)
    size = f"{change.lstrip('+-')} % ± {half} % (95 %)"
    if found.method != "t":  # not symmetric: the bounds, which have signs, are those of the change
        size = f"{_sized(comparison)[0].lstrip('+−')} %, change within {_interval(comparison)} % (95 %)"
    b = f"these weights: {b}" if comparison.origin.of == "two runs" else b  # not the recipes that made them
    return f"{b} is {verdict} than {a} by {size}, {p}; on {100 * share:.0f} % of {items}; {tail}"


def change_words(comparison: Comparison, unit: str = " %") -> str:
    """The change in percent and its 95 % interval: symmetric as ±, by flipped signs as its two bounds."""
    change, half = _sized(comparison)
    if comparison.difference.method != "t":
        return f"{change}{unit} {_interval(comparison)}{unit}"
    return f"{change}{unit} ± {half}{unit}"


def _sized(comparison: Comparison) -> tuple[str, str]:
    half = comparison.half_width_percent
    change, error = plus_minus(
        comparison.difference.percent, half if math.isfinite(half) else comparison.difference.se_percent
    )
    return minus(change), error


def _interval(comparison: Comparison) -> str:
    """[lo, hi] in percent, to as many decimals as the change."""
    decimals = len(_sized(comparison)[0].partition(".")[2])
    bounds = (
        f"{bound:+.{decimals}f}" if math.isfinite(bound) else ("∞" if bound > 0 else "-∞")
        for bound in comparison.ci95_percent
    )
    return f"[{minus(', '.join(bounds))}]"


def noise_words(comparison: Comparison) -> str | None:
    """What the training noise of the runs means for a comparison; None where it is not known."""
    noise = comparison.noise_percent
    if noise is None or comparison.verdict == "identical" or comparison.same_weights:
        return None
    size = f"the run's own wobble from checkpoint to checkpoint: {_digits(noise)} %"
    if comparison.twins is not None and comparison.noise_by_twins:
        so_far = "" if comparison.twins.settled else "; still moving apart: a lower bound"
        size = f"what twins of the run differ by ({_digits(noise)} %, {comparison.twins.df} twins{so_far})"
        if comparison.origin.of == "two runs":
            size += ", which holds nothing of what seeds do"
    elif comparison.origin.of == "two runs":
        size = f"the wobble between a run's checkpoints, {_digits(noise)} %, which holds nothing of what seeds do"
    if comparison.one_step:
        return f"one optimizer step apart: the verdict is about these two sets of weights; {size}"
    clear = comparison.verdict != "no difference seen"
    if clear and comparison.below_noise:
        by = "what twins of the run may differ by" if comparison.noise_by_twins else "2·√2 × the wobble"
        return (
            f"the difference is clear on this set, but within {by} ({_bound(comparison)}): "
            "another checkpoint nearby may say otherwise"
        )
    if clear:
        return f"above {size}"
    if comparison.limited_by == "training noise":
        return f"limited by training noise, not by the size of the set; {size}"
    return f"limited by the size of the set, not by training noise; {size}"


def _bound(comparison: Comparison) -> str:
    bound = comparison.noise_bound_percent
    return "" if bound is None else f"{_digits(bound)} %"


def power_words(power: Power | None, wanted_percent: float) -> str:
    """What the set can show of such a pair, and what the wanted change would need."""
    if power is None:
        return f"what a change of {wanted_percent:g} % needs cannot be told: the two differ without any spread"
    shows = f"{_digits(power.detectable_percent)} % at 80 % power, paired"
    if not math.isfinite(power.detectable_percent):
        shows = "no change, however large"
    least = power.least_documents
    floor = f"; at least {least:,}, below which p is by flipping signs and this does not hold"
    return (
        f"this set ({power.documents:,} documents, {power.samples:,} samples) can show {shows}; "
        f"a change of {wanted_percent:g} % needs {power.documents_needed:,} documents "
        f"(about {power.samples_needed:,} samples, {_count(power.tokens_needed)} tokens), "
        f"unpaired {power.documents_needed_unpaired:,} for each of the two"
        f"{floor if least in (power.documents_needed, power.documents_needed_unpaired) else ''}"
    )


def cluster_words(comparison: Comparison) -> str:
    """What the error is clustered by."""
    clusters, documents = comparison.difference.clusters, comparison.a.documents
    return "document" if clusters == documents else f"family: {clusters:,} of {documents:,} documents"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The sentence, the two losses it rests on, the test with and without pairing, and the cautions."""
    say(console, sentence(comparison), STYLES[comparison.verdict].replace("dim", "none"))
    found = comparison.difference
    table = new_table()
    in_nats = comparison.unit == NATS
    headings = ["", f"loss, {comparison.unit}", *(["perplexity"] if in_nats else []), "documents", "samples", "tokens"]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for side in (comparison.a, comparison.b):
        loss, error = plus_minus(side.loss, side.se, signed=False, at_least=4)
        counts = [f"{count:,}" for count in (side.documents, side.samples, side.tokens)]
        table.add_row(Text(side.name), f"{loss} ± {error}", *([perplexity(side.loss)] if in_nats else []), *counts)
    print_table(table, console, spare=("tokens", "samples"))
    say(
        console,
        f"  paired t = {signed(found.t, 2)} (clustered by {cluster_words(comparison)}); "
        f"unpaired t = {signed(found.t_unpaired, 2)}; losses ± standard error",
    )
    noise = noise_words(comparison)
    if noise is not None:
        say(console, f"  {noise}", "yellow" if comparison.below_noise and not comparison.one_step else "none")
    for caution in comparison.cautions:
        say(console, f"  caution: {caution}", "yellow")


def print_run_table(comparison: RunComparison, console: Console) -> None:
    """The scored checkpoints of a run, a row each, then what single optimizer steps did."""
    table = new_table()
    headings = [
        "step",
        "tokens",
        "loss ± SE",
        "perplexity",
        "change, %\n(95 %)",
        "verdict",
    ]
    for heading in (*headings, "win\nrate", "paired\nt", "unpaired\nt"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right")
    for point in comparison.checkpoints:
        loss, error = plus_minus(point.side.loss, point.side.se, signed=False, at_least=4)
        tokens = "" if point.tokens is None else _count(point.tokens)
        row = [str(point.step), tokens, f"{loss} ± {error}", perplexity(point.side.loss, comparison.unit)]
        versus = point.versus_previous
        if versus is not None:
            found = versus.difference
            row += [change_words(versus, unit=""), Text(versus.verdict, STYLES[versus.verdict])]  # type: ignore[list-item]
            row += [f"{100 * found.win_rate:.0f} %", signed(found.t, 2), signed(found.t_unpaired, 2)]
        table.add_row(*row, style="bold" if point is comparison.best else None)
    print_table(table, console, spare=("tokens", "win\nrate", "perplexity"))
    say(console, best_words(comparison))
    for line in (*single_steps(comparison), *_run_noise(comparison)):
        say(console, line)
    cautions = dict.fromkeys(c for p in comparison.checkpoints if p.versus_previous for c in p.versus_previous.cautions)
    for note in (*comparison.notes, *(f"caution: {c}" for c in cautions)):
        say(console, f"  {note}", "yellow")


def best_words(comparison: RunComparison) -> str:
    """Which scored step is the best so far, and what the later ones are beside it."""
    best, last = comparison.best, comparison.checkpoints[-1]
    measured = f"perplexity {perplexity(best.side.loss)}" if comparison.unit == NATS else comparison.unit
    said = f"best: step {best.step} (loss {best.side.loss:.4f}, {measured})"
    if best is last:
        return f"{said}, the last one"
    if comparison.worse_since is None:
        return f"{said}; step {last.step}, the last, is not told apart from it"
    return f"{said}; worse since step {comparison.worse_since}"


def single_steps(comparison: RunComparison) -> list[str]:
    """A line for each two scored checkpoints exactly one optimizer step apart."""
    lines = []
    for before, after in zip(comparison.checkpoints, comparison.checkpoints[1:], strict=False):
        versus = after.versus_previous
        if versus is None or after.step != before.step + 1:
            continue
        found = versus.difference
        lines.append(
            f"One optimizer step, {before.step} → {after.step}: paired t = {signed(found.t, 2)} "
            f"(clustered by {cluster_words(versus)}) where the unpaired t = {signed(found.t_unpaired, 2)}; "
            f"the change is {change_words(versus)}"
        )
    return lines


def _run_noise(comparison: RunComparison) -> list[str]:
    wobble, error, twins = comparison.wobble_percent, comparison.sampling_percent, comparison.twins
    lines = []
    if wobble is None:
        lines.append("wobble: not known; with fewer than 12 checkpoints noise cannot be told from the curve's bend")
    elif error is not None:
        lines.append(
            f"wobble: {_digits(wobble)} % between checkpoints (training noise); "
            f"sampling error of a difference: {_digits(error)} %"
        )
    if twins is not None:
        longest = max(twins.rows, key=lambda row: row.since).at
        rows = _some([row for row in twins.rows if row.at == longest])
        parts = [f"{_digits(row.percent)} % after {row.since} steps" for row in rows]
        lines.append(
            f"twins: {twins.df}, scores differ by {_digits(twins.percent)} % (sd: training noise, measured"
            f"{'' if twins.settled else '; it grows still'}); "
            f"{', '.join(parts)}"
        )
    found = [p.versus_previous for p in comparison.checkpoints if p.versus_previous is not None]
    steps = [p.step for p in comparison.checkpoints if p.versus_previous is not None]
    below = [
        str(step)
        for step, versus in zip(steps, found, strict=True)
        if versus.verdict in ("better", "worse") and versus.below_noise and not versus.one_step
    ]
    if below:
        by = "what twins may differ by" if found[-1].noise_by_twins else "2·√2 × the wobble"
        lines.append(f"within {by} ({_bound(found[-1])}): the change at step {', '.join(below)}")
    return lines


def _some(rows: Sequence[TwinSpread]) -> list[TwinSpread]:
    """Four rows at most, from the first to the last."""
    return [rows[at] for at in sorted({len(rows) * part // 3 - (part > 0) for part in range(4)})] if rows else []


def print_leaderboard(board: Leaderboard, console: Console) -> None:
    """The models by loss, each against the best; then which are not told apart."""
    table = new_table()
    in_nats = board.unit == NATS
    headings = ["", "", f"loss,\n{board.unit}", *(["perplexity"] if in_nats else []), "behind the best,\n% (95 %)"]
    for heading in (*headings, "p, Holm", "win\nrate", "group"):
        table.add_column(heading, justify="left" if heading in ("", "group") else "right")
    best = board.entries[0].name
    versus = {pair.comparison.b.name: pair for pair in board.pairs if pair.comparison.a.name == best}
    for place, entry in enumerate(board.entries, start=1):
        loss, error = plus_minus(entry.loss, entry.se, signed=False, at_least=4)
        row = [str(place), Text(entry.name), f"{loss} ± {error}", *([perplexity(entry.loss)] if in_nats else [])]
        table.add_row(*row, *_against_best(versus.get(entry.name)), entry.group)  # type: ignore[arg-type]
    print_table(table, console, spare=("win\nrate",))
    _print_alike(board, console)
    for caution in board.cautions:
        say(console, f"  caution: {caution}", "yellow")


def _against_best(pair: Pair | None) -> list[str]:
    if pair is None:
        return ["", "", ""]
    found = pair.comparison
    return [
        "identical" if found.difference.identical else change_words(found, unit=""),
        p_words(pair.p_holm).removeprefix("p ").removeprefix("= "),
        f"{100 * found.difference.win_rate:.0f} %",
    ]


def _print_alike(board: Leaderboard, console: Console) -> None:
    """How many pairs are told apart, and which are not, or only within the wobble."""
    alike = [pair for pair in board.pairs if not pair.told_apart]
    count = len(board.pairs)
    say(
        console,
        f"  {count - len(alike)} of {count} pairs are told apart (paired, clustered by document, Holm at "
        f"{board.alpha:g}); models that share a letter are not; win rate: against the best",
    )
    for pair in alike[:MOST_ALIKE]:
        a, b = pair.comparison.a.name, pair.comparison.b.name
        how = "identical" if pair.comparison.difference.identical else f"{change_words(pair.comparison)}"
        say(console, f"  not told apart: {a} and {b} ({how})")
    if len(alike) > MOST_ALIKE:
        say(console, f"  … and {len(alike) - MOST_ALIKE} pairs more; --json has all")
    below = [
        f"{pair.comparison.a.name} and {pair.comparison.b.name} ({_bound(pair.comparison)})"
        for pair in board.pairs
        if pair.told_apart and pair.comparison.below_noise and not pair.comparison.one_step
    ]
    if below:
        say(console, f"  told apart, but within 2·√2 × the wobble: {'; '.join(below)}", "yellow")
