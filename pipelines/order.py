"""The order of a training stream, as pure functions of (shard sizes, seed, epoch).

A stream is an endless sequence of epochs; what is left of one joins the head of the next in the same batch.
Its whole state is one integer, the number of samples taken by all ranks together, so it resumes on any number
of ranks. Nothing here reads data: a sample is its index in the concatenation of all shards.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Int64 = np.ndarray[Any, np.dtype[np.int64]]

# Chosen by us: samples mix within 8 shards at a time, so that reads stay within about 2 GB (8 x `shard_mb`),
# which the page cache of one machine holds.
WINDOW_SHARDS = 8


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW_SHARDS) -> Int64:
    """The order of an epoch: the shards are permuted, then the samples within windows of `window` shards.

    shard_sizes    samples of each shard
    returns        int64[N], a permutation of 0..N-1 where N = sum(shard_sizes)
    Raises `ValueError` where a size or the window is impossible.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    if window < 1 or (sizes < 0).any():
        raise ValueError(
            f"window {window} must be positive and shard sizes not negative, least is {sizes.min()}"
        )
    return _epoch_order(tuple(sizes.tolist()), seed, epoch, window).copy()


def positions(
    shard_sizes: Sequence[int], seed: int, start: int, count: int, window: int = WINDOW_SHARDS
) -> tuple[Int64, Int64]:
    """Which samples stand at `start` .. `start + count - 1` of the endless sequence of epochs.

    returns    (epoch int64[count], index int64[count]), index as in `epoch_order`
    Raises `ValueError` where there are no samples or the range is negative.
    """
    sizes = tuple(int(n) for n in shard_sizes)
    total = sum(sizes)
    if total < 1 or start < 0 or count < 0:
        raise ValueError(f"no positions {start} .. {start + count} in a stream of {total} samples")
    places = np.arange(start, start + count, dtype=np.int64)
    epochs, within = np.divmod(places, total)
    index = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        index[here] = _epoch_order(sizes, seed, int(epoch), window)[within[here]]
    return epochs, index


def rank_slice(global_batch: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that one rank takes.

    Raises `ValueError` where the batch does not divide evenly or there is no such rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
    if global_batch < 1 or global_batch % world_size:
        raise ValueError(f"global batch {global_batch} cannot be divided by {world_size} ranks")
    share = global_batch // world_size
    return slice(rank * share, (rank + 1) * share)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of a sample's augmentation in an epoch, in [0, 2^63): equal on any rank, worker and resume."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=4)
def _epoch_order(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> Int64:
    # cached because every batch asks for the epoch it lies in, and the two at a boundary ask for both
    rng = np.random.default_rng((seed, epoch))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    shards = rng.permutation(len(sizes))
    windows = []
    for first in range(0, len(shards), window):
        chosen = shards[first : first + window]
        samples = np.concatenate([np.arange(starts[s], starts[s + 1], dtype=np.int64) for s in chosen])
        windows.append(rng.permutation(samples))
    order = np.concatenate(windows) if windows else np.empty(0, dtype=np.int64)
    order.setflags(write=False)
    return order
