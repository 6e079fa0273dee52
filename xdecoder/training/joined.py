"""What the ranks and micro-batches of a step share, so that together they learn what one process would learn
from the joined batch.

A loss is a sum over the items at hand, divided by `number`, which is the same everywhere; the average over
ranks (which DistributedDataParallel takes) of the sums over micro-batches is then the mean over the joined
batch. Contrasts see the rows of all by `parts` and `gather`. Every rank has to come to each of these calls,
in the same order, also with nothing in its hands.

A step of several micro-batches is rehearsed first: each goes through the model without a gradient, and what
it hands in here is kept. Then each goes through again, and meets what the others handed in (Gao et al. 2021,
"Scaling deep contrastive learning batch size under memory limited setup").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


@dataclass
class Rehearsal:
    """What each micro-batch handed in, in the order of the calls; `rows` by micro-batch."""

    rows: list[list[Tensor]] = field(default_factory=list)
    part: int = -1
    call: int = 0
    playing: bool = False

    def meet(self, x: Tensor) -> list[Tensor]:
        """What all micro-batches handed in at this call, own gradient kept; x alone while rehearsing."""
        if not self.playing:
            self.rows[self.part].append(x.detach())
            return [x]
        every = [x if part == self.part else rows[self.call] for part, rows in enumerate(self.rows)]
        self.call += 1
        return every


_rehearsal: Rehearsal | None = None


@contextmanager
def rehearsing(rehearsal: Rehearsal, part: int, *, playing: bool) -> Iterator[None]:
    """Inside, a micro-batch goes through the model."""
    global _rehearsal
    rehearsal.part, rehearsal.call, rehearsal.playing = part, 0, playing
    if not playing:
        rehearsal.rows.append([])
    _rehearsal = rehearsal
    try:
        yield
    finally:
        _rehearsal = None


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def number(count: Tensor | float, device: torch.device, least: float = 1.0) -> Tensor:
    """How many there are in the joined batch, at least `least`, over the number of ranks; no gradient."""
    every = _meet(torch.as_tensor(count, device=device).detach().float())
    return total(torch.stack(every).sum(0)).clamp(min=least) / world()


def total(x: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    if world() == 1 or _quiet():
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def parts(x: Tensor) -> Tensor:
    """The rows of all micro-batches of this rank, with gradients to those at hand."""
    every = _meet(x)
    return torch.cat(every) if len(every) > 1 else x


def once(x: Tensor) -> Tensor:
    """What every micro-batch computes alike: it counts in the first one alone, its gradient as it is."""
    later = _rehearsal is not None and _rehearsal.playing and _rehearsal.part > 0
    return x - x.detach() if later else x


def fixed(x: Tensor) -> Tensor:
    """A weight in what `once` is for: it learns in the first micro-batch alone."""
    later = _rehearsal is not None and _rehearsal.playing and _rehearsal.part > 0
    return x.detach() if later else x


def gather(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all ranks, in rank order, with gradients to each, and how many stand before this rank's.

    Ranks may hold different numbers of rows.
    """
    if world() == 1 or _quiet():
        return x, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = torch.cat(counts).tolist()
    shares = all_gather(F.pad(x, (0, 0, 0, max(sizes) - len(x))))
    rows = torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)])
    return rows, sum(sizes[: dist.get_rank()])


def _meet(x: Tensor) -> list[Tensor]:
    return [x] if _rehearsal is None else _rehearsal.meet(x)


def _quiet() -> bool:
    """Ranks do not meet in a rehearsal."""
    return _rehearsal is not None and not _rehearsal.playing
