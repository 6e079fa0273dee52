"""Plans of a training far larger than this machine: is every sample drawn once, by whom, and at what cost?

    python -m benchmarks.scale [--shards 1000000] [--samples 1000] [--ranks 4096] [--share 32]

Only the order is computed, no data is read. The laws first: what stands at every position of an epoch (for a
plan small enough to be written down), that shards and windows hold each sample once (for the large one), that
the ranks' shares tile the global batch, and that a resume on other numbers of ranks goes on with the same
samples. Then some ranks plan, each in a process of its own, as they would to start and to resume: the time
from the sizes of the shards to the batches, and the memory of the process. Then how well windows mix.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np

from pipelines.order import WINDOW_SHARDS, Mixture, Order, rank_slice

SEED = 7


def sizes_of(shards: int, samples: int) -> np.ndarray:
    """int64[shards], up to twice the mean, every hundredth shard empty."""
    sizes = np.random.default_rng(SEED).integers(samples // 2, samples + samples // 2 + 1, shards)
    sizes[::100] = 0
    return sizes


def sequence(arguments: argparse.Namespace) -> Mixture:
    order = Order(sizes_of(arguments.shards, arguments.samples), SEED)
    return Mixture([order], [1.0], SEED)


def plan(arguments: argparse.Namespace) -> dict[str, float]:
    """What one rank does before its first batch, ten batches on, and a resume at a place of no meaning."""
    started = time.perf_counter(), time.process_time()
    mixture = sequence(arguments)
    global_batch = arguments.ranks * arguments.share
    share = rank_slice(global_batch, arguments.rank, arguments.ranks)
    resumed = 2 * mixture.orders[0].total // 3 // global_batch * global_batch
    for begin in (0, resumed):
        for step in range(10):
            mixture.positions(begin + step * global_batch + share.start, arguments.share)
    took = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": took[0], "cpu_s": took[1], "peak_mb": peak}


def check_small() -> int:
    """Every position of three epochs, written down, against every sample; returns how many were checked."""
    order = Order(sizes_of(20_000, 20), SEED)
    mixture = Mixture([order], [1.0], SEED)
    _, epochs, index = mixture.positions(0, 3 * order.total)
    for epoch in range(3):
        counts = np.bincount(index[epochs == epoch], minlength=order.total)
        assert (counts == 1).all(), f"epoch {epoch}: {(counts != 1).sum()} samples not seen exactly once"
    return 3 * order.total


def check_structure(mixture: Mixture, windows: int) -> None:
    """Of an epoch too long to write down: its shards are each there once, and windows hold just their own."""
    (order,) = mixture.orders
    shards, ends = order.shards(epoch=1)
    assert (np.bincount(shards, minlength=len(order.sizes)) == 1).all()
    assert ends[-1] == order.total
    for number in np.random.default_rng(SEED).integers(0, len(ends), windows):
        first = int(ends[number - 1]) if number else 0
        _, index = order.positions(order.total + first, int(ends[number]) - first)
        own = shards[number * order.window : (number + 1) * order.window]
        held = [np.arange(order.starts[s], order.starts[s + 1]) for s in np.sort(own)]
        assert (np.sort(index) == np.concatenate(held)).all(), f"window {number}"


def check_ranks(mixture: Mixture, arguments: argparse.Namespace) -> None:
    """The shares tile the global batch, equally long; and the same samples come on other numbers of ranks."""
    global_batch = arguments.ranks * arguments.share
    for ranks in (arguments.ranks, arguments.ranks // 2, arguments.ranks // 8, 1):
        shares = [rank_slice(global_batch, rank, ranks) for rank in range(ranks)]
        edges = [0, *(share.stop for share in shares)]
        assert [share.start for share in shares] == edges[:-1] and edges[-1] == global_batch
        assert len({share.stop - share.start for share in shares}) == 1
    begin = mixture.orders[0].total - global_batch // 2  # a batch over the end of an epoch
    whole = mixture.positions(begin, global_batch)[2]
    for ranks in (arguments.ranks, 512):
        parts = []
        for rank in range(ranks):
            share = rank_slice(global_batch, rank, ranks)
            parts.append(mixture.positions(begin + share.start, share.stop - share.start)[2])
        assert (np.concatenate(parts) == whole).all(), f"{ranks} ranks"


def mixing(window: int, shards: int = 1024, samples: int = 100) -> tuple[float, float]:
    """Distance between neighbours of a shard in the stream, and shards in a batch of 32.

    Both as a share of what a shuffle of everything gives.
    """
    order = Order(np.full(shards, samples), SEED, window)
    index = order.positions(0, order.total)[1]
    place = np.empty(order.total, dtype=np.int64)
    place[index] = np.arange(order.total)
    near = np.abs(np.diff(place.reshape(shards, samples), axis=1)).mean()
    batches = (index // samples)[: order.total // 32 * 32].reshape(-1, 32)
    distinct = np.mean([len(set(batch)) for batch in batches.tolist()])
    return near / (order.total / 3), distinct / (shards * (1 - (1 - 1 / shards) ** 32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=1000, help="of a shard, on average")
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--share", type=int, default=32, help="samples of a rank in a step")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(plan(arguments)))
        return
    print(f"{check_small()} positions of a small plan: every sample of every epoch exactly once")
    mixture = sequence(arguments)
    check_structure(mixture, windows=200)
    check_ranks(mixture, arguments)
    print(
        f"{arguments.shards} shards, {mixture.orders[0].total} samples, {arguments.ranks} ranks: shards, "
        "windows, shares and resumes on 1/1, 1/2, 1/8 of the ranks and one hold each sample once"
    )
    for rank in (0, arguments.ranks // 2, arguments.ranks - 1):
        command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], "--rank", str(rank)]
        seen = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(
            f"rank {rank}: plans and resumes in {seen['seconds']:.2f} s ({seen['cpu_s']:.2f} s of CPU), "
            f"{seen['peak_mb']:.0f} MB at most"
        )
    for window in (1, 4, WINDOW_SHARDS, 32, 128):
        near, distinct = mixing(window)
        print(
            f"windows of {window} shards of 1024: neighbours {near:.1%} as far, {distinct:.0%} of the shards"
        )


if __name__ == "__main__":
    main()
