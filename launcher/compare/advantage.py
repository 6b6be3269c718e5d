"""`vernier compare A B --advantage`: says whether a challenger beats an incumbent by as much as its age asks for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from configs.console import tell
from configs.errors import EXIT_DONE, EXIT_VERDICT

if TYPE_CHECKING:
    from eval.compare.advantage import Advantage
    from eval.compare.pair import Comparison


def say_advantage(
    comparison: Comparison, advantage: str, half_life: str, age: str, *, json_out: bool, console: Console
) -> int:
    """Holds B of `comparison` to the rule and says so; gives the exit code: 0 where it holds, 3 where it does not.

    Args:
        advantage: in percent of A's loss, for an incumbent of no age, such as `0.4%`.
        half_life, age: durations such as `7d`; `age` is A's.
        json_out: prints the comparison with the key `advantage` in it; the sentence then goes to stderr.

    Raises:
        ConfigError: a percentage or duration that is none.
    """
    from eval.compare.advantage import advantage_of

    found = advantage_of(comparison, advantage, half_life, age)
    line = advantage_sentence(found, comparison.a.name, comparison.b.name)
    if json_out:
        print(json.dumps({**comparison.to_json(), "advantage": found.to_json()}, indent=2, allow_nan=False))
        tell(line, sys.stderr)
    else:
        console.print(Text(line, style="green" if found.holds else "red"), soft_wrap=True)
    return EXIT_DONE if found.holds else EXIT_VERDICT


def advantage_sentence(found: Advantage, a: str, b: str) -> str:
    """What B must gain over A now, what it is known to gain, and when that is enough."""
    from eval.compare.advantage import duration_words

    return (
        f"advantage {'holds' if found.holds else 'does not hold'}: at an age of {duration_words(found.age_s)} {a} "
        f"asks for a gain of more than {found.needed_percent:.3g} % ({found.advantage_percent:g} %, halved every "
        f"{duration_words(found.half_life_s)}); {_known(found, b)}{'' if found.holds else f'; {_when(found, a, b)}'}"
    )


def _known(found: Advantage, b: str) -> str:
    if found.sure_percent <= 0:
        lower = f"{found.sure_percent:.3g}".replace("-", "−")
        return f"{b} is not known to gain anything (lower 95 % bound of its gain: {lower} %)"
    return f"{b} gains {found.gain_percent:.3g} %, for sure (95 %) {found.sure_percent:.3g} %"


def _when(found: Advantage, a: str, b: str) -> str:
    from eval.compare.advantage import duration_words

    if found.enough_from_s is None:
        return f"no age of {a} would make that enough, since {b} is not better as far as is known"
    return f"that is enough once {a} is older than {duration_words(found.enough_from_s)}"
