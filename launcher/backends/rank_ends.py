"""How the ranks of a group ended that did not say so themselves: what those who started them, and their logs, say."""

from __future__ import annotations

from pathlib import Path

from configs.errors import EXIT_FAILED
from configs.run.directory import RunDir
from configs.run.last_words import first_end, last_line, last_words, size_of


def without_a_word(how: str, words: str = "") -> str:
    """The failure of a rank that ended so, and left these words in its log."""
    return f"ended without a word ({how}){f': {words}' if words else ''}"


def sizes(logs: Path) -> dict[str, int]:
    """Bytes in each log: what is there before ranks are started says nothing of their end."""
    return {path.name: size_of(path) for path in logs.glob("*.log")}


def first_to_end(logs: Path, before: dict[str, int], component: str) -> tuple[int | None, str]:
    """(rank, how it ended and what it said) of the rank that ended first, as the logs of what started the ranks tell.

    Where they tell of none, (None, the last line in them): why none was started.

    Args:
        before: what `sizes` gave before the start.
        component: train or eval.
    """
    scoring = component == "eval"
    starters = [path for path in logs.glob("*.log") if "rank-" not in path.name]
    starters = [path for path in starters if (path.name.startswith("eval-")) == scoring]
    for path in sorted(starters):
        found = first_end(path, before.get(path.name, 0))
        if found is not None:
            rank, how = found
            own = logs / f"{'eval-' if scoring else ''}rank-{rank}.log"
            words = "" if ": " in how else last_words(own, before.get(own.name, 0))  # the agent has read it
            return rank, f"{how}{f': {words}' if words else ''}"
    said = (
        last_words(path, before.get(path.name, 0)) or last_line(path, before.get(path.name, 0)) for path in starters
    )
    return None, next((one for one in said if one), "")


def name_the_cause(run: RunDir, before: dict[str, int]) -> None:
    """Where the run's failure only followed from another rank's end, puts that there, as the starter's log tells it."""
    if not (run.read_state().get("failure") or {}).get("follows"):
        return
    rank, words = first_to_end(run.logs, before, "train")
    if rank is not None:
        run.record_failure(EXIT_FAILED, rank, without_a_word(words))
