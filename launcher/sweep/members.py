"""The members of a sweep, out of `--sweep key=v1,v2` and `--seeds N`: named, checked, each with its settings.

Nothing is written or started here; that is `launcher.sweep.store`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.load import dump_config, is_named, load_config, resolve
from configs.run.directory import RunDir
from configs.schema import NAME_PATTERN, Config

MOST = 1000  # members; Slurm's job arrays end at 1,000 unless a site allows more
LONGEST_NAME = 80
DATA = "data.dir"  # may be swept where all are scored on one set
NOT_SWEPT = {
    "name": "members are named by what is swept",
    "seed": "use --seeds N",
    "run.": "each member has its folder in the sweep's; use --sweep-dir",
    "data.": "members share how data is prepared; prepare each, and sweep data.dir with eval.reference=REF",
    "reference.": "members share their reference set; prepare each, and sweep data.dir with eval.reference=REF",
    "eval.": "members are all scored in the same way",
    "launch.": "members are all submitted in the same way",
}


@dataclass(frozen=True)
class Member:
    """One run of a sweep. `values`: the swept keys with what they have here, as they were typed."""

    name: str
    values: dict[str, str]
    seed: int
    config: Config

    @property
    def words(self) -> str:
        return value_words(self.values)


@dataclass(frozen=True)
class Sweep:
    """The members in their order, all values with the first seed first, and where they go.

    `axes`: the swept keys and their values, as they were typed.
    """

    path: Path
    name: str
    source: str
    overrides: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]
    seeds: int
    members: tuple[Member, ...]

    def run(self, member: Member) -> RunDir:
        return RunDir(self.path / member.name)


def value_words(values: dict[str, Any]) -> str:
    """`optimizer.lr=3e-4, batch.micro=2`; of no values, that of a sweep over seeds alone."""
    return ", ".join(f"{key}={text}" for key, text in values.items()) or "all settings alike"


def members(
    source: str, overrides: Sequence[str], sweep: Sequence[str], seeds: int = 1, *, sweep_dir: Path | None = None
) -> Sweep:
    """The members of `--sweep key=v1,v2 …` and `--seeds N`: every combination of values, times N seeds.

    All are checked as a run's settings are. The seeds are those from `seed` on. Nothing is written.

    Args:
        sweep_dir: where the members go; default `run.dir` with `-sweep` at its end.

    Raises:
        ConfigError: what is wrong with any of them, a line each; said once where it is the same for several.
    """
    axes = _axes(sweep, overrides)
    count = seeds
    for texts in axes.values():
        count *= len(texts)
    if seeds < 1:
        raise ConfigError(f"--seeds: {seeds} is not a number of seeds of 1 or more")
    if count < 2:
        raise ConfigError("--sweep: one member is no sweep; give two or more values, or --seeds 2 or more")
    if count > MOST:
        raise ConfigError(f"--sweep: {count:,} members; at most {MOST:,} make one sweep")
    chosen = [dict(zip(axes, texts, strict=True)) for texts in itertools.product(*axes.values())]
    configs = _loaded(source, overrides, chosen, axes)
    first = configs[0]
    path = (sweep_dir or first.run.dir.with_name(f"{first.run.dir.name}-sweep")).absolute()  # type: ignore[union-attr]
    names = _names(first.name, chosen, seeds, first.seed)
    out: list[Member] = []
    for seed in range(first.seed, first.seed + seeds):  # a seed of all values first: what is done early can be compared
        for values, config in zip(chosen, configs, strict=True):
            name = names[len(out)]
            run = config.run.model_copy(update={"dir": path / name})
            own = config.model_copy(update={"name": name, "seed": seed, "run": run})
            out.append(Member(name, values, seed, own))
    return Sweep(path, first.name, source, tuple(overrides), axes, seeds, tuple(out))


def split_values(text: str) -> list[str]:
    """The values of `v1,v2`; commas in brackets, braces and quotes do not split."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not parts[-1].strip(" [{,:"):
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _axes(sweep: Sequence[str], overrides: Sequence[str]) -> dict[str, tuple[str, ...]]:
    axes: dict[str, tuple[str, ...]] = {}
    problems = []
    fixed = {override.partition("=")[0] for override in overrides}
    for asked in sweep:
        key, separator, text = asked.partition("=")
        texts = split_values(text)
        if not separator or not key:
            problems.append(f"--sweep {asked!r}: expected key=v1,v2, such as optimizer.lr=1e-4,3e-4")
        elif key in axes:
            problems.append(f"--sweep {key}: given twice; give all its values at once: {key}=v1,v2")
        elif reason := _why_not(key):
            problems.append(f"--sweep {key}: cannot be swept: {reason}")
        elif key in fixed:
            problems.append(f"{key}: is set and swept; leave one of the two out")
        elif "" in texts:
            problems.append(f"--sweep {asked}: there is an empty value; write null for none")
        else:
            axes[key] = tuple(texts)
    if problems:
        raise ConfigError(*problems)
    return axes


def _why_not(key: str) -> str:
    if key == DATA:
        return ""
    return next((why for name, why in NOT_SWEPT.items() if is_named(key, (name,)) or f"{key}." == name), "")


def _loaded(
    source: str, overrides: Sequence[str], chosen: list[dict[str, str]], axes: dict[str, tuple[str, ...]]
) -> list[Config]:
    """The settings of each combination, with all paths absolute; whatever else depends on a machine stays open."""
    found: list[Config] = []
    problems: dict[str, list[str]] = {}
    for values in chosen:
        try:
            config = load_config(source, [*overrides, *(f"{key}={text}" for key, text in values.items())])
            there = resolve(config, nproc=1)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(value_words(values))
            continue
        if DATA in axes and config.eval.reference is None:
            text = f"{DATA}: is swept, so all members must be scored on one set; name it: eval.reference=REF"
            problems.setdefault(text, []).append(value_words(values))
            continue
        paths = {key: getattr(there, key) for key in ("run", "data", "model", "baseline")}
        scored = config.eval.model_copy(update={"reference": there.eval.reference})
        found.append(config.model_copy(update={**paths, "eval": scored}))
    if problems:
        raise ConfigError(*told_once(problems, len(chosen), axes))
    seen: dict[str, dict[str, str]] = {}
    for values, config in zip(chosen, found, strict=True):
        twin = seen.setdefault(dump_config(config), values)
        if twin is not values:
            raise ConfigError(
                f"--sweep: {value_words(twin)} and {value_words(values)} are the same settings; give each once"
            )
    return found


def told_once(problems: dict[str, list[str]], total: int, keys: Sequence[str] | dict[str, Any]) -> Iterator[str]:
    """Each problem once: by itself where all have it or it names a swept key, else with the first that has it."""
    for problem, where in problems.items():
        if len(where) == total or any(problem.startswith(f"{key}:") for key in keys):
            yield problem
        else:
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            yield f"{problem} (with {where[0]}{more})"


def _names(name: str, chosen: list[dict[str, str]], seeds: int, first_seed: int) -> list[str]:
    """NAME-lr3e-4-seed1 and the like: safe as a folder, and no two alike."""
    keys = list(chosen[0])
    leaves = [key.rpartition(".")[2] for key in keys]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}
    taken: set[str] = set()
    out = []
    for seed in range(first_seed, first_seed + seeds):
        for values in chosen:
            tail = f"-seed{seed}" if seeds > 1 else ""
            pieces = "".join(f"-{_piece(short[key], text)}" for key, text in values.items())
            stem = (name + pieces)[: max(len(name), LONGEST_NAME - len(tail))].rstrip("-_.") or name
            stem = stem[: 100 - len(tail) - 5]
            candidate, number = stem + tail, 1
            while candidate in taken:  # cut short, or told apart by letters that no folder should have
                number += 1
                candidate = f"{stem}.{number}{tail}"
            taken.add(candidate)
            assert NAME_PATTERN.fullmatch(candidate), candidate
            out.append(candidate)
    return out


def _piece(leaf: str, text: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).replace("+", "").strip("_")
    return f"{leaf}{safe}" if safe[:1].isdigit() or safe[:1] in "-." else f"{leaf}_{safe}"
