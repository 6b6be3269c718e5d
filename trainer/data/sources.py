"""Reads documents: Python's standard library, text files, and rows of JSONL, JSON, CSV, Parquet and Arrow.

Their order is a function of their content and the seed, never of file names. All text is held in memory.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from configs.errors import ConfigError, DataError
from configs.schema import DataSettings, ObjectiveSettings
from eval.reference.windows import document_sha256
from trainer.data.read_report import ReadReport
from trainer.data.rows.columns import COLUMN_SUFFIXES, is_saved_data_set, rows_of_file, rows_of_saved
from trainer.data.rows.fields import Fields, Row, fields_of

STDLIB = "python-stdlib"
TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".org",
        ".tex",
        ".html",
        ".htm",
        ".xml",
        ".py",
        ".pyi",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".rs",
        ".go",
        ".java",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".css",
        ".rb",
        ".pl",
        ".lua",
        ".jl",
        ".r",
        ".scala",
        ".kt",
        ".swift",
        ".sh",
        ".sql",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
    ]
)
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """A text and where it came from: a path below the source, with `#row` where a file has many.

    With a `prompt` the document is prompt and text, and the text alone is trained on and scored. `label`: what a
    classifier is to say of it.
    """

    source: str
    text: str
    prompt: str = ""
    label: str = ""

    @property
    def sha256(self) -> str:
        """Of its content; the same text after another prompt is another document."""
        return document_sha256(self.text, self.prompt)

    @property
    def bytes(self) -> int:
        """Of prompt and text in UTF-8."""
        return len(self.prompt.encode()) + len(self.text.encode())


def content_key(purpose: str, seed: int, sha256: str) -> str:
    """A random sort key that hangs on content and seed alone; another for each purpose."""
    return hashlib.sha256(f"{purpose} {seed} {sha256}".encode()).hexdigest()


def read_documents(
    settings: DataSettings, seed: int, progress: Callable[[int], None] | None = None, fields: Fields | None = None
) -> tuple[list[Document], ReadReport]:
    """All distinct documents of `settings.source`, up to `max_bytes`, in a random order keyed by content.

    Args:
        progress: told how many documents were read so far.
        fields: what is read of a row; None: a text, and a prompt where the settings name one.

    Raises:
        ConfigError: a path that is not there, a kind of file that is not read, a column that is missing or holds
            something else, or no prompt where `prompt_field` is set.
        DataError: a broken file, or no document at all.
    """
    report = ReadReport()
    fields = fields or fields_of(settings, ObjectiveSettings())
    names = [settings.source] if isinstance(settings.source, str) else list(settings.source)
    seen: dict[str, str] = {}
    found: list[tuple[str, Document]] = []
    for document in _all_rows(names, fields, report):
        report.rows += 1
        if progress is not None and report.rows % 1000 == 0:
            progress(report.rows)
        if not document.text.strip():
            report.empty += 1
            continue
        sha256 = document.sha256
        if sha256 in seen:
            report.duplicates += 1
            report.other_label += seen[sha256] != document.label
            continue
        seen[sha256] = document.label
        found.append((content_key("corpus", seed, sha256), document))
    found.sort(key=lambda item: item[0])
    documents = _up_to([document for _, document in found], settings.max_bytes, report)
    if not documents:
        raise DataError(_nothing_found(names, settings, report))
    if "prompt_field" in fields.wanted and not fields.only_rows:
        report.without_prompt = sum(not document.prompt for document in documents)
        if report.without_prompt == len(documents):
            raise ConfigError(
                f"data.prompt_field: none of {len(documents)} documents has a prompt in {settings.prompt_field!r}; "
                "name the column that has, or leave the setting out"
            )
    return documents, report


def _up_to(documents: list[Document], max_bytes: int | None, report: ReadReport) -> list[Document]:
    """Documents in order until the bytes are used up. Only what alone is too large is passed over: passing
    over all that does not fit any more would fill the end with small documents."""
    out: list[Document] = []
    for document in documents:
        size = document.bytes
        if max_bytes is not None and size > max_bytes:
            continue
        if max_bytes is not None and report.bytes + size > max_bytes:
            break
        report.bytes += size
        out.append(document)
    report.beyond_max_bytes = len(documents) - len(out)
    return out


def _nothing_found(names: list[str], settings: DataSettings, report: ReadReport) -> str:
    looked = (
        f"looked at {report.files} files: {report.rows} documents, {report.empty} of them empty, "
        f"{report.missing} without {settings.text_field!r}, {len(report.skipped)} files not readable, "
        f"{len(report.other_kinds)} of other kinds"
    )
    if report.beyond_max_bytes:
        looked = f"data.max_bytes: {settings.max_bytes} is less than each of {report.beyond_max_bytes} documents"
    met = report.skipped + report.other_kinds
    first = f"; the first: {met[0]}" if met else ""
    return f"data.source: no text in {', '.join(names)}; {looked}{first}"


def _all_rows(names: list[str], fields: Fields, report: ReadReport) -> Iterator[Document]:
    if not names:
        raise ConfigError(f"data.source: is an empty list; name files or folders, or {STDLIB}")
    for name in names:
        path = Path(name).expanduser()
        if name == STDLIB:
            yield from _standard_library(fields, report)
        elif path.is_dir() and is_saved_data_set(path):
            yield from _saved(path, path.name, fields, report)
        elif path.is_dir():
            yield from _folder(path, fields, report)
        elif path.exists() or path.is_symlink():
            if path.suffix.lower() not in TEXT_SUFFIXES | COLUMN_SUFFIXES:
                kinds = ".txt .md .py … .jsonl .json .csv .parquet .arrow"
                raise ConfigError(
                    f"data.source: {name} is none of the kinds that are read ({kinds}); unpack what is packed"
                )
            yield from _file(path, path.name, fields, report, named=True)
        else:
            raise ConfigError(f"data.source: {name} does not exist")


def _standard_library(fields: Fields, report: ReadReport) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    # Its `.py` files are the source: what lies beside them is not passed over.
    for path in _walk(root, ReadReport(skipped=report.skipped), without=_NOT_SOURCE):
        if path.suffix == ".py":
            yield from _file(path, f"{STDLIB}/{path.relative_to(root).as_posix()}", fields, report)


def _folder(root: Path, fields: Fields, report: ReadReport) -> Iterator[Document]:
    for path in _walk(root, report, without={"__pycache__"}):
        name = f"{root.name}/{path.relative_to(root).as_posix()}"
        if path.is_dir():
            yield from _saved(path, name, fields, report)
        elif path.suffix.lower() in TEXT_SUFFIXES | COLUMN_SUFFIXES:
            yield from _file(path, name, fields, report)
        else:
            report.other_kinds.append(name)


def _walk(root: Path, report: ReadReport, without: set[str]) -> Iterator[Path]:
    """Files below `root`, sorted, and saved data sets as one path each; nothing hidden, no linked folders."""

    def unreadable(error: OSError) -> None:
        report.skipped.append(f"{error.filename}: {error.strerror}")

    for where, folders, files in os.walk(root, onerror=unreadable):
        folder = Path(where)
        kept = sorted(n for n in folders if n not in without and not n.startswith("."))
        shown = [n for n in files if not n.startswith(".")]
        report.hidden += len(folders) - len(kept) + len(files) - len(shown)
        saved = [n for n in kept if is_saved_data_set(folder / n)]
        folders[:] = [n for n in kept if n not in saved]
        linked = [folder / n for n in folders if (folder / n).is_symlink()]  # os.walk does not go into these
        report.linked_folders += [f"{root.name}/{p.relative_to(root).as_posix()}" for p in linked]
        yield from (folder / n for n in sorted([*saved, *shown]))


def _saved(path: Path, name: str, fields: Fields, report: ReadReport) -> Iterator[Document]:
    report.files += 1
    try:
        rows = list(rows_of_saved(path, fields))
    except UnicodeDecodeError as error:
        report.skipped.append(f"{name}: not UTF-8 ({error.reason})")
    else:
        yield from _documents(rows, name, report)


def _file(path: Path, name: str, fields: Fields, report: ReadReport, named: bool = False) -> Iterator[Document]:
    report.files += 1
    if path.suffix.lower() in COLUMN_SUFFIXES:
        try:
            # All its rows before the first is given on: a file that turns out to be broken is left out whole.
            rows = list(rows_of_file(path, fields))
        except UnicodeDecodeError as error:
            report.skipped.append(f"{name}: not UTF-8 ({error.reason})")
        except OSError as error:
            report.skipped.append(f"{name}: {error.strerror}")
        except ConfigError as error:
            # In a folder of sources a .json file is most often somebody's settings, not a corpus.
            if named or path.suffix.lower() != ".json":
                raise
            wanted = map(repr, fields.wanted.values())
            why = "not JSON" if isinstance(error, DataError) else f"no rows with {' and '.join(wanted)}"
            report.skipped.append(f"{name}: {why}")
        else:
            yield from _documents(rows, name, report)
        return
    if fields.only_rows:
        columns = " and ".join(map(repr, fields.wanted.values()))
        if named:
            raise ConfigError(f"data.source: {path} has no columns; expected rows with {columns} (.jsonl, .csv, …)")
        report.other_kinds.append(name)
        return
    try:
        # Bytes, not read_text(): line ends stay as they are. A byte order mark is no text.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        report.skipped.append(f"{name}: {error.strerror}")
    except UnicodeDecodeError as error:
        report.skipped.append(f"{name}: not UTF-8 ({error.reason})")
    else:
        yield Document(name, text)


def _documents(rows: list[Row], name: str, report: ReadReport) -> Iterator[Document]:
    if not rows:
        report.without_rows.append(name)
    for number, row in enumerate(rows):
        if row.text is None:
            report.rows += 1
            report.missing += 1
        else:
            yield Document(f"{name}#{number}", row.text, row.prompt, row.label)
