"""A comparison of recipes in words: over their seeds, and what would settle it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from launcher.compare.report import STYLES
from launcher.text import minus, new_table, p_words, perplexity, plus_minus, print_table, say

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.recipes import RecipeComparison


def recipe_sentence(found: RecipeComparison) -> str:
    """What a person would say: of recipes, as far as these seeds tell."""
    a, b = found.a.name, found.b.name
    low, high = found.ci95_percent
    change, half = plus_minus(found.percent, (high - low) / 2)
    size, p = f"{minus(change)} % ± {half} % (95 %, documents and seeds)", p_words(found.p)
    seeds = f"{found.paired} paired seeds" if found.paired else f"{len(found.a.losses)} and {len(found.b.losses)} seeds"
    if found.verdict == "identical":
        return f"{b} and {a} are identical on every sample and seed"
    if found.verdict == "no difference seen":
        return f"no difference seen between the recipes {a} and {b}: {size}, {p}, over {seeds}"
    return f"the recipe {b} is {found.verdict} than {a}: {size}, {p}, over {seeds}"


def settle_words(found: RecipeComparison) -> str:
    """Which of the two errors is the larger, and how many seeds would show a change of the size found."""
    documents = _small(found.documents.difference.se_percent)
    parts = f"standard error by seeds {_small(found.se_seeds)} %, by documents {documents} %"
    needed = found.seeds_needed
    if found.verdict != "no difference seen":
        return parts
    if found.limited_by == "samples":
        return f"{parts}: more documents would tell sooner than more seeds"
    more = "more than 10,000 seeds" if needed is None else f"about {needed:,} seeds"
    return f"{parts}: more seeds would tell sooner than more documents; a change of this size takes {more} of each"


def _small(value: float) -> str:
    return plus_minus(value, value, signed=False)[1]


def print_recipes(found: RecipeComparison, console: Console) -> None:
    """The sentence, the losses by seed, what limits it, what differs, and cautions."""
    say(console, recipe_sentence(found), STYLES[found.verdict].replace("dim", "none"))
    table = new_table()
    for heading in ("", f"mean loss,\n{found.documents.unit}", "perplexity", "seeds", "least and\nlargest"):
        table.add_column(heading, justify="right" if heading else "left")
    for group in (found.a, found.b):
        losses = group.losses.values()
        ends = f"{min(losses):.4f} – {max(losses):.4f}"
        table.add_row(
            Text(group.name), f"{group.loss:.4f}", perplexity(group.loss, found.documents.unit), str(len(losses)), ends
        )
    print_table(table, console, spare=("perplexity",))
    say(console, f"  scored at step {found.step}; {settle_words(found)}")
    for changed in found.changed:
        say(console, f"  {changed}")
    for caution in found.cautions:
        say(console, f"  caution: {caution}", "yellow")
