"""What came out of a sweep: its values ranked by paired comparison, the winner's margin, and who is not in it and why.

The members' loss tables are read here; the statistics are `eval.compare.sweep`'s.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from configs.console import tell
from configs.errors import EXIT_DONE, ConfigError, DataError
from configs.run.directory import RunDir
from launcher.sweep.members import value_words
from launcher.sweep.store import FILE, read_sweep
from launcher.text import minus, new_table, p_words, perplexity, plus_minus, print_table, say
from launcher.watch.run_status import facts_of

if TYPE_CHECKING:  # what computes needs scipy and pyarrow, which a `vernier --help` must not wait for
    from eval.compare.sweep import Behind, Ranking
    from eval.compare.targets import Scale
    from eval.tables import LossTable


@dataclass(frozen=True)
class SweepTable:
    """A sweep's result. `members`: by value's words, the names of those that are ranked; `values`: their settings.

    `steps`: the last scored step of each ranked member. `left_out`: name, state and why of every other member.
    """

    path: Path
    keys: tuple[str, ...]
    seeds: int
    ranking: Ranking
    values: dict[str, dict[str, str]]
    members: dict[str, list[str]]
    steps: dict[str, int]
    left_out: tuple[dict[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """What `vernier compare SWEEPDIR --json` prints; losses in nats per token, null where a number is infinite."""
        from eval.compare.pair import finite

        places = self.ranking.places
        second = places[1] if len(places) > 1 else None
        return {
            "sweep": str(self.path),
            "swept": list(self.keys),
            "seeds": self.seeds,
            "reference": self.ranking.reference,
            "unit": self.ranking.unit,
            "alpha": self.ranking.alpha,
            "pairs": self.ranking.pairs,
            "winner": {
                "values": self.values[places[0].name],
                "runner_up": second and self.values[second.name],
                "margin": second and second.behind and second.behind.to_json(),
            },
            "values": [
                {
                    "place": number,
                    "values": self.values[place.name],
                    "members": [{"name": name, "step": self.steps[name]} for name in self.members[place.name]],
                    "loss": finite(place.loss),
                    "se_documents": finite(place.se_documents),
                    "se_seeds": finite(place.se_seeds),
                    "loss_by_seed": {str(seed): finite(loss) for seed, loss in place.losses.items()},
                    "versus_best": place.behind and place.behind.to_json(),
                }
                for number, place in enumerate(places, start=1)
            ],
            "not_ranked": list(self.left_out),
            "cautions": list(self.ranking.cautions),
        }


def find_sweep(text: str) -> Path | None:
    """The sweep that a path, or a bare name under `runs/`, means; None where there is none."""
    given = Path(text)
    for path in (given, Path("runs") / given) if len(given.parts) == 1 else (given,):
        if (path / FILE).is_file():
            return path
    return None


def compare_sweep(
    targets: list[str], options: list[str], *, json_out: bool, console: Console, plots: Path | None = None
) -> int | None:
    """Shows the sweep that `vernier compare` was given; None where it was given none.

    Args:
        options: what else was asked for, as it is typed; of these --plots goes with a sweep.
        plots: where to draw it.

    Raises:
        ConfigError: a sweep beside other targets, or with options that are about pairs.
    """
    found = [(text, path) for text in targets if (path := find_sweep(text)) is not None]
    if not found:
        return None
    text, path = found[0]
    if len(targets) > 1:
        raise ConfigError(f"compare: {text} is a sweep, which is shown by itself; give members of it: {text}/MEMBER")
    wrong = [option for option in options if option != "--plots"]
    if wrong:
        raise ConfigError(f"{wrong[0]}: does not go with a sweep ({text}); give members of it: {text}/MEMBER")
    return run_sweep_table(path, json_out, console, plots)


def sweep_table(sweep_dir: Path) -> SweepTable:
    """Ranks the members that have made all their steps and whose last snapshot is scored.

    Raises:
        DataError: no sweep, nobody to rank yet (a line a member says why), or tables that do not fit each other.
    """
    from eval.compare.sweep import rank

    content = read_sweep(sweep_dir)
    found: dict[str, dict[Scale, tuple[int, Path]]] = {}
    left_out: dict[str, tuple[str, str]] = {}
    for member in content["members"]:
        tables, state, why = _standing(RunDir(sweep_dir / member["name"]))
        if why:
            left_out[member["name"]] = state, why
        else:
            found[member["name"]] = tables
    scale = _common_scale(found)
    for name in [name for name, tables in found.items() if scale not in tables]:
        told = ", ".join(one.words for one in found.pop(name))
        left_out[name] = "done", f"scored as {told}, the others as {scale and scale.words}"
    if scale is None:
        lines = (f"{name}: {state}: {why}" for name, (state, why) in left_out.items())
        raise DataError(f"{sweep_dir}: no member can be ranked yet", *lines)
    read: dict[str, LossTable] = {}
    for name, tables in found.items():
        try:
            read[name] = _slim(tables[scale][1])
        except DataError as error:
            left_out[name] = "done", str(error)
    if not read:
        raise DataError(f"{sweep_dir}: no member can be ranked", *(f"{n}: {why}" for n, (_, why) in left_out.items()))
    scored: dict[str, dict[int, LossTable]] = {}
    values: dict[str, dict[str, str]] = {}
    names: dict[str, list[str]] = {}
    for member in content["members"]:
        if member["name"] in read:
            words = value_words(member["values"])
            values[words] = member["values"]
            names.setdefault(words, []).append(member["name"])
            scored.setdefault(words, {})[int(member["seed"])] = read[member["name"]]
    return SweepTable(
        path=sweep_dir,
        keys=tuple(content["sweep"]),
        seeds=int(content["seeds"]),
        ranking=rank(scored),
        values=values,
        members=names,
        steps={name: found[name][scale][0] for name in read},
        left_out=tuple(
            {"member": member["name"], "state": left_out[member["name"]][0], "why": left_out[member["name"]][1]}
            for member in content["members"]
            if member["name"] in left_out
        ),
    )


def _standing(run: RunDir) -> tuple[dict[Scale, tuple[int, Path]], str, str]:
    """(last scored step and its table by way of scoring, state, why it cannot be ranked or "")."""
    from eval.compare.targets import tables_of_run

    facts = facts_of(run)
    if facts.state != "done":
        far = "" if facts.state == "not started" else f" at step {facts.step} of {facts.steps or '?'}"
        return {}, facts.state, f"{facts.words}{far}" + (f": {facts.why}" if facts.why else "")
    last = max(run.whole_steps(run.snapshots), default=facts.step)
    try:
        by_step = tables_of_run(run.path)
    except DataError:
        command = f"vernier train {shlex.quote(str(run.path / 'train-config.yaml'))}"
        return {}, facts.state, f"done, but nothing of it is scored; {command} scores it unless eval.placement is none"
    tables = {scale: (max(paths), paths[max(paths)]) for scale, paths in by_step.items() if max(paths) >= last}
    if not tables:
        scored = max(max(paths) for paths in by_step.values())
        return {}, facts.state, f"done, but step {last} is not scored yet (the last that is: {scored})"
    return tables, facts.state, ""


def _common_scale(found: dict[str, dict[Scale, tuple[int, Path]]]) -> Scale | None:
    """The way of scoring that most members have."""
    ways = Counter(scale for tables in found.values() for scale in tables)
    return ways.most_common(1)[0][0] if ways else None


def _slim(path: Path) -> LossTable:
    """A loss table without its optional columns: a sweep may have a thousand."""
    from dataclasses import replace

    from eval.tables import read_table

    return replace(read_table(path), correct=None, position_loss=None, position_tokens=None)


def run_sweep_table(sweep_dir: Path, json_out: bool, console: Console, plots: Path | None = None) -> int:
    """Prints the result of a sweep; gives the exit code.

    Raises:
        DataError: see `sweep_table`.
    """
    table = sweep_table(sweep_dir)
    if json_out:
        print(json.dumps(table.to_json(), indent=2, allow_nan=False))
    else:
        print_sweep(table, console)
    if plots is not None:
        from eval.compare.plots import plot_sweep

        for path in plot_sweep(table.ranking, plots):
            tell(f"wrote {path}, and as .pdf and .svg", sys.stderr if json_out else None)
    return EXIT_DONE


def print_sweep(result: SweepTable, console: Console) -> None:
    """The values by loss, each beside the best; the margin; what the errors cover; who is missing."""
    places = result.ranking.places
    table = new_table()
    table.add_column("", justify="right")
    for key in result.keys:
        table.add_column(key, justify="right")
    for heading in (
        "seeds",
        "loss ± SE\n(documents)",
        "perplexity",
        "SE of it\n(seeds)",
        "behind the best,\n% (95 %)",
        "SE, %\n(documents)",
        "SE, %\n(seeds)",
        "p, Holm",
    ):
        table.add_column(heading, justify="right")
    table.add_column("")
    for number, place in enumerate(places, start=1):
        loss, error = plus_minus(place.loss, place.se_documents, signed=False, at_least=4)
        values = result.values[place.name]
        row = [str(number), *(values[key] for key in result.keys), str(len(place.losses)), f"{loss} ± {error}"]
        row += [perplexity(place.loss, result.ranking.unit), _small(place.se_seeds), *_behind_row(place.behind)]
        if number > 1 and place.behind is not None:
            row.append(_apart(place.behind))
        table.add_row(*(Text(cell) for cell in row))
    print_table(
        table, console, spare=("SE, %\n(documents)", "SE, %\n(seeds)", "SE of it\n(seeds)", "seeds", "perplexity")
    )
    for line, style in (*_margin(result), *_what_is_covered(result)):
        say(console, f"  {line}", style)
    for one in result.left_out:
        say(console, f"  not ranked: {one['member']}: {one['why']}", "yellow")
    for caution in result.ranking.cautions:
        say(console, f"  caution: {caution}", "yellow")


def _apart(behind: Behind) -> str:
    words = "told apart" if behind.weights_apart else "not told apart"
    return f"weights {words}" if behind.told_apart is None else words


def _small(value: float | None) -> str:
    """An error, to two digits."""
    return "unknown" if value is None else plus_minus(value, value, signed=False)[1]


def _behind_row(behind: Behind | None) -> list[str]:
    if behind is None:
        return ["", "", "", ""]
    if behind.comparison.difference.identical:
        return ["identical", "", "", ""]
    p = p_words(behind.p_holm).removeprefix("p ").removeprefix("= ")
    return [behind_words(behind, ""), _small(behind.se_documents), _small(behind.se_seeds), p]


def behind_words(behind: Behind, unit: str = " %") -> str:
    """How far behind in percent, with its 95 % interval: symmetric as ±, by flipped signs as its two bounds."""
    low, high = behind.ci95
    half = (high - low) / 2
    change, error = plus_minus(behind.percent, half if math.isfinite(half) else behind.se_documents)
    if behind.comparison.difference.method != "t":
        decimals = len(change.partition(".")[2])
        bounds = [f"{b:+.{decimals}f}" if math.isfinite(b) else ("∞" if b > 0 else "-∞") for b in (low, high)]
        return f"{minus(change)}{unit} [{minus(', '.join(bounds))}]{unit}"
    return f"{minus(change)}{unit} ± {error}{unit}"


def _margin(result: SweepTable) -> list[tuple[str, str]]:
    places = result.ranking.places
    best = places[0]
    if len(places) == 1:
        return [(f"{best.name}: the only value that can be ranked", "none")] if result.keys else []
    second = places[1]
    behind = second.behind
    if behind is None:
        return [(f"{best.name} is first; {second.name} shares no seed with it, so its margin is not known", "yellow")]
    if behind.comparison.difference.identical:
        return [(f"{best.name} and {second.name} are identical on every sample and seed", "none")]
    seeds = "unknown" if behind.se_seeds is None else f"{_small(behind.se_seeds)} %"
    p = p_words(behind.p_holm)
    size = (
        f"{behind_words(behind)} (95 %; standard error by documents {_small(behind.se_documents)} %, "
        f"by seeds {seeds}), {p} (Holm)"
    )
    rest = [p.name for p in places[2:] if p.behind is not None and not p.behind.weights_apart]
    if behind.told_apart is None:
        apart = "are better than" if behind.weights_apart else "are first, but not told apart from"
        said = f"these weights only, one seed: {best.name}'s {apart} those of {second.name}: {size}"
        lines = [(f"{said}; whether the setting is better needs more seeds", "none")]
    elif behind.told_apart:
        lines = [(f"{best.name} wins; its margin to the runner-up, {second.name}: {size}", "green")]
    else:
        lines = [(f"{best.name} is first, but not told apart from the runner-up, {second.name}: {size}", "none")]
    return [*lines, *[(f"not told apart from the first either: {name}", "none") for name in rest]]


def _what_is_covered(result: SweepTable) -> list[tuple[str, str]]:
    ranking = result.ranking
    lines = []
    if max(len(place.losses) for place in ranking.places) == 1:
        told = "one seed each: how much another seed would change is unknown, and no error here covers it"
        lines.append((f"{told}; a sweep with --seeds 3 tells", "yellow"))
    elif len(ranking.places) > 1:
        told = "differences are paired by sample and by seed"
        lines.append((f"{told}; intervals and p cover the choice of documents and of seeds", "none"))
        alone = [p.name for p in ranking.places if p.behind is not None and p.behind.se_seeds is None]
        if alone:
            lines.append((f"beside the best on one seed only, so without seed noise: {'; '.join(alone)}", "yellow"))
    if ranking.pairs > 1:
        told = f"p: Holm's for {len(ranking.places) - 1} comparisons with the best"
        lines.append((f"{told}, counted among {ranking.pairs} pairs, since the same losses chose the best", "none"))
    return lines
