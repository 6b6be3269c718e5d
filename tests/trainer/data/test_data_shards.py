"""Windows of the stream, across shard borders and with masks."""

from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from trainer.data.shards import FOLDER, Windows, write_shards

EOS = 9


def documents(seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(10, 60_000, n).astype(np.uint32) for n in [5, 1, 40, 17, 3, 60]]


@pytest.mark.parametrize("shard_tokens", [7, 50, 10_000])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_are_cut_from_the_whole_stream(tmp_path: Path, shard_tokens: int, masked: bool) -> None:
    draw = np.random.default_rng(1)
    masks = [draw.random(len(d)) < 0.5 for d in documents()] if masked else None
    facts = write_shards(tmp_path / FOLDER, documents(), EOS, 65_536, masks, shard_tokens)
    stream = np.concatenate([np.append(d, EOS) for d in documents()])
    assert (facts["tokens"], facts["documents"], facts["shards"]) == (132, 6, -(-132 // shard_tokens))
    first = np.load(tmp_path / FOLDER / "train-00000.npy")
    assert first.dtype == np.uint16
    assert len(first) == min(132, shard_tokens)
    starts = [np.load(p) for p in sorted((tmp_path / FOLDER).glob("*.documents.npy"))]
    assert np.concatenate(starts).tolist() == [0, 6, 8, 49, 67, 71]

    data = Windows(tmp_path, 10)
    assert len(data) == 13
    indices = np.array([12, 0, 5, 5])
    ids, scored = data.rows(indices)
    assert ids.dtype == np.int64
    assert ids.tolist() == [stream[w * 10 : w * 10 + 11].tolist() for w in indices]
    if masks is None:
        assert scored is None
        assert data.target_counts(indices).tolist() == [10] * 4
    else:
        flat = np.concatenate([np.append(m, m[-1]) for m in masks])
        assert scored is not None
        assert scored.tolist() == [flat[w * 10 + 1 : w * 10 + 11].tolist() for w in indices]
        assert data.target_counts(indices).tolist() == scored.sum(1).tolist()
        assert facts["scored_tokens"] == flat.sum()


def test_fingerprint_does_not_hang_on_the_cut_but_on_content_and_masks(tmp_path: Path) -> None:
    def sha256(name: str, *args: object) -> str:
        return str(write_shards(tmp_path / name, documents(), EOS, *args)["sha256"])

    masks = [np.arange(len(d)) > 0 for d in documents()]
    assert sha256("a", 65_536) == sha256("b", 65_536, None, 7)
    assert len({sha256("a", 65_536), sha256("c", 65_537), sha256("d", 65_536, masks)}) == 3


def test_missing_shards_and_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vernier prepare"):
        Windows(tmp_path, 10)
    write_shards(tmp_path / FOLDER, documents(), EOS, 65_536, shard_tokens=50)
    with pytest.raises(IndexError):
        Windows(tmp_path, 10).rows(np.array([13]))
    assert len(Windows(tmp_path, 132)) == 0
    (tmp_path / FOLDER / "train-00001.npy").unlink()
    with pytest.raises(DataError, match="a shard is missing"):
        Windows(tmp_path, 10)
