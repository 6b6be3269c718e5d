"""`vernier prepare`: data preparation with its progress and its report; and a reference set tokenized again."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.console import console as people
from configs.console import tell, waiting
from configs.errors import EXIT_DONE, EXIT_VERDICT, ConfigError
from configs.files.paths import path_problems
from configs.load import load_config, pass_words, resolve, with_absolute_paths
from configs.run.length import with_lengths
from configs.schema import Config
from eval.progress import Phases
from launcher.text import typed
from launcher.watch.next_command import say_next

LEAST_WORTH = 40  # documents of equal size; with fewer the caution about them is said instead
# Percent that one document would show at 80 % power, 60 steps apart and one: 2.8 standard errors × √documents, medians
# of seven runs of `benchmarks.family` (1.4–5.4 and .40–.78).
SHOWN_BY_ONE = (3.5, 0.55)


def run_prepare(source: str | None, overrides: list[str], *, fresh: bool, json_out: bool) -> int:
    """Prepares the data of a config, or says that it is there; prints the data report.

    Raises:
        ConfigError: no config was named, or its settings are wrong.
    """
    if source is None:
        raise ConfigError("prepare: give CONFIG, or --reference with --tokenizer and --out")
    config = with_absolute_paths(load_config(source, overrides))
    report = prepare_data(config, fresh=fresh)
    if json_out:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        for what, said in _report(report, config):
            tell(f"{what:<11}{said}")
        say_next(people(), *(f"{verb} {shlex.join([source, *overrides])}" for verb in ("plan", "train")))
    return EXIT_DONE


def prepare_data(config: Config, *, fresh: bool = False) -> dict[str, Any]:
    """Prepares the data of a config, or finds it there, with its progress on stderr; gives the data report.

    Raises:
        ConfigError: a setting or source is wrong, or what is there was prepared with other settings.
        DataError: the source holds too little, or what is there is damaged.
    """
    with waiting("loading the libraries"):
        from trainer.data.prepare import prepare

    with Phases(sys.stderr, lambda name, done, to_do: None if done else f"{name} …") as phases:
        return prepare(resolve(config), fresh=fresh, say=phases.say, progress=phases)


def run_retokenize(
    reference: Path, tokenizer: Path | None, out: Path | None, sequence_length: int | None = None
) -> int:
    """Tokenizes the documents of a reference set with another tokenizer (or windows), into a new reference set.

    Raises:
        ConfigError: an option is missing, or a path cannot be had.
    """
    if tokenizer is None or out is None:
        raise ConfigError("prepare --reference: give --tokenizer DIR and --out DIR as well")
    from eval.reference.set import retokenize
    from eval.reference.tokenizer import open_tokenizer

    named = (("--reference", reference), ("--tokenizer", tokenizer), ("--out", out))
    problems = [problem for key, path in named for problem in path_problems(key, path)]
    if problems:
        raise ConfigError(*problems)

    retokenize(reference, tokenizer, out, sequence_length=sequence_length)
    if switched_off := open_tokenizer(tokenizer).switched_off:
        tell(f"caution: {tokenizer}: its tokenizer.json asks for {switched_off}, which was switched off")
    tell(f"wrote {out}")
    return EXIT_DONE


def run_verify(directory: Path, *, json_out: bool) -> int:
    """Hashes all of a prepared data set (or reference set) again; prints what is not as it was written.

    Exit code 0 where all is, 3 where something differs.

    Raises:
        ConfigError: it is neither prepared data nor a reference set.
    """
    from configs.files.atomic import read_manifest
    from trainer.data.integrity import KIND, damages, told

    manifest = read_manifest(directory)
    if manifest.get("kind") not in (KIND, "reference"):
        raise ConfigError(f"--verify: {directory} is a {manifest.get('kind')}, not prepared data or a reference set")
    found = list(damages(directory, manifest))
    files = manifest["files"]
    if json_out:
        wrong = [{"file": name, "what": what} for name, what in found]
        print(json.dumps({"directory": str(directory), "files": len(files), "damaged": wrong}, indent=2))
    else:
        for name, what in found:
            print(told(directory, name, what))
        if not found:
            size = sum(fact["bytes"] for fact in files.values())
            print(f"{directory}: {len(files)} files, {size / 1e6:,.1f} MB, all as they were written")
    return EXIT_VERDICT if found else EXIT_DONE


def _report(facts: dict[str, Any], config: Config) -> Iterator[tuple[str, str]]:
    """(what, said) of each line of the data report."""
    from trainer.data.read_report import left_out

    read, train, reference, split = (facts[k] for k in ("read", "train", "reference", "decontamination"))
    run, across = split["min_shared_run"], split["shared_runs_across"]
    yield "read", f"{read['documents_found']:,} documents; {read['bytes'] / 1e6:.1f} MB are used"
    first, *names = left_out(read, facts["settings"]["data.text_field"])
    yield "left out", first
    yield from (("", name) for name in names)
    yield "tokenizer", f"{facts['vocab_size']:,} entries"
    yield (
        "families",
        f"{split['families']:,} of {split['documents']:,} documents (a shared run of {run} tokens joins), "
        f"the largest has {split['largest_family']}; {across} such runs are on both sides",
    )
    scored = f", {train['scored_tokens']:,} of them scored" if train["scored_tokens"] < train["tokens"] else ""
    yield (
        "training",
        f"{train['documents']:,} documents, {train['tokens']:,} tokens{scored}, {train['windows']:,} windows",
    )
    yield from _examples(train, facts)
    if train.get("windows_without_target"):  # not in data of an earlier version
        yield (
            "",
            f"{train['windows_without_target']:,} windows have no token to train on; "
            "batches of such alone are passed over",
        )
    yield (
        "reference",
        f"{reference['documents']:,} documents, {reference['samples']:,} samples, {reference['tokens']:,} tokens; "
        f"the largest document has {100 * reference['largest_document_share']:.2f} % of them",
    )
    worth = reference.get("effective_documents")
    measured = facts["settings"].get("objective.name", "causal") == "causal"
    if worth is not None and worth >= LEAST_WORTH and measured:
        apart, one = (spread / worth**0.5 for spread in SHOWN_BY_ONE)
        yield (
            "",
            f"worth {worth:,.0f} documents of equal size: as small models in training spread (benchmarks.family), it "
            f"shows changes of {apart:.2g} % between snapshots 60 steps apart and of {one:.1g} % after one step, at "
            "80 % power; what your run's can show, vernier compare RUN says",
        )
    yield from (("caution", unmet) for unmet in facts.get("unmet", ()))  # not in data of an earlier version
    yield "steps", f"with batch.global={config.batch.global_}, {pass_words(train['windows'], with_lengths(config))}"
    yield "data", typed(config.data_dir)


def _examples(train: dict[str, Any], facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the report says of documents that are fed whole, and of their labels."""
    if "fill" in train and facts["settings"].get("data.packing") == "documents":
        yield "", f"packed: {100 * train['fill']:.1f} % of the windows' places hold a token"
    if train.get("cut"):
        yield "", f"{train['cut']:,} are longer than a window and lose their ends, {train['tokens_cut']:,} tokens"
    if train.get("without_target"):
        yield "", f"{train['without_target']:,} more have nothing to learn in a window, and are left out"
    labels = facts.get("labels")
    if labels is not None and labels["names"]:
        counted = sorted(zip(labels["counts"], labels["names"], strict=True), reverse=True)
        shown = ", ".join(f"{name} {count:,}" for count, name in counted[:8])
        yield "labels", shown + (f" and {len(counted) - 8:,} more" if len(counted) > 8 else "")
