"""The order of a training stream, as pure functions of (shard sizes, seed, epoch).

A stream is an endless sequence of epochs; what is left of one joins the head of the next in the same batch.
Its whole state is one integer, the number of samples taken by all ranks together, so it resumes on any number
of ranks. Nothing here reads data: a sample is its index in the concatenation of all shards. Nothing here
holds an epoch either, only the order of its shards and that of the samples in the window at hand, so a
million shards of a thousand samples cost a rank what their million sizes cost (benchmarks/scale.py).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Int64 = np.ndarray[Any, np.dtype[np.int64]]

# Chosen by us: samples mix within 8 shards at a time, so that reads stay within about 2 GB (8 x `shard_mb`),
# which the page cache of one machine holds. How well they mix: benchmarks/scale.py.
WINDOW_SHARDS = 8
# Positions in which a mixture of datasets keeps to its weights exactly; chosen by us.
BLOCK = 4096


class Order:
    """The endless sequence of samples that one dataset gives under one seed.

    In an epoch the shards are permuted, then the samples within windows of `window` shards.

    shard_sizes    samples of each shard, int[n]
    Raises `ValueError` where a size or the window is impossible.
    """

    def __init__(self, shard_sizes: Sequence[int] | Int64, seed: int, window: int = WINDOW_SHARDS) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        if window < 1 or (self.sizes < 0).any():
            raise ValueError(
                f"window {window} must be positive and shard sizes not negative, "
                f"least is {self.sizes.min(initial=0)}"
            )
        self.seed, self.window = seed, window
        self.total = int(self.sizes.sum())
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        # every batch asks for the window it lies in, and the one at a boundary for both
        self.shards = lru_cache(maxsize=2)(self._draw_shards)
        self._order = lru_cache(maxsize=4)(self._draw_order)

    def positions(self, start: int, count: int) -> tuple[Int64, Int64]:
        """Which samples stand at `start` .. `start + count - 1`: (epoch int64[count], index int64[count]).

        Raises `ValueError` where there are no samples or the range is negative.
        """
        if self.total < 1 or start < 0 or count < 0:
            raise ValueError(f"no positions {start} .. {start + count} in a stream of {self.total} samples")
        epochs, within = np.divmod(np.arange(start, start + count, dtype=np.int64), self.total)
        index = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch = int(epochs[done])
            _, ends = self.shards(epoch)
            number = int(np.searchsorted(ends, within[done], side="right"))
            order = self._order(epoch, number)
            first = int(within[done]) - (int(ends[number]) - len(order))
            taken = min(count - done, len(order) - first)
            index[done : done + taken] = order[first : first + taken]
            done += taken
        return epochs, index

    def _draw_shards(self, epoch: int) -> tuple[Int64, Int64]:
        """The shards of an epoch in order, and where each window of them ends."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        lasts = np.minimum(np.arange(self.window, len(shards) + self.window, self.window), len(shards)) - 1
        return shards, np.cumsum(self.sizes[shards])[lasts]

    def _draw_order(self, epoch: int, number: int) -> Int64:
        """The samples of one window in order."""
        chosen = self.shards(epoch)[0][number * self.window : (number + 1) * self.window]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in chosen])
        return self._generator(epoch, number).permutation(samples)

    def _generator(self, epoch: int, number: int) -> np.random.Generator:
        """One for each window, so that none needs those before it; the first goes on from the shards' own."""
        if number:
            return np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(number,)))
        rng = np.random.default_rng((self.seed, epoch))
        rng.permutation(len(self.sizes))
        return rng

    def __getstate__(self) -> tuple[Int64, int, int]:
        return self.sizes, self.seed, self.window

    def __setstate__(self, state: tuple[Int64, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class Mixture:
    """Several sequences in one: each goes on through its own epochs, and takes turns by weight.

    A pure function of (seed, position). In every block of `BLOCK` positions each sequence stands as often as
    its weight says, in an order drawn for the block; so each keeps its own exactly-once, and one position is
    still the whole state.

    weights    one for each order, in any unit, rounded to a `BLOCK`th of their sum
    Raises `ValueError` where a weight rounds to nothing.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) * (BLOCK / sum(weights))
        ends = np.rint(np.cumsum(shares)).astype(np.int64)
        self.quotas = np.diff(ends, prepend=0)
        if (self.quotas < 1).any():
            raise ValueError(f"weights {list(weights)}: the least must be 1/{BLOCK} of their sum or more")
        self.orders, self.seed = tuple(orders), seed
        self._turns = lru_cache(maxsize=4)(self._draw_turns)

    def positions(self, start: int, count: int) -> tuple[Int64, Int64, Int64]:
        """What stands at `start` .. `start + count - 1`: (number of the order, epoch, index), int64[count].

        Raises `ValueError` as `Order.positions` does.
        """
        if start < 0 or count < 0:
            raise ValueError(f"no positions {start} .. {start + count} in a stream")
        numbers, places = np.empty((2, count), dtype=np.int64)
        done = 0
        while done < count:
            block, first = divmod(start + done, BLOCK)
            taken = min(count - done, BLOCK - first)
            turns, nth = self._turns(block)
            numbers[done : done + taken] = turns[first : first + taken]
            places[done : done + taken] = nth[first : first + taken]
            done += taken
        epochs, index = np.empty((2, count), dtype=np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            # turns are taken one after the other, so these places have no gap
            epochs[here], index[here] = self.orders[number].positions(int(places[here][0]), int(here.sum()))
        return numbers, epochs, index

    def _draw_turns(self, block: int) -> tuple[Int64, Int64]:
        """Whose turn each position of a block is, and which place of that sequence it takes."""
        turns = np.repeat(np.arange(len(self.quotas)), self.quotas)
        turns = np.random.default_rng((self.seed, block)).permutation(turns)
        nth = np.empty(BLOCK, dtype=np.int64)
        for number, quota in enumerate(self.quotas):
            nth[turns == number] = block * quota + np.arange(quota)
        return turns, nth

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._turns = lru_cache(maxsize=4)(self._draw_turns)


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


def dataset_seed(seed: int, number: int) -> int:
    """The seed of one dataset of a mixture, so that two of equal sizes do not move in step."""
    return seed + (number << 32)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of a sample's augmentation in an epoch, in [0, 2^63): equal on any rank, worker and resume."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))
