"""Plots of comparisons: a pair, the checkpoints of a run, a leaderboard, a sweep. Computes no verdicts of its own.

Colours are those of Okabe & Ito, which people with any colour vision tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from eval.compare.pair import Comparison
from eval.figure import make_folder, new_figure, write_figure
from eval.statistics import by_cluster, gaussian_fit, subset_error, subset_error_resampled
from eval.tables import LossTable

if TYPE_CHECKING:
    from eval.compare.along_run import RunComparison
    from eval.compare.leaderboard import Leaderboard
    from eval.compare.sweep import Ranking

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
MOST_MODELS = 10  # above it only the pairs with the best are drawn
DRAWS = 400
DRAWN_DOCUMENTS = 20_000_000  # in all draws together: some seconds
FAR = 1e9  # where an infinite bound is drawn to, far outside of every axis

Floats = NDArray[np.float64]


def plot_pair(a: LossTable, b: LossTable, comparison: Comparison, directory: Path) -> list[Path]:
    """losses.png, differences.png and error-bar.png of B against A; gives the files written.

    Paired by document (bits per byte) where the comparison is, else by sample (nats per token).

    Raises:
        DataError: the directory cannot be made or written to.
    """
    make_folder(directory)
    by_document = comparison.paired_by == "document"
    loss_a, loss_b = (by_cluster(t.loss, t.document) / math.log(2) if by_document else t.loss for t in (a, b))
    weight = by_cluster(a.bytes, a.document) if by_document else a.tokens.astype(np.float64)
    documents = np.unique(a.document) if by_document else a.document
    there = weight > 0  # a text of no bytes has no bits per byte
    documents = documents[there]
    loss_a, loss_b, weight = loss_a[there], loss_b[there], weight[there]
    return [
        _losses(loss_a / weight, loss_b / weight, comparison, directory / "losses.png"),
        _differences((loss_b - loss_a) / weight, comparison, directory / "differences.png"),
        _error_bar(
            by_cluster(loss_a, documents),
            by_cluster(loss_b, documents),
            by_cluster(weight, documents),
            comparison,
            directory / "error-bar.png",
        ),
    ]


def plot_run(run: RunComparison, tables: dict[int, Path], directory: Path) -> list[Path]:
    """curve.png of a run: its loss along the steps, and below each paired change against the checkpoint before.

    Args:
        tables: where the table of each step lies; steps without one are not drawn.

    Raises:
        DataError: no step to draw, or the directory cannot be made or written to.
    """
    points = [point for point in run.checkpoints if point.step in tables]
    if not points:
        raise DataError(f"--plots: no scored step of {run.run} to draw")
    make_folder(directory)
    figure, (upper, lower) = new_figure(9, 7.5, rows=2, sharex=True, height_ratios=(1, 1))
    steps = np.array([point.step for point in points], dtype=float)
    loss, error = (np.array([getattr(point.side, key) for point in points]) for key in ("loss", "se"))
    upper.fill_between(
        steps, loss - 1.96 * error, loss + 1.96 * error, color=BLUE, alpha=0.25, linewidth=0, label="95 %, clustered"
    )
    upper.plot(steps, loss, ".-", color=BLUE, label="loss on the reference set")
    upper.set_ylabel(f"loss, {run.unit}")
    upper.set_title(Path(run.run).name)
    upper.legend()

    changes = [(point.step, point.versus_previous) for point in points if point.versus_previous is not None]
    values = [comparison.difference.percent for _, comparison in changes]
    bounds = [comparison.ci95_percent for _, comparison in changes]
    told = [comparison.verdict in ("better", "worse") for _, comparison in changes]
    at = [step for step, _ in changes]
    _intervals(lower, at, values, bounds, told, upright=True, marks=("better or worse", "no difference seen"))
    reach = changes[-1][1].noise_bound_percent if changes else None
    if reach:
        label = f"what chance in training moves two by, at most: ± {reach:.2g} %"
        lower.axhspan(-reach, reach, color=ORANGE, alpha=0.18, linewidth=0, label=label)
    lower.axhline(0, color="black", linewidth=0.8)
    note = _fit_scale(lower, values, bounds, reach or 0.0, upright=True)
    lower.set_ylabel(f"paired change, % of the loss before\n(95 % interval){note}")
    lower.set_xlabel("optimizer step")
    if changes:
        lower.legend()
    return [write_figure(figure, directory / "curve.png")]


def plot_leaderboard(leaderboard: Leaderboard, directory: Path) -> list[Path]:
    """forest.png: the paired change of every pair with its interval; of more than 10 models, each against the best.

    Raises:
        DataError: the directory cannot be made or written to.
    """
    make_folder(directory)
    pairs = list(leaderboard.pairs)
    best = leaderboard.entries[0].name
    few = len(leaderboard.entries) <= MOST_MODELS
    if not few:
        pairs = [pair for pair in pairs if pair.comparison.a.name == best]
    found = [pair.comparison for pair in pairs]
    labels = [f"{_short(c.b.name)}  against  {_short(c.a.name)}" if few else _short(c.b.name) for c in found]
    values = [comparison.difference.percent for comparison in found]
    bounds = [comparison.ci95_percent for comparison in found]
    figure, axes, note = _forest(labels, values, bounds, [pair.told_apart for pair in pairs], 1.8)
    axes.set_xlabel(f"paired change, % of the lower loss (95 % interval){note}")
    axes.set_title("all pairs" if few else f"each against the best, {_short(best)}")
    return [write_figure(figure, directory / "forest.png")]


def plot_sweep(ranking: Ranking, directory: Path) -> list[Path]:
    """sweep.png: how far each value lies behind the best, with its interval (documents, and seeds where several).

    Raises:
        DataError: there is one value only, or the directory cannot be made or written to.
    """
    behind = [(place.name, place.behind) for place in ranking.places if place.behind is not None]
    if not behind:
        raise DataError("--plots: a sweep with one value that is ranked has nothing to draw")
    make_folder(directory)
    values = [one.percent for _, one in behind]
    bounds = [one.ci95 for _, one in behind]
    labels = [_short(name) for name, _ in behind]
    figure, axes, note = _forest(labels, values, bounds, [one.weights_apart for _, one in behind], 2.0)
    seeds = max(len(place.losses) for place in ranking.places)
    covers = "documents and seeds" if seeds > 1 else "documents alone, one seed each"
    axes.set_xlabel(f"behind the best, % of its loss\n(95 % interval, of {covers}){note}")
    axes.set_title(f"behind {_short(ranking.places[0].name)}, the best")
    return [write_figure(figure, directory / "sweep.png")]


def _forest(
    labels: list[str], values: list[float], bounds: list[tuple[float, float]], told: list[bool], room: float
) -> tuple[Any, Any, str]:
    """(figure, its axes, what to say of the scale) of intervals one below the other; `room`: inches beside rows."""
    figure, (axes,) = new_figure(6.5 + 0.07 * max(map(len, labels)), room + 0.3 * len(labels))
    rows = list(range(len(labels)))
    _intervals(axes, rows, values, bounds, told, upright=False, marks=("told apart (Holm)", "not told apart"))
    axes.axvline(0, color="black", linewidth=0.8)
    note = _fit_scale(axes, values, bounds, 0.0, upright=False)
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8.5)
    return figure, axes, note


def _losses(a_N: Floats, b_N: Floats, comparison: Comparison, path: Path) -> Path:
    figure, (axes,) = new_figure(9, 5.6)
    edges = np.linspace(*_central(np.concatenate([a_N, b_N]), 0.001), _bins(len(a_N), 60))
    errors = []
    for x_N, side, color in ((a_N, comparison.a, BLUE), (b_N, comparison.b, ORANGE)):
        fit = gaussian_fit(x_N)
        axes.hist(x_N, edges, density=True, histtype="stepfilled", color=color, alpha=0.25)
        label = (
            f"{_short(side.name)}: mean {fit.mean:.3f}, sd {fit.sd:.3f}, skewness {_signed(fit.skewness, '.2f')},\n"
            f"beyond 3 sd: {100 * fit.share_below:.2f} % below, {100 * fit.share_above:.2f} % above "
            f"(a normal: {100 * fit.normal_share:.2f} %)"
        )
        axes.hist(x_N, edges, density=True, histtype="step", color=color, linewidth=1.5, label=label)
        if fit.sd > 0:
            grid = np.linspace(edges[0], edges[-1], 400)
            normal = np.exp(-(((grid - fit.mean) / fit.sd) ** 2) / 2) / (fit.sd * math.sqrt(2 * math.pi))
            axes.plot(grid, normal, "--", color=color, linewidth=1.2)
        errors.append(fit.unpaired_percent)
    items = f"{comparison.paired_by}s"
    axes.plot([], [], "--", color=GREY, label="normal with the same mean and sd")
    axes.set_xlabel(f"loss of a {comparison.paired_by}, {comparison.unit}")
    axes.set_ylabel("density")
    axes.set_title(
        f"losses of {len(a_N):,} {items}; taken as independent, two such means differ by chance by "
        f"± {errors[0]:.2g} % (√2·sd/√N)"
    )
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(loc="upper left")
    return write_figure(figure, path)


def _differences(d_N: Floats, comparison: Comparison, path: Path) -> Path:
    found = comparison.difference
    percent_N = 100 * d_N / comparison.a.loss
    figure, (upper, lower) = new_figure(9, 6, rows=2, height_ratios=(5, 1))
    low, high = _central(np.append(percent_N, 0.0), 0.005)
    outside = int(np.sum((percent_N < low) | (percent_N > high)))
    upper.hist(percent_N, np.linspace(low, high, _bins(len(percent_N), 80)), color=BLUE, alpha=0.45)
    upper.axvline(0, color="black", linewidth=1, label="no difference")
    items = f"{comparison.paired_by}s"
    label = f"mean {_signed(found.percent, '.3g')} %; lower in B on {100 * found.win_rate:.0f} % of {items}"
    upper.axvline(found.percent, color=RED, linewidth=1.5, label=label)
    upper.set_xlabel(
        f"B − A of a {comparison.paired_by}, % of A's mean loss" + (f" ({outside:,} lie outside)" if outside else "")
    )
    upper.set_ylabel(items)
    upper.set_title(f"A: {_short(comparison.a.name)}, B: {_short(comparison.b.name)}")
    upper.legend()
    bounds = [found.ci95_percent]
    _intervals(lower, [0], [found.percent], bounds, [True], upright=False, marks=("", ""), color=RED)
    lower.axvline(0, color="black", linewidth=1)
    lower.set_xlim(*_reach([0.0, found.percent], bounds, 0.0))
    lower.set_yticks([])
    bounded = all(math.isfinite(bound) for bound in found.ci95_percent)
    lower.set_xlabel(
        f"the mean with its 95 % interval, clustered by document{'' if bounded else ' (too few for a bound)'}; %"
    )
    return write_figure(figure, path)


def _error_bar(a_C: Floats, b_C: Floats, m_C: Floats, comparison: Comparison, path: Path) -> Path:
    figure, (axes,) = new_figure(9, 5.6)
    count = len(m_C)
    sizes = np.unique(np.geomspace(2, count, 200).astype(np.int64))
    drawn = np.unique(np.geomspace(min(8, count - 1), max(0.8 * count, 1), 12).astype(np.int64))
    draws = int(min(DRAWS, max(50, DRAWN_DOCUMENTS // count)))
    # Drawn without replacement, so that a subset nears the whole: the factor makes it one of a larger text again.
    larger = 1 / np.sqrt(1 - drawn / count)
    mean_a, mean_b = float(a_C.sum() / m_C.sum()), float(b_C.sum() / m_C.sum())

    def by_theory(y_C: Floats, weight_C: Floats) -> Floats:
        return 100 * subset_error(y_C, weight_C, sizes, finite=False)

    def by_drawing(y_C: Floats, weight_C: Floats, seed: int) -> Floats:
        return 100 * larger * subset_error_resampled(y_C, weight_C, drawn, draws=draws, seed=seed)

    one, other = by_theory(a_C, m_C) / mean_a, by_theory(b_C, m_C) / mean_a
    one_drawn, other_drawn = by_drawing(a_C, m_C, 0) / mean_a, by_drawing(b_C, m_C, 1) / mean_a
    curves = [
        ("two means, unpaired", RED, "s", np.hypot(one, other), np.hypot(one_drawn, other_drawn)),
        ("one mean", ORANGE, "^", one, one_drawn),
        ("paired difference", BLUE, "o", by_theory(b_C - a_C, a_C), by_drawing(b_C - a_C, a_C, 2)),
    ]
    lowest = 0.0
    for name, color, mark, theory, resampled in curves:
        if not np.any(theory > 0):
            continue  # identical tables have no paired error, and a logarithm none of zero
        axes.plot(sizes, theory, color=color, label=f"{name}: {theory[-1]:.2g} % with all {count:,}")
        axes.plot(drawn, resampled, mark, color=color, markersize=5, markerfacecolor="white")
        lowest = float(theory[-1])
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label=f"marks: by drawing subsets ({draws} times)")
    if lowest > 0 and mean_b > 0:
        axes.set_xscale("log")
        axes.set_yscale("log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(_plain)
        short = low > 0 and high < 20 * low  # then whole powers of ten are too few to read by
        axis.set_minor_formatter(_plain if short else lambda *_: "")
    axes.grid(True, which="both", alpha=0.2)
    axes.set_xlabel("documents in the set")
    axes.set_ylabel("standard error, % of A's loss")
    axes.set_title("what a smaller or larger reference set would tell")
    axes.legend()
    return write_figure(figure, path)


def _intervals(
    axes: Any,
    at: Sequence[float],
    values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
    told: Sequence[bool],
    *,
    upright: bool,
    marks: tuple[str, str],
    color: str = BLUE,
) -> None:
    """Points with their intervals: filled where `told`, hollow and grey where not; infinite bounds leave the axes."""
    for wanted, label, shade, face in ((True, marks[0], color, color), (False, marks[1], GREY, "white")):
        chosen = [i for i, one in enumerate(told) if bool(one) is wanted]
        if not chosen:
            continue
        x, y = [at[i] for i in chosen], np.array([values[i] for i in chosen])
        low, high = (np.clip([bounds[i][k] for i in chosen], -FAR, FAR) for k in (0, 1))
        error = np.maximum(np.stack([y - low, high - y]), 0)
        style: dict[str, Any] = {
            "fmt": "o",
            "color": shade,
            "markerfacecolor": face,
            "markersize": 5,
            "capsize": 3,
            "linewidth": 1.3,
            "label": label or None,
        }
        if upright:
            axes.errorbar(x, y, yerr=error, **style)
        else:
            axes.errorbar(y, x, xerr=error, **style)


def _fit_scale(
    axes: Any, values: Sequence[float], bounds: Sequence[tuple[float, float]], least: float, *, upright: bool
) -> str:
    """Limits by what is finite; logarithmic away from zero, as the words given say, where changes are very unequal."""
    note = ""
    which = "y" if upright else "x"
    sizes = np.abs([value for value in values if math.isfinite(value)])
    halves = [(high - low) / 2 for low, high in bounds if math.isfinite(high - low) and high > low]
    known = float(np.median(halves)) if halves else 0.0
    least = 2 * math.sqrt(2) * least
    if known > 0 and sizes.max() > 100 * known:  # on a straight scale most would lie on zero
        linear, note = 2 * known, "; logarithmic away from 0"
        getattr(axes, f"set_{which}scale")("symlog", linthresh=linear, linscale=1.0)
        (axes.yaxis if upright else axes.xaxis).set_major_formatter(_plain)
        low, high = (2 * end for end in _ends([-linear / 2, linear / 2, *values], bounds, least))
    else:
        low, high = _reach([0.0, *values], bounds, least)
    getattr(axes, f"set_{which}lim")(low, high)
    return note


def _reach(values: Sequence[float], bounds: Sequence[tuple[float, float]], least: float) -> tuple[float, float]:
    """Limits that hold all finite values and bounds, and ± `least`, with some room."""
    low, high = _ends(values, bounds, least)
    room = 0.08 * (high - low) or 1e-6
    return low - room, high + room


def _ends(values: Sequence[float], bounds: Sequence[tuple[float, float]], least: float) -> tuple[float, float]:
    ends = [x for x in (*values, *(bound for pair in bounds for bound in pair), -least, least) if math.isfinite(x)]
    return min(ends), max(ends)


def _bins(count: int, most: int) -> int:
    """Edges of a histogram of so many values: about 2·√n bins."""
    return 1 + min(most, max(8, math.isqrt(4 * count)))


def _central(x: Floats, out: float) -> tuple[float, float]:
    """The range of `x` without the share `out` on either side, never without width."""
    low, high = (float(bound) for bound in np.quantile(x, [out, 1 - out]))
    room = 0.02 * (high - low) or max(1e-6, 1e-3 * abs(high))
    return low - room, high + room


def _plain(value: float, _: object = None) -> str:
    """A tick in plain digits."""
    return f"{value:,.10g}".replace("-", "−")


def _signed(value: float, form: str) -> str:
    """A number with its sign, a minus being as wide as a plus."""
    return f"{value:+{form}}".replace("-", "−")


def _short(name: str, most: int = 40) -> str:
    """A name that leaves room for the plot: the end tells more than the beginning. `$` would begin a formula."""
    name = name if len(name) <= most else f"…{name[1 - most :]}"
    return name.replace("$", r"\$")
