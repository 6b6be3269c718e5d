"""`vernier prepare`: from sources to shards and a reference set, one directory, whole or not there."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError, DataError
from configs.files.atomic import MANIFEST, whole_directory, write_json
from configs.files.locks import take_flock
from configs.files.opening import open_to_write
from configs.run.facts import read_dataset_facts
from configs.schema import Config
from configs.yaml.text import as_written
from eval.reference.chat import said_in
from eval.reference.labels import Labels
from eval.reference.set import build_reference, load_reference, read_documents
from eval.reference.tokenizer import TextTokenizer, open_tokenizer
from trainer.data.encode import Encoded, encode
from trainer.data.examples import AnyWindows, open_windows, write_labels
from trainer.data.families import joined, sharing
from trainer.data.integrity import FACTS, KIND, check_data
from trainer.data.prepared_by import settings_in, settings_of
from trainer.data.rows.fields import fields_of
from trainer.data.shards import FOLDER, Windows, write_shards
from trainer.data.sources import Document
from trainer.data.sources import read_documents as read_sources
from trainer.data.split import Split, fewest_windows, split_by_family
from trainer.data.tokenizer import make_tokenizer
from trainer.data.unmet import unmet_requests

Progress = Callable[[str, int, int], None]
COUNTED = 64  # documents between two steps of progress


def prepare(
    config: Config,
    *,
    fresh: bool = False,
    say: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prepares the data of a config in `config.data_dir`, or finds it there; gives what `dataset.json` says.

    Args:
        fresh: prepare anew; what is there moves to NAME.old-TIME once the new one is written.
        say: what is found or done besides; and each phase, where no `progress` is told.
        progress: told the phase, what is done, and what is to do (0 where that is not known).

    Raises:
        ConfigError: a setting or source is wrong, or what is there was prepared with other settings.
        DataError: the source holds too little, or what is there is damaged.
    """
    with _alone(config.data_dir):
        return _prepare(config, fresh, say, progress)


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Refuses to prepare a data set that another process is preparing; leaves no trace of having asked."""
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.name}.lock")
    with os.fdopen(open_to_write(path, os.O_WRONLY), "w") as lock:
        if not take_flock(lock.fileno(), without_locks=False) or not _is_at(path, lock.fileno()):
            raise ConfigError(f"data.dir: {final} is being prepared by another process; wait for it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at its path: another may just have let go of it and removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _prepare(config: Config, fresh: bool, say: Callable[[str], None], progress: Progress | None) -> dict[str, Any]:
    final = config.data_dir
    settings = settings_of(config)
    there = final.is_dir() and any(final.iterdir())
    if final.is_symlink() and not there:  # to an empty folder, which is where the data is wanted
        final = final.resolve()
    if there and not fresh:
        facts = _found(final, settings, config.data.tokenizer)
        say(f"{final} is already prepared")
        return facts
    manifest: dict[str, Any] = {"kind": KIND}
    old: Path | None = None
    try:
        with whole_directory(final, manifest) as part:
            facts = _build(part, config, settings, say, progress)
            manifest["fingerprints"] = facts["fingerprints"]
            if there:
                old = _free_name(final)
                os.rename(final, old)
    except BaseException:
        if old is not None and not final.exists():
            os.rename(old, final)  # the new one could not be put in its place after all
        raise
    if old is not None:
        link = f", a link to {os.readlink(old)} as before; the new is a folder at {final}" if old.is_symlink() else ""
        say(f"the data that was there is now {old}{link}")
    return facts


def load_dataset_facts(data_dir: Path, check_bytes: int | None = None) -> dict[str, Any]:
    """What `dataset.json` says.

    Args:
        check_bytes: of the data, to be hashed first (see `check_data`); None: nothing is looked at.

    Raises:
        DataError: the data is not there, or not as it was prepared.
    """
    if not (data_dir / MANIFEST).is_file():
        raise DataError(f"data.dir: {data_dir} is not there; run `vernier prepare CONFIG` first")
    if check_bytes is not None:
        check_data(data_dir, check_bytes)
    return read_dataset_facts(data_dir / FACTS)


def no_target(sequence_length: int, windows: int) -> str:
    """Why data is refused that has nothing to train on."""
    return (
        f"data.prompt_field: none of the {windows:,} training windows of {sequence_length} tokens has a token to "
        "train on, all are of prompts; raise sequence_length, give shorter prompts, or leave data.prompt_field out"
    )


def _found(final: Path, settings: dict[str, Any], given: Path | None) -> dict[str, Any]:
    if not (final / MANIFEST).is_file():
        raise ConfigError(f"data.dir: {final} is there and is no prepared data (no {MANIFEST}); choose another")
    check_data(final, at_most=sys.maxsize)
    facts = load_dataset_facts(final)
    before = settings_in(facts)
    for key in settings:
        if before.get(key) != settings[key]:
            raise ConfigError(
                f"{key}: {final} was prepared with {as_written(before.get(key))}, now it is "
                f"{as_written(settings[key])}; "
                "choose another data.dir, or prepare anew with --fresh"
            )
    if given is not None:  # a tokenizer's fingerprint leaves out which of its tokens ends a document
        now = open_tokenizer(given, "data.tokenizer")
        for key, role in (("eos_id", now.eos_id), ("prefix_id", now.prefix_id)):
            if facts[key] != role:
                raise ConfigError(
                    f"data.tokenizer: {final} was prepared with {key} {facts[key]}, now it is {role}; "
                    "choose another data.dir, or prepare anew with --fresh"
                )
    return facts


def _free_name(final: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = [f"{final.name}.old-{stamp}", *(f"{final.name}.old-{stamp}-{n}" for n in range(2, 100))]
    return next(p for p in map(final.with_name, names) if not p.exists())


class _Phases:
    """Says each phase and keeps its seconds."""

    def __init__(self, say: Callable[[str], None], progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._progress, self._name = say, progress, ""

    @contextmanager
    def phase(self, name: str, to_do: int = 0) -> Iterator[None]:
        self._name = name
        if self._progress is None:
            self._say(f"{name} …")
        self.step(0, to_do)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)

    def step(self, done: int, to_do: int = 0) -> None:
        if self._progress is not None:
            self._progress(self._name, done, to_do)

    def counted(self, items: Sequence[int]) -> Iterator[int]:
        """`items`, each a step."""
        for done, item in enumerate(items, start=1):
            yield item
            if done % COUNTED == 0 or done == len(items):
                self.step(done, len(items))


def _build(
    part: Path,
    config: Config,
    settings: dict[str, Any],
    say: Callable[[str], None],
    progress: Progress | None,
) -> dict[str, Any]:
    phases = _Phases(say, progress)
    with phases.phase("reading"):
        documents, read = read_sources(config.data, config.seed, phases.step, fields_of(config.data, config.objective))
        phases.step(len(documents), len(documents))
    said = said_in if config.objective.name == "instruct" else str
    with phases.phase("tokenizer", len(documents)):
        tokenizer = make_tokenizer(
            part / "tokenizer",
            [text for d in documents for text in (d.prompt, said(d.text)) if text],
            given=config.data.tokenizer,
            vocab_size=config.data.vocab_size,
            characters=config.data.characters,
            masks=config.objective.name in ("masked", "classify"),
        )
    with phases.phase("tokenizing", len(documents)):
        encoded = encode(config, tokenizer, documents, phases.step)
        documents, masks = encoded.documents, encoded.masks
    with phases.phase("splitting", len(documents)):
        split = split_by_family(encoded.related, [d.sha256 for d in documents], config.reference, config.seed)
    with phases.phase("reference set", len(split.reference)):
        reference, training, decontamination = _reference(part, config, tokenizer, encoded, split)
    with phases.phase("shards", len(training)):
        shards = write_shards(
            part / FOLDER,
            (encoded.ids[i] for i in phases.counted(training)),
            tokenizer.eos_id if encoded.examples is None else None,
            tokenizer.vocab_size,
            scored=(masks[i] for i in training) if masks is not None else None,
        )
    labels = None if encoded.labels is None else encoded.labels.take(training)
    if labels is not None:
        write_labels(part, labels.numbers)
    windows, without = _windows(part, config, shards["tokens"], tokenizer.prefix_id)
    sha256 = shards.pop("sha256")
    trained = {"windows": len(windows), "windows_without_target": without, "bytes": _bytes(documents, training)}
    trained |= encoded.facts(training) | ({} if isinstance(windows, Windows) else {"fill": round(windows.fill(), 4)})
    facts: dict[str, Any] = {
        "name": config.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "prefix_id": tokenizer.prefix_id,
        "pad_id": tokenizer.special.get("pad_token"),
        "fingerprints": {
            "data": _fingerprint(sha256, tokenizer, config, labels),
            "tokenizer": tokenizer.fingerprint,
            "reference_text": reference["fingerprints"]["text"],
            "reference_tokens": reference["fingerprints"]["tokens"],
        },
        "read": read.as_dict(),
        "train": {**shards, **trained},
        **({} if labels is None else {"labels": labels.facts()}),
        "reference": {**reference["counts"], "max_windows": reference["cut"]["max_windows"]},
        "decontamination": decontamination,
        "tokenizer_trained": config.data.tokenizer is None,
        **({"switched_off": tokenizer.switched_off} if tokenizer.switched_off else {}),
        "seconds": phases.seconds,
        "settings": settings,
    }
    facts["unmet"] = list(unmet_requests(facts))
    write_json(part / FACTS, facts)
    return facts


def _fingerprint(sha256: str, tokenizer: TextTokenizer, config: Config, labels: Labels | None) -> str:
    """Of all that training sees of the data: tokens, and how they come into windows where that is no stream; labels."""
    told = [sha256, tokenizer.fingerprint]
    if config.packing != "stream":
        told += [config.packing, str(config.sequence_length)]
    told += [] if labels is None else [labels.problem, *labels.names, *labels.given]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()


def _windows(part: Path, config: Config, tokens: int, prefix: int) -> tuple[AnyWindows, int]:
    """(training windows, how many of them are without a target).

    Raises:
        DataError: there is none to train on.
    """
    if config.packing == "stream" and tokens <= config.sequence_length:
        raise DataError(
            f"data.source: {tokens} training tokens: no window of {config.sequence_length} + 1; "
            "give more data, or lower sequence_length or reference.max_fraction"
        )
    found = open_windows(config, part, prefix)
    if not len(found):
        raise DataError("data.source: no document is left to train on; give more, or lower reference.max_fraction")
    without = int((found.target_counts(np.arange(len(found))) == 0).sum())
    if without == len(found):
        raise DataError(no_target(config.sequence_length, len(found)))
    return found, without


def _reference(
    part: Path,
    config: Config,
    tokenizer: TextTokenizer,
    encoded: Encoded,
    split: Split,
) -> tuple[dict[str, Any], list[int], dict[str, Any]]:
    """Writes the reference set; gives (its facts, the training documents, the decontamination record).

    What shares a run with the set *as stored* is looked for last: a document cut short may end in other
    tokens than it had there, so a training document can come to share a run with it. That one is dropped.
    """
    chosen, related = [encoded.documents[i] for i in split.reference], encoded.related
    drawn = {"seed": config.seed, "documents": config.reference.documents} | {
        "max_fraction": config.reference.max_fraction,
        "rule": "families in an order keyed by content and seed, whole, until the documents are reached",
    }
    lengths_D = np.asarray([len(encoded.ids[i]) for i in split.reference], np.int64)
    examples, labels, objective = encoded.examples, encoded.labels, config.objective.name
    record = {**split.record, "tokenizer_trained_on": "all documents, the reference set's included"}
    facts = build_reference(
        part / "reference",
        [d.source for d in chosen],
        [d.text for d in chosen],
        tokenizer,
        name=config.name,
        sequence_length=config.sequence_length,
        batch=config.reference.batch,
        block_samples=config.reference.block_samples,
        max_windows=config.reference.max_windows or fewest_windows(lengths_D, config.sequence_length),
        drawn=drawn,
        decontamination=record,
        prompts=[d.prompt for d in chosen],
        families=split.families,
        objective=None if objective == "causal" else objective,
        examples=None if examples is None else [examples[i] for i in split.reference],
        labels=None if labels is None else labels.take(split.reference),
    )
    if examples is None:
        stored = _stored(part / "reference", tokenizer)
    else:
        stored = joined([related[i] for i in split.reference])
    run = config.reference.min_shared_run
    training = list(split.training)
    guilty = sharing(*joined([related[i] for i in training]), *stored, run)
    training = [i for i, bad in zip(training, guilty.tolist(), strict=True) if not bad]
    across = int(sharing(*joined([related[i] for i in training]), *stored, run).sum())
    return (
        facts,
        training,
        {**record, "dropped_from_training": int(guilty.sum()), "shared_runs_across": across},
    )


def _stored(directory: Path, tokenizer: TextTokenizer) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Ids of the reference documents as the set holds them, put together again from its samples and prompts."""
    found = load_reference(directory, check=False)
    starts = found.offsets[:-1] + found.labels_from
    ids = [found.input_ids[a:b] for a, b in zip(starts, found.offsets[1:], strict=True)]
    flat = np.concatenate(ids).astype(np.uint32)
    tokens_D = np.bincount(found.document, weights=found.tokens).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(tokens_D)]).astype(np.int64)
    _, _, prompts = read_documents(directory)
    if not any(prompts):
        return flat, offsets
    asked = zip(tokenizer.encode(prompts), np.split(flat, offsets[1:-1]), strict=True)
    return joined([np.concatenate(pair) for pair in asked])


def _bytes(documents: Sequence[Document], chosen: Sequence[int]) -> int:
    return sum(documents[i].bytes for i in chosen)
