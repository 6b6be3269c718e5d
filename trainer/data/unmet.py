"""What the settings of a data set asked for and its sources did not give: said, never refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eval.statistics.paired import FEW_DOCUMENTS

_USED_UP = 0.9  # of what max_fraction allows: with less, it is not that which kept documents out


def unmet_requests(facts: Mapping[str, Any]) -> Iterator[str]:
    """A line for each request that `dataset.json` shows was not met, with what to do."""
    settings, reference, split = facts["settings"], facts["reference"], facts["decontamination"]
    asked, taken = settings["reference.documents"], reference["documents"]
    if asked is not None and taken < asked:
        allowed, used = settings["reference.max_fraction"], split["taken_tokens"] / split["tokens"]
        what = "raise reference.max_fraction"
        if used < _USED_UP * allowed:
            what = "raise reference.min_shared_run: the families that are left are too large to take"
        yield (
            f"reference.documents: {asked:,} asked for, {taken:,} taken, with {100 * used:.1f} % of all tokens "
            f"(reference.max_fraction allows {100 * allowed:g} %); give more documents, or {what}"
        )
    worth = reference.get("effective_documents", taken)
    if worth < FEW_DOCUMENTS:
        sizes = "" if taken < FEW_DOCUMENTS else f" (worth {worth:.0f} of equal size)"
        yield (
            f"reference: {taken:,} documents{sizes}, fewer than {FEW_DOCUMENTS}: verdicts will be weak, by sign flips, "
            "with a caution each; "
            + (
                "give more documents"
                if asked is None or taken < asked
                else "raise reference.documents, or lower reference.max_windows"
            )
        )
    windows, cut = settings["reference.max_windows"], reference["max_windows"]
    if cut is not None and windows is not None and cut < windows:
        yield (
            f"reference.max_windows: {windows} asked for, documents are cut after {cut}, "
            "so that none has more than 1 % of the tokens where that can be; more documents would leave them longer"
        )
    entries = settings.get("data.vocab_size")
    if entries is not None and facts["vocab_size"] < entries:
        yield (
            f"data.vocab_size: {entries:,} asked for, {facts['vocab_size']:,} made: "
            "there is too little text for more; lower it, or give more text"
        )
    empty, every = facts["train"].get("windows_without_target", 0), facts["train"]["windows"]
    if 2 * empty > every:
        yield (
            f"data.prompt_field: {empty:,} of {every:,} training windows ({100 * empty / every:.0f} %) hold nothing "
            "but prompts, and teach nothing; raise sequence_length, or shorten the prompts"
        )
    if facts.get("switched_off"):
        yield (
            f"data.tokenizer: its tokenizer.json asks for {facts['switched_off']}, which would give a text other "
            "tokens each time; that is switched off, here and in the copy that goes with each snapshot"
        )
    without = facts["read"]["documents_without_prompt"]
    if without:
        yield (
            f"data.prompt_field: {without:,} documents have no prompt in {settings['data.prompt_field']!r}: "
            "they are trained on and scored whole; leave them out of the source if that is not meant"
        )
