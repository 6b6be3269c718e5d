"""The order of data and the gradient do not depend on how a batch is cut into ranks and micro-batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, losses, vernier

from configs.whole import MANIFEST, commit, partial_path, read_manifest
from trainer.order import mixed_seed, permute, share_of, window_seeds, windows_at


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100, 1000, 4097])
def test_the_order_of_an_epoch_visits_every_window_once(size: int) -> None:
    assert sorted(permute(np.arange(size), size, key=5)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = (windows_at(p, batch=1000, windows=1000, seed=1) for p in (0, 1))
    other = windows_at(0, batch=1000, windows=1000, seed=2)
    for a, b in ((first, second), (first, other)):
        assert sorted(a) == sorted(b)
        assert (a == b).mean() < 0.02
    # shuffled as well as numpy would: neighbours end up far apart
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


def test_a_batch_may_cross_the_end_of_an_epoch() -> None:
    seen = np.concatenate([windows_at(p, batch=7, windows=10, seed=3) for p in range(10)])
    for epoch in range(7):
        assert sorted(seen[epoch * 10 : epoch * 10 + 10]) == list(range(10))


@pytest.mark.parametrize(("world", "micro"), [(1, 32), (1, 8), (2, 16), (2, 4), (4, 8), (8, 1)])
def test_all_cuts_see_the_same_windows_at_every_position(world: int, micro: int) -> None:
    for position in (0, 1, 99):
        batch = windows_at(position, batch=32, windows=1000, seed=1)
        pieces = [p for rank in range(world) for p in share_of(batch, rank=rank, world=world, micro=micro)]
        assert np.array_equal(np.concatenate(pieces), batch)
        assert {len(piece) for piece in pieces} == {micro}


def test_seeds_of_neighbouring_positions_have_nothing_in_common() -> None:
    windows = np.arange(8)
    seeds = [window_seeds(1, position, windows) for position in range(100)]
    assert len({seed for row in seeds for seed in row}) == 800
    assert seeds[7] == [mixed_seed(1, 7, int(window)) for window in windows]


CUTS = {
    "one rank, 8 × 4": ["nproc=1", "batch.micro=8"],
    "two ranks, 16 × 1": ["nproc=2", "batch.micro=16"],
    "two ranks, 1 × 16": ["nproc=2", "batch.micro=1"],  # where out-of-memory leads, with masks too
}


@pytest.mark.parametrize("ragged", [False, True])
def test_both_cuts_of_a_batch_give_the_same_losses(ragged: bool, tiny_data: Path, tmp_path: Path) -> None:
    data = tiny_data
    if ragged:  # windows with many and with few targets: there a mean of means is another number
        data = tmp_path / "data"
        part = partial_path(data)
        shutil.copytree(tiny_data, part)
        tokens = len(np.load(part / "shards" / "train-00000.npy"))
        stretch = np.arange(tokens) // 200 % 2 == 0
        np.save(part / "shards" / "train-00000.scored.npy", stretch | (np.arange(tokens) % 7 == 0))
        manifest = read_manifest(part)
        (part / MANIFEST).unlink()
        commit(data, manifest)  # a mask that no manifest names would be refused
    curves = []
    for number, cut in enumerate(CUTS.values()):
        run = tmp_path / f"run-{number}"
        settings = [
            "batch.global=32",
            "steps=50",
            "eval.placement=none",
            "snapshot.every=50",
            "checkpoint.every=50",
        ]
        vernier("train", TINY, f"data.dir={data}", f"run.dir={run}", *settings, *cut)
        curves.append(np.array(losses(run)))
    assert len(curves[0]) == 50
    for curve in curves[1:]:
        assert np.max(np.abs(curves[0] / curve - 1)) < 1e-4
    if ragged:
        import json

        tokens_seen = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["tokens"]
        assert tokens_seen < 0.8 * 32 * 64
