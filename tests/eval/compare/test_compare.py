"""Comparisons of tables and along runs: pairing rules, verdicts, the JSON that others build on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import DataError
from eval.compare.gate import gate_holds
from eval.compare.pair import compare_tables
from eval.compare.provenance import Provenance
from eval.compare.targets import find_tables, parse_target
from eval.statistics import by_cluster, paired_difference, sign_flip
from eval.tables import LossTable, read_table, write_table

REFERENCE = "0123abcd" + "0" * 56
SIDE = {"name", "loss", "se", "samples", "documents", "tokens"}
DIFFERENCE = {
    *("nats", "percent", "se_percent", "ci95_percent", "p", "p_adjusted", "alpha", "win_rate"),
    *("detectable_percent", "pairing_gain", "t", "t_unpaired", "method", "clusters"),
}
TOP = {"a", "b", "difference", "verdict", "limited_by", "wobble_percent", "twins"}
ADDED = {"unit", "paired_by", "reference", "cautions", "question", "origin"}


def resolve_pair(first: str, second: str):
    """The two tables that are meant, and what they are called."""
    a, b = find_tables([first, second])
    return read_table(a.path), read_table(b.path), (a.name, b.name)


def resolve_target(text: str):
    return resolve_pair(text, text)[0]


def a_table(
    change: float = 0.0, noise: float = 0.0005, *, seed: int = 0, documents: int = 100, **meta: Any
) -> LossTable:
    """Losses of 3 samples a document; `change` (relative) and `noise` are its own, the rest is shared."""
    rng = np.random.default_rng(99)
    tokens = rng.integers(32, 129, 3 * documents).astype(np.int32)
    base = tokens * rng.normal(2.2, 0.3, 3 * documents)
    own = np.random.default_rng(seed).normal(change, noise, 3 * documents) if noise else change
    return LossTable(
        sample=np.arange(3 * documents),
        document=np.repeat(np.arange(documents), 3),
        tokens=tokens,
        bytes=(4 * tokens).astype(np.int32),
        loss=base * (1 + own),
        meta={
            "reference": REFERENCE,
            "reference_text": "text",
            "objective": "causal",
            "dtype": "fp32",
            **meta,
        },
    )


def write_run(run: Path, steps: dict[int, LossTable], folder: str = "py-0123abcd", dtype: str = "fp32") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    for step, table in steps.items():
        table = replace(table, meta={**table.meta, "label": f"step-{step:08d}", "dtype": dtype})
        write_table(run / "losses" / folder / f"step-{step:08d}@causal.{dtype}.parquet", table)
    return run


def test_a_lower_loss_is_better_and_a_higher_one_worse() -> None:
    a, b = a_table(seed=1), a_table(-0.001, seed=2)
    better = compare_tables(a, b)
    assert better.verdict == "better"
    assert better.difference.value < 0
    assert better.to_json()["limited_by"] == "unknown"  # no run is known, so neither its wobble nor its seeds
    worse = compare_tables(b, a)
    assert worse.verdict == "worse"
    assert worse.difference.percent == pytest.approx(-better.difference.percent, rel=0.01)


def test_too_small_a_change_is_not_seen_and_samples_are_what_limits() -> None:
    found = compare_tables(a_table(seed=1), a_table(seed=2))
    assert found.verdict == "no difference seen"
    assert found.to_json()["limited_by"] == "samples"
    assert found.detectable_percent == pytest.approx(
        (1.98422 + 0.84548) * found.difference.se_percent, rel=1e-4
    )  # t, 99


def test_the_same_table_twice_is_identical() -> None:
    content = compare_tables(a_table(), a_table()).to_json()
    assert content["verdict"] == "identical"
    assert content["limited_by"] is None
    assert content["difference"]["p"] == content["difference"]["p_adjusted"] == 1
    assert content["difference"]["pairing_gain"] is None
    assert content["difference"]["ci95_percent"] == [0, 0]


def test_json_has_the_keys_of_the_design() -> None:
    content = compare_tables(a_table(seed=1), a_table(-0.001, seed=2, label="mine")).to_json()
    assert set(content) == TOP | ADDED
    assert set(content["a"]) == set(content["b"]) == SIDE
    assert set(content["difference"]) == DIFFERENCE
    assert content["b"]["name"] == "mine"
    assert content["a"]["documents"] == 100
    assert content["a"]["samples"] == 300
    assert content["a"]["tokens"] == a_table().tokens.sum()
    difference = content["difference"]
    assert difference["p_adjusted"] == difference["p"]
    assert difference["alpha"] == 0.05
    assert content["b"]["loss"] - content["a"]["loss"] == pytest.approx(difference["nats"], rel=1e-9)
    assert difference["percent"] == pytest.approx(100 * difference["nats"] / content["a"]["loss"], rel=1e-12)
    json.dumps(content, allow_nan=False)


def test_a_change_without_spread_still_makes_json_without_infinity() -> None:
    a = a_table(noise=0, documents=50)
    a = replace(a, loss=np.full(150, 2.0), tokens=np.ones(150, np.int32))
    content = compare_tables(a, replace(a, loss=np.full(150, 1.0))).to_json()
    assert content["verdict"] == "better"
    assert content["difference"]["t"] is None
    json.dumps(content, allow_nan=False)


def test_two_tokenizers_are_compared_in_bits_per_byte_by_document() -> None:
    a, other = a_table(seed=1), a_table(-0.01, seed=2)
    merged = LossTable(  # one sample a document, other tokens, the same bytes
        sample=np.arange(100),
        document=np.arange(100),
        tokens=np.full(100, 150, np.int32),
        bytes=other.bytes.reshape(100, 3).sum(1).astype(np.int32),
        loss=other.loss.reshape(100, 3).sum(1),
        meta={**other.meta, "reference": "f" * 64},
    )
    content = compare_tables(a, merged).to_json()
    assert content["unit"] == "bits per byte"
    assert content["paired_by"] == "document"
    assert content["reference"] == "text"
    assert content["a"]["loss"] == pytest.approx(a.loss.sum() / math.log(2) / a.bytes.sum(), rel=1e-12)
    assert content["a"]["samples"] == 300
    assert content["b"]["samples"] == 100
    assert content["verdict"] == "better"
    assert content["difference"]["nats"] is None
    assert set(content["difference"]) == DIFFERENCE | {"bits_per_byte"}
    assert any("bits per byte" in caution for caution in content["cautions"])

    longer = replace(merged, bytes=merged.bytes + np.eye(100, dtype=np.int32)[17])
    with pytest.raises(DataError, match="document 17 has"):
        compare_tables(a, longer)
    with pytest.raises(DataError, match="not the same ones"):
        compare_tables(a, replace(merged, document=np.arange(1, 101)))


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"reference": "other", "reference_text": "other"}, "different reference sets"),
        ({"reference": None, "reference_text": None}, "different reference sets"),
        ({"objective": "masked"}, r"objectives differ \(causal and masked\)"),
    ],
)
def test_what_cannot_be_paired_is_refused(meta: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        compare_tables(a_table(), a_table(**meta))


def test_tables_that_say_they_are_of_one_set_and_are_not_are_refused() -> None:
    a = a_table()
    with pytest.raises(DataError, match="300 samples in one table, 270 in the other"):
        compare_tables(a, a_table(documents=90))
    with pytest.raises(DataError, match="column tokens differs from sample 4"):
        compare_tables(a, replace(a, tokens=a.tokens + (np.arange(300) == 4).astype(np.int32)))
    with pytest.raises(DataError, match="at least 2 documents"):
        compare_tables(*[replace(a, document=np.zeros(300, np.int64))] * 2)


def test_cautions() -> None:
    def cautions(a: LossTable, b: LossTable) -> str:
        return "; ".join(compare_tables(a, b).cautions)

    assert cautions(a_table(), a_table(seed=1)) == ""
    assert "unequal dtype" in cautions(a_table(source="x"), a_table(dtype="bf16", source="y"))
    assert "same weights" not in cautions(a_table(source="x"), a_table(dtype="bf16", source="y"))
    assert "the same weights scored twice" in cautions(a_table(source="x"), a_table(dtype="bf16", source="x"))
    assert "39 documents" in cautions(a_table(documents=39), a_table(documents=39, seed=1))
    assert "hardware" in cautions(a_table(hardware="cpu"), a_table(hardware="H100"))
    a = a_table()
    whole = np.where(np.arange(300) < 3, 100_000, a.tokens).astype(np.int32)  # one document is nearly everything
    assert "worth 1.2 of equal size" in cautions(replace(a, tokens=whole), replace(a, tokens=whole))


def test_few_documents_are_judged_by_flipping_signs() -> None:
    a, b = a_table(documents=20, seed=1), a_table(-0.0004, documents=20, seed=2)
    found = compare_tables(a, b)
    by_t = paired_difference(a.loss, b.loss, a.tokens, a.document)
    assert (found.difference.method, by_t.method) == ("sign flips", "t")
    flipped = sign_flip(by_cluster(b.loss - a.loss, a.document), by_cluster(a.loss, a.document))
    assert found.difference.p == flipped.p
    assert found.difference.ci95_percent == pytest.approx([100 * bound for bound in flipped.interval])
    assert found.difference.percent == pytest.approx(100 * flipped.value, rel=1e-12)
    assert (found.difference.se, found.difference.t) == (by_t.se, by_t.t)
    assert found.to_json()["difference"]["method"] == "sign flips"
    assert (
        "20 documents, worth 19.1 of equal size: below 40 the p-value and interval are by flipping signs"
        in (found.cautions[0])
    )
    assert gate_holds(found, "not-worse", flipped.interval[1] * 100 + 1e-6)
    assert not gate_holds(found, "not-worse", flipped.interval[1] * 100 - 1e-6)
    assert compare_tables(a_table(documents=60), a_table(documents=60, seed=1)).difference.method == "t"


def test_five_documents_can_show_nothing_and_their_bounds_are_infinite() -> None:
    found = compare_tables(a_table(documents=5, seed=1), a_table(-0.1, documents=5, seed=2))
    assert found.verdict == "no difference seen"
    content = found.to_json()
    assert content["difference"]["ci95_percent"] == [None, None]
    assert content["difference"]["p"] == pytest.approx(2 / 32)
    assert "with 5 documents no change, however large, can be significant at 5 %" in content["cautions"]
    assert not gate_holds(found, "not-worse", 50)
    json.dumps(content, allow_nan=False)
    assert compare_tables(*[a_table(documents=5)] * 2).to_json()["difference"]["ci95_percent"] == [0, 0]


def test_late_looks_draw_as_many_flips_as_they_need_to_be_clear() -> None:
    a, b = a_table(documents=30, seed=1), a_table(-0.1, documents=30, seed=2)
    assert compare_tables(a, b).difference.p == pytest.approx(1e-4)
    assert compare_tables(a, b, looks=30).verdict == "better"


def test_one_great_document_among_many_small_ones_is_flipped_in_bundles() -> None:
    a = a_table(documents=400, seed=1)
    weights = np.where(np.arange(1200) < 3, 30_000, a.tokens).astype(np.int32)
    a = replace(a, tokens=weights, loss=2.0 * weights)
    b = replace(a, loss=a.loss * (1 - 0.01 * np.random.default_rng(0).uniform(0.5, 1.5, 1200)))
    found = compare_tables(a, b)
    assert (found.difference.method, found.verdict) == ("sign flips", "better")
    low, high = found.difference.ci95_percent
    assert low < found.difference.percent < high < 0


def test_power_says_how_many_documents_a_change_needs() -> None:
    found = compare_tables(a_table(seed=1), a_table(seed=2))
    power = found.power(0.001)
    assert power is not None
    se = found.difference.se_percent
    assert power.documents_needed == math.ceil((2.801585 * se * 10 / 0.001) ** 2)
    assert power.samples_needed == 3 * power.documents_needed
    assert power.documents_needed_unpaired > 100 * power.documents_needed
    assert power.detectable_percent == found.detectable_percent
    assert set(power.to_json()) == {
        *("wanted_percent", "documents_needed", "samples_needed", "documents", "samples"),
        *("detectable_percent", "documents_needed_unpaired"),
    }
    again = found.power(power.detectable_percent)
    assert again is not None
    assert again.documents_needed in (99, 100, 101)
    assert compare_tables(a_table(), a_table()).power(0.001) is None


def test_what_limits_a_verdict() -> None:
    clear = compare_tables(a_table(seed=1), a_table(-0.001, seed=2))  # −0.1 %
    for wobble, one_step, limit in (
        (None, False, "unknown"),
        (0.01, False, None),
        (0.1, False, "training noise"),
        (0.1, True, None),
    ):
        found = replace(clear, wobble_percent=wobble, one_step=one_step)
        assert (found.verdict, found.to_json()["limited_by"]) == ("better", limit)
        assert found.to_json()["wobble_percent"] == wobble
    apart = replace(clear, wobble_percent=0.01, origin=Provenance("two runs", ("optimizer.lr: 1 → 2",)))
    assert apart.limited_by == "seeds unknown"
    same = compare_tables(a_table(seed=1), a_table(seed=2))
    error = same.difference.se_percent
    assert replace(same, wobble_percent=error / 2).limited_by == "samples"
    assert replace(same, wobble_percent=error).limited_by == "training noise"
    assert replace(compare_tables(a_table(), a_table()), wobble_percent=1.0).limited_by is None


def test_parts_of_a_set_are_compared_only_with_the_same_part() -> None:
    def part(samples: int, blocks: int, **meta: Any) -> LossTable:
        whole = a_table(**meta)
        columns = {c: getattr(whole, c)[:samples] for c in ("sample", "document", "tokens", "bytes", "loss")}
        partial = {"blocks": blocks, "of": 5, "samples": samples}
        return replace(whole, **columns, meta={**whole.meta, "partial": partial})

    found = compare_tables(part(180, 3, seed=1), part(180, 3, seed=2))
    assert found.a.samples == 180
    assert "partial: only the first 3 of 5 blocks of the reference set (180 samples)" in found.cautions[0]
    stopped = compare_tables(part(180, 3, seed=1), part(180, 3, seed=2, until_verdict={"looks": 2}))
    assert "stopped early: the estimate is inflated, read the interval of the stop" in stopped.cautions
    for a, b in ((part(180, 3), part(240, 4)), (part(180, 3), a_table()), (a_table(), part(240, 4))):
        with pytest.raises(DataError, match=r"other parts of the reference set .*vernier eval MODEL") as caught:
            compare_tables(a, b)
        assert "\n" not in str(caught.value)


def test_gates_ask_for_the_upper_bound() -> None:
    found = compare_tables(a_table(seed=1), a_table(-0.001, seed=2))
    upper = found.difference.ci95_percent[1]
    assert upper < 0
    assert gate_holds(found, "better")
    assert gate_holds(found, "better", -upper * 0.99)
    assert not gate_holds(found, "better", -upper * 1.01)
    assert gate_holds(found, "not-worse")
    same = compare_tables(a_table(seed=1), a_table(seed=3))
    upper = same.difference.ci95_percent[1]
    assert not gate_holds(same, "better")
    assert gate_holds(same, "not-worse", upper * 1.01)
    assert not gate_holds(same, "not-worse", upper * 0.99)
    identical = compare_tables(a_table(), a_table())
    assert gate_holds(identical, "not-worse")
    assert not gate_holds(identical, "better")


def test_targets_mean_the_tables_a_person_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = a_table(-0.01, seed=1), a_table(-0.02, seed=2)
    write_run(tmp_path / "runs" / "x", {0: a_table(), 10: one, 20: two})
    write_run(tmp_path / "runs" / "y", {0: a_table(), 10: two})

    assert np.array_equal(resolve_target("runs/x").loss, two.loss)
    assert np.array_equal(resolve_target("x").loss, two.loss)
    assert np.array_equal(resolve_target("runs/x@10").loss, one.loss)
    assert np.array_equal(resolve_target("x@step-00000010").loss, one.loss)
    assert np.array_equal(resolve_target("runs/x/snapshots/step-00000010").loss, one.loss)
    table = "runs/x/losses/py-0123abcd/step-00000010@causal.fp32.parquet"
    assert np.array_equal(resolve_target(table).loss, one.loss)

    a, b, names = resolve_pair("x", "y")  # 10 is the last step scored in both
    assert np.array_equal(a.loss, one.loss)
    assert np.array_equal(b.loss, two.loss)
    assert names == ("x@10", "y@10")
    assert resolve_pair("x@10", "x@20")[2] == ("step-00000010", "step-00000020")
    assert np.array_equal(resolve_pair("x", "y@10")[0].loss, two.loss)
    assert resolve_pair(table, "x@10")[2] == ("step-00000010", "step-00000010")


def test_targets_that_mean_nothing_are_refused_with_what_there_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", {0: a_table(), 10: a_table(seed=1)})
    other = write_run(tmp_path / "y", {5: a_table()})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(DataError, match=r"step 7 of .* is not scored; scored steps: 0, 10"):
        resolve_target(f"{run}@7")
    with pytest.raises(DataError, match="'last' is not a step, or last3, say; scored steps: 0, 10"):
        resolve_target(f"{run}@last")
    with pytest.raises(DataError, match=r"no step is scored in both.*0, 10.*5"):
        resolve_pair(str(run), str(other))
    with pytest.raises(DataError, match="vernier eval"):
        parse_target(str(tmp_path / "model"))
    with pytest.raises(DataError, match="no such loss table"):
        parse_target(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no such loss table"):
        resolve_target(str(tmp_path / "nothing.parquet"))


def test_of_several_ways_of_scoring_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    x = write_run(tmp_path / "x", {0: a_table(), 10: a_table(seed=1)})
    write_run(x, {10: a_table(seed=2)}, dtype="bf16")
    y = write_run(tmp_path / "y", {10: a_table(seed=3)}, dtype="bf16")
    a, b, _ = resolve_pair(f"{x}@10", f"{y}@10")
    assert (a.meta["dtype"], b.meta["dtype"]) == ("bf16", "bf16")
    a, b, _ = resolve_pair(str(x), str(next(y.glob("losses/*/*"))))
    assert a.meta["dtype"] == "bf16"


def test_few_documents_say_that_late_looks_and_many_pairs_can_show_nothing() -> None:
    a, b = a_table(documents=8, seed=1), a_table(-0.1, documents=8, seed=2)
    assert compare_tables(a, b).difference.smallest_p == 2 / 2**8
    assert compare_tables(a, b).verdict == "better"
    late = compare_tables(a, b, looks=7)
    assert (late.verdict, late.limited_by) == ("no difference seen", "samples")  # 2/256·7 = 0.055
    said = "with 8 documents no change, however large, can be significant among 7 comparisons along a run"
    assert said in late.cautions
    assert late.to_json()["difference"]["detectable_percent"] is None
    assert replace(late, wobble_percent=1e3).limited_by == "samples"
    power = late.power(0.5)
    assert power is not None
    assert power.to_json()["detectable_percent"] is None
    shared = compare_tables(a, b, pairs=7)
    assert "with 8 documents no change, however large, can be significant among 7 pairs" in shared.cautions
    assert compare_tables(a, b, pairs=6).can_show
    assert not any("however large" in caution for caution in compare_tables(a, b).cautions)


def test_never_fewer_documents_are_asked_for_than_the_reckoning_holds_for() -> None:
    power = compare_tables(a_table(seed=1), a_table(seed=2)).power(50)
    assert power is not None
    assert 40 <= power.documents_needed == power.least_documents < 50  # 100 documents, worth a few fewer
