"""Training in several processes that form a gloo group, for the tests of what ranks do together."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import MODEL, VOCABULARY, bare, endless, samples, train_config

from schemas.records import Sample
from xdecoder.training.trainer import StepReport, Trainer


def run_ranks(work: Callable[..., None], folder: Path, *arguments: Any, count: int = 2) -> list[Any]:
    """`work(rank, folder, *arguments)` in each process of a group; what each saved as RANK.pt."""
    torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
        _in_group, args=(count, work, folder, arguments), nprocs=count
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _in_group(
    rank: int, count: int, work: Callable[..., None], folder: Path, arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=300)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=patience)
    work(rank, folder, *arguments)
    dist.destroy_process_group()


def uneven() -> list[Sample]:
    """Eight samples: by halves of four, one half tells of everything, the other of little or nothing."""
    rich = samples(4)
    poor = [
        bare(s, *kept) for s, kept in zip(samples(8)[4:], (("captions",), (), ("segments",), ()), strict=True)
    ]
    return [*rich[:2], *poor[:2], *poor[2:], *rich[2:]]


def steps_of(of: Trainer, count: int, *, rank: int = 0, world: int = 1) -> list[dict[str, float]]:
    """Train `count` steps on this rank's share of `uneven`, four samples a step, and what each step
    measured.
    """
    reports: list[StepReport] = []
    share = 4 // world // of.config.accumulate
    streams = {}
    for stream in of.streams:
        make = of.make_batch(stream)

        def mine(chosen: Sequence[Sample], seeds: Sequence[int], make: Any = make) -> Any:
            own = slice(rank * share, (rank + 1) * share)
            return make(chosen[own], seeds[own])

        streams[stream] = endless(mine, uneven(), size=share * world, position=of.positions[stream])  # type: ignore[arg-type]
    of.fit(streams, until=of.step + count, on_log=reports.append)
    return [{k: v for k, v in r.metrics.items() if k.startswith(("loss", "grad"))} for r in reports]


def exact_trainer(*, rank: int = 0, world: int = 1, **changes: Any) -> Trainer:
    """Slow, because a high rate lets rounding grow beyond 1e-5 within twenty steps."""
    plain = train_config()
    settings = {
        "steps": 40,
        "loss": plain.loss.model_copy(
            update={"points": 0}
        ),  # every pixel, so that nothing is drawn by chance
        "optim": plain.optim.model_copy(update={"lr": 2e-5}),
    }
    return Trainer(MODEL, train_config(**(settings | changes)), VOCABULARY, rank=rank, world_size=world)
