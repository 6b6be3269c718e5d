"""Scoring until a verdict stops early where the difference is large, and leaves a prefix of the table to go on from."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import vernier

from configs.errors import DataError
from eval.reference.set import ReferenceSet
from eval.scoring.early_stop import UntilVerdict
from eval.tables import LossTable, read_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with a reference set of several blocks: the standard library's documents."""
    directory = tmp_path_factory.mktemp("blocks") / "data"
    settings = ["data.source=python-stdlib", "data.max_bytes=8000000", "reference.documents=240", "seed=5"]
    settings += ["reference.block_samples=128", "reference.max_windows=4", "reference.max_fraction=0.5"]
    vernier("prepare", "tests/tiny.yaml", f"data.dir={directory}", *settings)
    return directory


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("blocks") / "run"
    settings = ["seed=5", "reference.block_samples=128", "steps=12", "snapshot.every=6", "eval.placement=none"]
    vernier("train", "tests/tiny.yaml", f"data.dir={data}", f"run.dir={run}", *settings)
    return run


def test_a_clear_difference_is_settled_early_and_can_be_completed(run: Path, data: Path, tmp_path: Path) -> None:
    first, last = (run / "snapshots" / f"step-{step:08d}" for step in (0, 12))
    reference = ["--reference", data / "reference", "--out", tmp_path]
    vernier("eval", first, *reference)
    against = tmp_path / "step-00000000@causal.fp32.parquet"
    options = [*reference, "--until-verdict", "--against", against]
    done = vernier("eval", last, *options, "--nproc", 2)
    part = tmp_path / "step-00000012@causal.fp32.partial.parquet"
    assert f"step-00000012 is better than {against}: the change lies between −" in done.stdout
    assert len(read_table(part)) < len(read_table(against))
    assert read_table(part).meta["until_verdict"]["verdict"] == "better"
    again = vernier("eval", last, *options, "--json")
    assert "already" in again.stderr  # costs nothing
    assert json.loads(again.stdout)[0]["until_verdict"]["verdict"] == "better"
    # Another A is another question: what was said of the first is not said again.
    other = vernier("eval", last, *reference, "--until-verdict", "--against", f"{run}@12", code=2)
    assert "nothing has been scored yet" in other.stderr
    # A part is not compared with a whole.
    refused = vernier("compare", against, part, code=2)
    assert "complete the shorter with: vernier eval" in refused.stderr
    assert refused.stderr.count("\n") == 1
    # A plain scoring completes it to the same bits as one made in one go.
    vernier("eval", last, *reference)
    assert not part.exists()
    vernier("eval", last, "--reference", data / "reference", "--out", tmp_path / "anew")
    whole = "step-00000012@causal.fp32.parquet"
    # A whole table answers without any scoring, also about itself.
    itself = vernier("eval", last, *reference, "--until-verdict", "--against", tmp_path / whole)
    assert "are not told apart" in itself.stdout
    assert (tmp_path / whole).read_bytes() == (tmp_path / "anew" / whole).read_bytes()


def test_what_cannot_be_is_said_in_a_line(run: Path, data: Path, tiny_data: Path, tmp_path: Path) -> None:
    model = run / "snapshots" / "step-00000000"
    reference = ["--reference", data / "reference", "--out", tmp_path]
    vernier("eval", model, *reference)
    table = tmp_path / "step-00000000@causal.fp32.parquet"
    for options, said in (
        (["--until-verdict"], "go together"),
        (["--against", table], "go together"),
        (["--margin", "1%"], "--margin"),
        (["--until-verdict", "--against", table, "--force"], "--force"),
        (["--until-verdict", "--against", table, "--margin", "x"], "--margin: 'x'"),
        (["--until-verdict", "--against", tmp_path / "none.parquet"], "no such loss table"),
    ):
        done = vernier("eval", model, *reference, *options, code=2)
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def _reference(documents: int, samples_each: int, block: int) -> ReferenceSet:
    samples = documents * samples_each
    document = np.repeat(np.arange(documents), samples_each)
    blank = np.ones(samples, np.int32)
    return ReferenceSet(
        directory=Path("reference"),
        name="r",
        text_fingerprint="t",
        tokens_fingerprint="f",
        tokenizer_fingerprint="k",
        vocab_size=10,
        sequence_length=8,
        documents=documents,
        batch_count=1,
        sample=np.arange(samples),
        document=document,
        block=(np.arange(samples) // block).astype(np.int32),
        batch=0 * blank,
        labels_from=blank,
        tokens=8 * blank,
        bytes=8 * blank,
        input_ids=blank,
        offsets=np.arange(samples + 1),
    )


def _table(loss: np.ndarray, reference: ReferenceSet) -> LossTable:
    columns = {name: getattr(reference, name) for name in ("sample", "document", "tokens", "bytes")}
    return LossTable(**columns, loss=loss, meta={"reference": "f", "label": "A"})


def _samples_until(change: float, spread: float, *, margin: float = 0.0, seed: int = 0) -> tuple[int, str]:
    """(samples scored, verdict) where B's losses are A's times 1 + change, ± spread."""
    reference = _reference(10240, 2, 256)
    rng = np.random.default_rng(seed)
    loss = 8 * rng.normal(2.17, 0.39, len(reference.sample))
    look = UntilVerdict(reference, _table(loss, reference), margin)
    other = loss * (1 + change) + 8 * 2.17 * rng.normal(0, spread, len(loss))
    for stop in range(256, len(loss) + 1, 256):
        if look(stop, other[:stop]):
            return stop, look.looks[-1].verdict
    return len(loss), look.looks[-1].verdict


def test_the_source_articles_spread_settles_a_tenth_of_a_percent_at_the_first_look() -> None:
    found = [_samples_until(-0.001, 0.0014, seed=seed) for seed in range(20)]
    assert {verdict for _, verdict in found} == {"better"}
    assert np.mean([samples for samples, _ in found]) <= 300


def test_a_hundredth_of_a_percent_takes_longer_and_equality_ends_by_the_margin() -> None:
    found = [_samples_until(0.0001, 0.0014, seed=seed) for seed in range(20)]
    assert [verdict for _, verdict in found].count("worse") >= 19
    assert 500 <= np.mean([samples for samples, _ in found]) <= 2300
    samples, verdict = _samples_until(0.0, 0.0014, margin=0.05)
    assert verdict == "no difference as large as the margin"
    assert samples < 2000


def test_a_small_reference_set_is_refused_before_anything_is_scored() -> None:
    reference = _reference(30, 20, 300)
    with pytest.raises(DataError, match="a look needs at least 100 documents and 256 samples"):
        UntilVerdict(reference, _table(np.ones(600), reference))
