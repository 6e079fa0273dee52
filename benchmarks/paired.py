"""Several ways to one answer, timed in turns, so that what else the machine does meets all of them alike.

In seconds of this process's CPU, which other processes change little, unless another clock is given.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Answer = TypeVar("Answer")
Times = dict[str, list[float]]


def measure(
    ways: Mapping[str, Callable[[], Answer]],
    rounds: int,
    agree: Callable[[Mapping[str, Answer]], bool] = lambda answers: True,
    clock: Callable[[], float] = time.process_time,
) -> Times:
    """Seconds of each way in each round, one way after the other.

    Raises `SystemExit` where the answers of a round do not agree.
    """
    times: Times = {name: [] for name in ways}
    for _ in range(rounds):
        answers = {}
        for name, way in ways.items():
            start = clock()
            answers[name] = way()
            times[name].append(clock() - start)
        if not agree(answers):
            raise SystemExit(f"{list(ways)} do not give the same answer")
    return times


def table(times: Times, peer: str) -> str:
    """A line a way: its median, and the median of its ratios to the peer in the same round."""
    width = max(map(len, times))
    lines = []
    for name, taken in times.items():
        ratio = statistics.median(t / p for t, p in zip(taken, times[peer], strict=True))
        lines.append(
            f"{name:{width}} {statistics.median(taken):8.3f} s {ratio:7.2f} x {peer}, median of pairs"
        )
    return "\n".join(lines)
