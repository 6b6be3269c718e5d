"""The order of training data: a function of the data position alone, never of ranks, workers or restarts.

Windows are visited by a keyed permutation of each epoch, so any position is reached at once and nothing is stored.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
_ROUNDS = 6
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, §5): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers, such as (seed, position, window)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + np.uint64(part & int(_MASK)))
    return int(state[0] >> np.uint64(1))


def window_seeds(seed: int, position: int, windows: Int64s) -> list[int]:
    """`mixed_seed(seed, position, window)` of each window."""
    state = np.zeros(len(windows), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (np.uint64(seed), np.uint64(position), windows.astype(np.uint64)):
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + part)
    return [int(one) for one in state >> np.uint64(1)]


def draws(seeds: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint64]:
    """`count` random numbers from each seed [n], uint64 [n, count]: SplitMix64's outputs, started there."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(seeds[:, None] + steps)


def permute(index: Int64s, size: int, key: int) -> Int64s:
    """The places of `index` (int64 [n], each in 0..size-1) under a pseudo-random permutation of 0..size-1.

    A balanced Feistel network over the next even power of two, walked in cycles until it lands inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, §4): under 4 passes on average.
    """
    if size <= 1:
        return np.zeros_like(index)
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mixed_seed(key, r)) for r in range(_ROUNDS)]
    out = index.astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    with np.errstate(over="ignore"):
        while outside.any():
            x = out[outside]
            left, right = x >> half, x & low
            for round_key in keys:
                left, right = right, left ^ (_mix(right + round_key) & low)
            out[outside] = (left << half) | right
            outside = out >= np.uint64(size)
    return out.astype(np.int64)


def windows_at(position: int, *, batch: int, windows: int, seed: int) -> Int64s:
    """The windows of the global batch at a data position, int64 [batch]. Epochs follow each other without a gap."""
    place = np.arange(position * batch, (position + 1) * batch, dtype=np.int64)
    epoch, offset = place // windows, place % windows
    out = np.empty(batch, dtype=np.int64)
    for number in np.unique(epoch):  # two at most, unless a batch is larger than an epoch
        at = epoch == number
        out[at] = permute(offset[at], windows, mixed_seed(seed, int(number)))
    return out


def share_of(batch_windows: Int64s, *, rank: int, world: int, micro: int) -> list[Int64s]:
    """The windows of this rank's micro-batches of a global batch."""
    share = len(batch_windows) // world
    return [batch_windows[start : start + micro] for start in range(rank * share, (rank + 1) * share, micro)]
