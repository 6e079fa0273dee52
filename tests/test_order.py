"""Laws of the order: a permutation every epoch, a pure function, and one integer is its whole state."""

import numpy as np
import pytest

from pipelines.order import BLOCK, WINDOW_SHARDS, Mixture, Order, rank_slice, sample_seed

SIZES = (5, 1, 0, 7, 3, 9, 2)
TOTAL = sum(SIZES)


def epoch_order(seed: int, epoch: int, window: int = WINDOW_SHARDS) -> np.ndarray:
    return Order(SIZES, seed, window).positions(epoch * TOTAL, TOTAL)[1]


@pytest.mark.parametrize("window", [1, 2, 100])
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_an_epoch_visits_every_sample_once(window: int, epoch: int) -> None:
    order = epoch_order(seed=3, epoch=epoch, window=window)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(TOTAL))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    base = epoch_order(seed=1, epoch=2)
    assert (base == Order(list(SIZES), seed=1).positions(2 * TOTAL, TOTAL)[1]).all()
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        assert (base != epoch_order(seed=seed, epoch=epoch)).any(), (seed, epoch)


def test_a_caller_cannot_change_the_order_of_others() -> None:
    order = Order(SIZES, seed=1)
    order.positions(0, TOTAL)[1][:] = 0
    assert sorted(order.positions(0, TOTAL)[1]) == list(range(TOTAL))


def test_samples_mix_within_their_window_only() -> None:
    shards = Order((100,) * 6, seed=0, window=2).positions(0, 600)[1] // 100
    for first in range(0, 600, 200):
        window = shards[first : first + 200]
        assert len(set(window)) == 2
        assert len(set(window[:50])) == 2, "the shards of a window follow each other unmixed"


def test_epochs_join_without_a_gap() -> None:
    epochs, index = Order(SIZES, seed=5).positions(TOTAL - 4, 8)
    assert epochs.tolist() == [0] * 4 + [1] * 4
    assert index[:4].tolist() == epoch_order(seed=5, epoch=0)[-4:].tolist()
    assert index[4:].tolist() == epoch_order(seed=5, epoch=1)[:4].tolist()


def test_a_range_is_the_concatenation_of_its_parts() -> None:
    whole = Order(SIZES, seed=5).positions(0, 3 * TOTAL)
    cuts = [0, 1, 10, TOTAL, TOTAL + 13, 3 * TOTAL]
    parts = [Order(SIZES, seed=5).positions(a, b - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    for i in range(2):
        assert (whole[i] == np.concatenate([part[i] for part in parts])).all()


def test_a_range_longer_than_an_epoch_repeats_none_before_all_were_seen() -> None:
    _, index = Order(SIZES, seed=5).positions(0, 3 * TOTAL)
    for epoch in range(3):
        assert sorted(index[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))


def test_a_window_is_drawn_without_those_before_it() -> None:
    """A million shards of a thousand samples: what an epoch holds would not fit in memory."""
    order = Order(np.full(10**6, 1000), seed=1)
    epochs, index = order.positions(3 * 10**9 - 5, 10)
    assert epochs.tolist() == [2] * 5 + [3] * 5
    again = Order(np.full(10**6, 1000), seed=1)
    assert (again.positions(3 * 10**9 - 2, 4)[1] == index[3:7]).all()
    assert len(set(again.positions(17, 3 * 8000)[1].tolist())) == 3 * 8000


def test_a_mixture_keeps_the_epochs_of_each_and_its_weights() -> None:
    orders = [Order(SIZES, seed=1), Order((50,), seed=2), Order((4, 4), seed=3)]
    numbers, epochs, index = Mixture(orders, [0.2, 0.5, 0.3], seed=9).positions(0, 3 * BLOCK)
    for number, order in enumerate(orders):
        mine = numbers == number
        expected = order.positions(0, int(mine.sum()))
        assert (epochs[mine] == expected[0]).all() and (index[mine] == expected[1]).all()
        for block in range(3):
            here = mine[block * BLOCK : (block + 1) * BLOCK].mean()
            assert abs(here - (0.2, 0.5, 0.3)[number]) < 1 / BLOCK


@pytest.mark.parametrize("start", [0, 1, BLOCK - 3, 2 * BLOCK + 17])
def test_a_mixture_is_a_function_of_seed_and_position(start: int) -> None:
    orders = [Order(SIZES, seed=1), Order((50,), seed=2)]
    whole = Mixture(orders, [1, 2], seed=9).positions(0, start + 40)
    part = Mixture(orders, [1, 2], seed=9).positions(start, 40)
    assert all((a[start:] == b).all() for a, b in zip(whole, part, strict=True))
    assert (Mixture(orders, [1, 2], seed=8).positions(0, 200)[0] != whole[0][:40].repeat(5)).any()


def test_alone_in_a_mixture_is_as_without_one() -> None:
    order = Order(SIZES, seed=4)
    numbers, epochs, index = Mixture([order], [7], seed=9).positions(BLOCK - 9, 30)
    assert not numbers.any()
    assert (np.stack([epochs, index]) == np.stack(order.positions(BLOCK - 9, 30))).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_a_batch_without_overlap(world_size: int) -> None:
    batch = list(range(8))
    assert sum((batch[rank_slice(8, r, world_size)] for r in range(world_size)), []) == batch


def test_a_sample_seed_is_pure_and_distinct() -> None:
    seeds = [sample_seed(s, e, i) for s in range(3) for e in range(3) for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Order((0, 0), seed=0).positions(0, 1)
    with pytest.raises(ValueError, match="-1"):
        Order(SIZES, seed=0).positions(-1, 1)
    with pytest.raises(ValueError, match="shard sizes"):
        Order((3, -1), seed=0)
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        rank_slice(8, 0, 3)
    with pytest.raises(ValueError, match="rank 2"):
        rank_slice(8, 2, 2)
