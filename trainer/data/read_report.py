"""What was met while reading sources, and what of it was left out: for `dataset.json` and the data report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

NAMED = 20  # so many of each sort are named in dataset.json
_TOLD = 4  # and so many on the terminal, where a reason does not stand beside each


@dataclass
class ReadReport:
    """What was met while reading. Names are paths below the source."""

    files: int = 0
    rows: int = 0
    bytes: int = 0
    skipped: list[str] = field(default_factory=list)  # files that could not be read, and why
    other_kinds: list[str] = field(default_factory=list)  # files of kinds that are not read
    without_rows: list[str] = field(default_factory=list)  # files that were read, and nothing was in them
    linked_folders: list[str] = field(default_factory=list)
    hidden: int = 0  # files and folders, and Python's caches
    missing: int = 0  # rows whose text is null or not there
    empty: int = 0
    without_prompt: int = 0  # of the documents that are used, where prompts were asked for
    duplicates: int = 0
    other_label: int = 0  # of the duplicates, those with another label than the one that stays
    beyond_max_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts, and the first of the files of each sort by name."""
        return {
            "files": self.files,
            "documents_found": self.rows,
            "documents_missing": self.missing,
            "documents_empty": self.empty,
            "documents_without_prompt": self.without_prompt,
            "documents_duplicate": self.duplicates,
            "duplicates_with_another_label": self.other_label,
            "documents_beyond_max_bytes": self.beyond_max_bytes,
            "bytes": self.bytes,
            "files_of_other_kinds": len(self.other_kinds),
            "other_kinds": self.other_kinds[:NAMED],
            "other_suffixes": dict(Counter(PurePath(name).suffix.lower() for name in self.other_kinds).most_common()),
            "files_without_rows": len(self.without_rows),
            "without_rows": self.without_rows[:NAMED],
            "linked_folders": len(self.linked_folders),
            "linked": self.linked_folders[:NAMED],
            "hidden": self.hidden,
            "files_skipped": len(self.skipped),
            "skipped": self.skipped[:NAMED],
        }


def left_out(read: Mapping[str, Any], text_field: str) -> Iterator[str]:
    """Lines for the terminal: the counts of what was left out, then names, from `ReadReport.as_dict`.

    Data prepared by an earlier version has fewer of the counts.
    """
    counts = {
        f"without {text_field!r} (null or not there)": read.get("documents_missing", 0),
        "empty": read["documents_empty"],
        "exact duplicates": read["documents_duplicate"],
        "of these with another label than the one that stays": read.get("duplicates_with_another_label", 0),
        "beyond data.max_bytes": read["documents_beyond_max_bytes"],
        "files not readable": read["files_skipped"],
        "files of kinds that are not read": read.get("files_of_other_kinds", 0),
        "files with no rows in them": read.get("files_without_rows", 0),
        "linked folders": read.get("linked_folders", 0),
        "hidden files and folders": read.get("hidden", 0),
    }
    yield ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "nothing"
    yield from read["skipped"]
    if read["files_skipped"] > len(read["skipped"]):
        yield f"and {read['files_skipped'] - len(read['skipped']):,} more that are not readable"
    for what, names, count in (
        ("not read", "other_kinds", "files_of_other_kinds"),
        ("no rows in", "without_rows", "files_without_rows"),
        ("links, not followed", "linked", "linked_folders"),
    ):
        if read.get(names):
            yield f"{what}: {_few(read[names], read[count])}"


def _few(names: Sequence[str], count: int) -> str:
    more = count - len(names[:_TOLD])
    return ", ".join(names[:_TOLD]) + (f" and {more:,} more" if more else "")
