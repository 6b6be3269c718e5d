"""`vernier compare A B --training`: says what the difference of two runs' *training* losses shows, and draws it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from launcher.text import _digits, gain_words, minus, new_table, p_words, plus_minus, print_table, say

if TYPE_CHECKING:  # what computes needs numpy and scipy, which a `vernier --help` must not wait for
    from eval.curves.training import Change, TrainingComparison

STYLES = {"lower": "green", "higher": "red"}
PLOT = "training-curve.png"


def training_sentence(found: TrainingComparison) -> str:
    """What a person would say of it; always says that it is of training losses."""
    whole, verdict = found.whole, found.verdict
    stretch = f"over steps {whole.first_step}–{whole.last_step}"
    if verdict == "identical":
        return f"TRAINING loss: {found.b} and {found.a} are identical, to the last bit, {stretch}"
    change, half = plus_minus(whole.percent, whole.half95_percent)
    p = p_words(found.p)
    gained = "" if found.gain is None else f"; pairing gained {gain_words(found.gain)}× in variance"
    if verdict == "cannot be told":
        return (
            f"TRAINING loss: whether {found.b} and {found.a} differ cannot be told {stretch}: "
            f"{minus(change)} % ± {half} % at least; "
            f"their difference moves as slowly as the stretch is long, which chance does too{gained}"
        )
    if verdict == "as twins" and found.twins is not None:
        of_twins = _digits(100 * found.twins.nats / whole.loss_a)
        return (
            f"TRAINING loss: no more than chance in training does: {found.b} against {found.a} {minus(change)} % ± "
            f"{half} % {stretch}, {p}; twins differ by {of_twins} % (sd){gained}"
        )
    if verdict == "no difference seen":
        return (
            f"TRAINING loss: no difference seen between {found.a} and {found.b}: "
            f"{minus(change)} % ± {half} % (95 %) {stretch}, {p}{gained}"
        )
    said = f"TRAINING loss: {found.b} is {verdict} by {change.lstrip('+-')} % ± {half} % (95 %) {stretch}, {p}"
    if found.paired_from_step is not None:
        said += f"; {'ahead' if verdict == 'lower' else 'behind'} from step {found.paired_from_step}"
    return said + gained


def print_training(found: TrainingComparison, console: Console) -> None:
    """The sentence, what differs between the runs, the change by quarters, what pairing was worth, and cautions."""
    say(console, training_sentence(found), STYLES.get(found.verdict, "none"))
    for changed in found.changed:
        say(console, f"  {changed}")
    table = new_table()
    table.add_column("steps")
    for heading in (f"training loss, {found.a}", found.b, "difference, nats", "change, % (95 %)", "paired t"):
        table.add_column(Text(heading), justify="right")
    for change in (*found.quarters, found.whole):
        table.add_row(*_row(change))
    print_table(table, console)
    for line in told_apart(found):
        say(console, f"  {line}")
    for caution in found.cautions:
        say(console, f"  caution: {caution}", "yellow")


def _row(change: Change) -> list[str]:
    nats, half_nats = plus_minus(change.nats, change.half95_nats)
    percent, half = plus_minus(change.percent, change.half95_percent)
    t = "slow" if change.wanders else f"{change.t:.3g}" if math.isfinite(change.t) else "∞"
    return [
        f"{change.first_step}–{change.last_step}",
        f"{change.loss_a:.4f}",
        f"{change.loss_b:.4f}",
        f"{minus(nats)} ± {half_nats}",
        f"{minus(percent)} ± {half}",
        minus(t),
    ]


def told_apart(found: TrainingComparison) -> list[str]:
    """How the intervals were made, and how many steps it takes to tell the two apart, with and without pairing."""
    if found.verdict == "identical":
        return []
    lines = ["error of the mean by the 8 slowest cosines over the stretch, t with 8 degrees of freedom"]
    if found.quarters:
        lines[0] += f"; the {len(found.quarters)} parts share 5 %"
    if any(part.wanders for part in (*found.quarters, found.whole)):
        lines.append("slow: the difference moves as slowly as that stretch is long, which no test tells from chance")
    if found.paired_steps is None or found.unpaired_steps is None:
        return lines
    own = _told_from(found, found.paired_from_step, found.paired_steps)
    other = _told_from(found, found.unpaired_from_step, found.unpaired_steps)
    return [*lines, f"told apart, by a band that holds at all steps together: paired {own}; on unlike windows {other}"]


def _told_from(found: TrainingComparison, step: int | None, needed: int) -> str:
    if step is None:
        return f"not in these; about {_steps(needed)} steps of a difference of this size"
    first = " (its first look)" if step == found.band.step_K[0] else ""
    return f"from step {step} on{first}"


def draw_training(found: TrainingComparison, path: Path) -> None:
    """Draws both curves (block means) and, below, the difference of each block and its running mean with the band.

    Raises:
        DataError: the file cannot be written.
    """
    from eval.compare.plots import BLUE, GREEN, GREY, ORANGE
    from eval.figure import make_folder, new_figure, write_figure

    make_folder(path.parent)
    figure, (upper, lower) = new_figure(9, 7, rows=2, sharex=True)
    step_C, band = found.last_step_C, found.band
    upper.plot(step_C, found.loss_a_C, color=BLUE, linewidth=1.2, label=found.a)
    upper.plot(step_C, found.loss_b_C, color=ORANGE, linewidth=1.2, label=found.b)
    upper.set_ylabel("training loss, nats per token")
    steps = (found.whole.last_step - found.whole.first_step + 1) / len(step_C)
    upper.set_title(f"means over blocks of {steps:.3g} steps", fontsize=10)
    upper.legend()

    lower.axhline(0, color="black", linewidth=0.8)
    low_K, high_K = band.mean_K - band.half_K, band.mean_K + band.half_K
    difference_C = found.loss_b_C - found.loss_a_C
    ordered, out = sorted(difference_C.tolist()), len(difference_C) // 20
    # Neither the first steps' spikes nor a band a hundred times as wide may squeeze what is to be seen.
    ends = [0.0, *low_K, *high_K, *ordered[out : len(ordered) - out]]
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    bottom, top = min(ends) - room, max(ends) + room
    outside = sum(not bottom <= value <= top for value in ordered)
    label = "difference of each block" + (f" ({outside} of {len(ordered)} outside)" if outside else "")
    lower.plot(step_C, difference_C, ".", color=GREY, markersize=4, label=label)
    for sign, label in ((1, "95 % band, had they met unlike windows"), (-1, "")):
        unpaired_K = band.mean_K + sign * band.half_unpaired_K
        lower.plot(band.step_K, unpaired_K, "--", color=GREY, linewidth=0.8, label=label)
    lower.fill_between(band.step_K, low_K, high_K, color=GREEN, alpha=0.3, label="95 % at all steps together")
    lower.plot(band.step_K, band.mean_K, color=GREEN, linewidth=1.5, label="mean so far")
    if found.paired_from_step is not None:
        lower.axvline(found.paired_from_step, color=GREEN, linewidth=0.8, linestyle=":")
    lower.set_ylim(bottom, top)
    lower.set_xlabel("step")
    lower.set_ylabel(f"{found.b} − {found.a}, nats per token")
    lower.legend(fontsize=8, ncols=2)
    write_figure(figure, path)


def _steps(count: int) -> str:
    """A count to two digits: it is an estimate."""
    return f"{round(count, 1 - math.floor(math.log10(count))):,}" if count > 0 else "0"
