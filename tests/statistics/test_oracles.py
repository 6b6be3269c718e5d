"""Every number of a verdict against statsmodels, scipy and brute force, on 30 tables at random: equal to 1e-9.

Legend: `_N` one entry a sample, `_C` one a document.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from eval.compare.pair import compare_tables
from eval.statistics import benjamini_hochberg, by_cluster, holm, paired_difference, power_for, sign_flip
from eval.statistics.long_run import cosine_squares, long_run_mean
from eval.statistics.paired import t_quantile, transformed, two_sided_p, untransformed
from eval.tables import LossTable

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, NDArray[np.int64]], Floats]
CLOSE = 1e-9

KINDS: dict[str, Draw] = {
    "normal": lambda rng, document_N: rng.normal(0, 1, len(document_N)),
    "lognormal": lambda rng, document_N: rng.lognormal(0, 1, len(document_N)) - 1.6,
    "t2": lambda rng, document_N: rng.standard_t(2, len(document_N)),
    "one document dominates": lambda rng, document_N: rng.normal(0, 1, len(document_N)) * (1 + 50 * (document_N == 0)),
    "ties": lambda rng, document_N: np.round(rng.normal(0, 1, len(document_N))),
    "small": lambda rng, document_N: 1e-6 * rng.normal(0, 1, len(document_N)),
    "zeros": lambda rng, document_N: rng.normal(0, 1, len(document_N)) * (rng.random(len(document_N)) < 0.1),
    "shared": lambda rng, document_N: (
        rng.normal(0, 1, document_N[-1] + 1)[document_N] + rng.normal(0, 0.2, len(document_N))
    ),
}
TABLES = [
    (kind, sizes, seed)
    for seed, (kind, sizes) in enumerate(itertools.product(KINDS, ("equal", "one", "pareto", "few")))
]
TABLES = TABLES[:30]


def a_pair(kind: str, sizes: str, seed: int) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """(losses of A, of B, targets, documents) of each sample."""
    rng = np.random.default_rng(seed)
    counts_C = {
        "equal": np.full(60, 4),
        "one": np.ones(90, np.int64),
        "pareto": np.minimum(200, np.ceil(rng.pareto(1.1, 80) + 0.5).astype(np.int64)),
        "few": rng.integers(1, 6, int(rng.integers(4, 12))),
    }[sizes]
    document_N = np.repeat(np.arange(len(counts_C)), counts_C)
    tokens_N = rng.integers(20, 128, len(document_N)).astype(np.float64)
    a_N = tokens_N * rng.normal(2.2, 0.3, len(document_N))
    return a_N, a_N + KINDS[kind](rng, document_N) - 0.1, tokens_N, document_N


def by_statsmodels(y_N: Floats, m_N: Floats, document_N: NDArray[np.int64]) -> tuple[float, float]:
    """(Σy/Σm, its clustered error): the mean of y/m weighted by m, with cluster-robust covariance × C/(C − 1)."""
    groups = {"groups": document_N, "use_correction": False}
    fit = sm.WLS(y_N / m_N, np.ones(len(y_N)), weights=m_N).fit(cov_type="cluster", cov_kwds=groups)
    clusters = len(np.unique(document_N))
    return float(fit.params[0]), float(fit.bse[0]) * math.sqrt(clusters / (clusters - 1))


@pytest.mark.parametrize(("kind", "sizes", "seed"), TABLES)
def test_estimates_errors_tests_and_intervals(kind: str, sizes: str, seed: int) -> None:
    a_N, b_N, tokens_N, document_N = a_pair(kind, sizes, seed)
    found = paired_difference(a_N, b_N, tokens_N, document_N)
    df = len(np.unique(document_N)) - 1
    loss_a, se_a = by_statsmodels(a_N, tokens_N, document_N)
    loss_b, se_b = by_statsmodels(b_N, tokens_N, document_N)
    nats, se_nats = by_statsmodels(b_N - a_N, tokens_N, document_N)
    share, se_share = by_statsmodels(b_N - a_N, a_N, document_N)
    t = share / se_share
    half = stats.t.ppf(0.975, df) * se_share
    weights_C, unpaired = by_cluster(tokens_N, document_N), math.hypot(se_a, se_b)
    pairs = {
        "losses": ((found.a.value, found.b.value), (loss_a, loss_b)),
        "their errors": ((found.a.se, found.b.se), (se_a, se_b)),
        "difference": ((found.value, found.se), (nats, se_nats)),
        "percent": ((found.percent, found.se_percent), (100 * share, 100 * se_share)),
        "t and p": ((found.t, found.p), (t, 2 * stats.t.sf(abs(t), df))),
        "interval": (found.ci95_percent, (100 * (share - half), 100 * (share + half))),
        "unpaired": ((found.t_unpaired, found.pairing_gain), (nats / unpaired, unpaired / se_nats)),
        "worth": ((found.effective_clusters,), (weights_C.sum() ** 2 / (weights_C**2).sum(),)),
    }  # fmt: skip
    for name, (ours, theirs) in pairs.items():
        assert ours == pytest.approx(theirs, rel=CLOSE), name
    lower_N = np.where(b_N == a_N, 0.5, b_N < a_N)
    assert found.win_rate == pytest.approx(lower_N.mean(), rel=CLOSE)


@pytest.mark.parametrize(("kind", "sizes", "seed"), [case for case in TABLES if case[1] == "few"])
def test_flips_of_few_documents_are_all_flips_there_are(kind: str, sizes: str, seed: int) -> None:
    a_N, b_N, _, document_N = a_pair(kind, sizes, seed)
    y_C, m_C = by_cluster(b_N - a_N, document_N), by_cluster(a_N, document_N)
    signs_FC = np.array(list(itertools.product((1.0, -1.0), repeat=len(y_C))))
    flipped_F = np.abs(signs_FC @ y_C)
    # A tie, up to rounding, counts as one that is as large.
    p = float(np.mean(flipped_F >= abs(y_C.sum()) * (1 - 1e-12)))
    found = sign_flip(y_C, m_C)
    assert found.p == pytest.approx(p, rel=CLOSE)


def test_a_verdict_through_tables_is_that_of_the_numbers() -> None:
    for kind, sizes, seed in TABLES:
        if sizes == "few":
            continue
        a_N, b_N, tokens_N, document_N = a_pair(kind, sizes, seed)
        meta = {"reference": "r", "reference_text": "t", "objective": "causal", "dtype": "fp32"}
        counts_N = tokens_N.astype(np.int32)
        a, b = (LossTable(np.arange(len(x)), document_N, counts_N, counts_N, x, meta=meta) for x in (a_N, b_N))
        told = compare_tables(a, b)
        share, se = by_statsmodels(b_N - a_N, a_N, document_N)
        assert (told.difference.percent, told.difference.se_percent) == pytest.approx(
            (100 * share, 100 * se), rel=CLOSE
        )


def test_many_comparisons_are_those_of_statsmodels() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 2, 10, 45):
        p_K = rng.beta(0.3, 2, count)
        assert holm(p_K) == pytest.approx(multipletests(p_K, method="holm")[1], rel=CLOSE)
        assert benjamini_hochberg(p_K) == pytest.approx(multipletests(p_K, method="fdr_bh")[1], rel=CLOSE)


def test_quantiles_and_halls_transformation() -> None:
    for df in (1, 5, 136, 20_000):
        assert t_quantile(0.95, df) == pytest.approx(stats.t.ppf(0.975, df), rel=CLOSE)
        for t in (0.1, -2.0, 9.0):
            assert two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=CLOSE)
    rng = np.random.default_rng(2)
    for _ in range(30):
        x_C = rng.lognormal(0, 1.2, 90) - 2.0
        t = x_C.mean() / (x_C.std(ddof=1) / math.sqrt(90))
        skew = stats.skew(x_C) / math.sqrt(90)
        # Hall 1992, (2.3) on (mean/sd) and the skewness γ: u + γu²/3 + γ²u³/27 + γ/(6n), times √n.
        u, gamma = t / math.sqrt(90), stats.skew(x_C)
        by_hand = math.sqrt(90) * (u + gamma * u**2 / 3 + gamma**2 * u**3 / 27 + gamma / (6 * 90))
        assert transformed(t, skew) == pytest.approx(by_hand, rel=CLOSE)
        assert float(untransformed(by_hand, skew)) == pytest.approx(t, rel=CLOSE)


def test_the_mean_of_a_series_is_that_of_ols_on_a_constant_with_cosines_for_its_error() -> None:
    """The projections are coefficients of ordinary least squares on a constant and the cosines, times √T."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        steps = int(rng.integers(64, 500))
        x_T = rng.normal(0.01, 1, steps) + np.cumsum(rng.normal(0, 0.02, steps))
        place_T = (np.arange(steps) + 0.5) / steps
        design = np.column_stack([np.ones(steps), *(math.sqrt(2) * np.cos(np.pi * j * place_T) for j in range(1, 9))])
        fit = sm.OLS(x_T, design).fit()
        assert cosine_squares(x_T, 8) == pytest.approx(steps * fit.params[1:] ** 2, rel=1e-7)
        found = long_run_mean(x_T, np.ones(steps))
        if not found.wanders:
            t = fit.params[0] / math.sqrt(np.mean(fit.params[1:] ** 2))
            assert (found.value, found.t) == pytest.approx((fit.params[0], t), rel=CLOSE)
            assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 8), rel=CLOSE)


def test_what_a_change_needs_is_the_power_of_a_z_test() -> None:
    for se, wanted in ((0.01, 0.005), (0.2, 0.05)):
        found = power_for(wanted, se, 10 * se, documents=137, samples=475, tokens=50_000)
        z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
        assert found.documents_needed == math.ceil((z * se * math.sqrt(137) / wanted) ** 2)
        power = stats.norm.sf(stats.norm.ppf(0.975) - wanted / (se * math.sqrt(137 / found.documents_needed)))
        assert power == pytest.approx(0.8, abs=0.005)
