"""How long does a step of the demo wait for its data, and what does each way of preparing it ahead cost?

    python -m benchmarks.data_wait [--store store] [--rounds 6] [--steps 10] [--switch 0.005]

After `python -m jobs jobs/rebuild.yaml`. Paired in one run: the model, batches and settings of
jobs/pretrain.yaml train on, and every round gives each way so many steps in turn. Wait as a share of the
step, by median over the rounds.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from jobs.worker import SWITCH_S
from pipelines.catalog import Catalog
from pipelines.stream import training_stream
from schemas.jobs import PretrainJob, load
from schemas.tasks import Stream
from xdecoder.prompts import Vocabulary
from xdecoder.training.batch import Batch
from xdecoder.training.trainer import StepReport, Trainer

# loader processes and threads
WAYS = {
    "when asked": (0, 0),
    "1 thread": (0, 1),
    "2 threads": (0, 2),
    "1 process": (1, 0),
    "2 processes": (2, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("store"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="of each way in a round")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is the peer")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument(
        "--switch", type=float, default=SWITCH_S, help="seconds (see `sys.setswitchinterval`)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.setswitchinterval(arguments.switch)
    job = load("jobs/pretrain.yaml")
    assert isinstance(job, PretrainJob)
    data = Catalog(arguments.store, job.dataset.name).open()
    vocabulary = Vocabulary(taxonomy=data.taxonomy(seen_only=True), answers=data.card.answers)
    train = job.train.model_copy(update={"log_every": 10**9})
    trainer = Trainer(job.model, train, vocabulary)

    def streams(workers: int, threads: int) -> dict[Stream, Iterator[tuple[Batch, int]]]:
        return {
            stream: training_stream(
                data,
                stream=stream,
                seed=train.seed,
                global_batch=getattr(train.batch, stream),
                rank=0,
                world_size=1,
                workers=workers,
                threads=threads,
                make_batch=trainer.make_batch(stream),
            )
            for stream in trainer.streams
        }

    reports: list[StepReport] = []
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.ways}
    kept = {name: streams(*WAYS[name]) for name in arguments.ways}
    for number in range(arguments.rounds + 1):  # the first is to warm up
        for name, drawn in kept.items():
            trainer.fit(drawn, until=trainer.step + arguments.steps, on_log=reports.append)
            if number:
                metrics = reports[-1].metrics
                rows[name].append((metrics["data_wait_s"], metrics["step_s"]))
    for name, row in rows.items():
        waited, step = (statistics.median(column) for column in zip(*row, strict=True))
        share = statistics.median(w / s for w, s in row)
        slower = statistics.median(s / p for (_, s), (_, p) in zip(row, rows[arguments.ways[0]], strict=True))
        print(
            f"{name:16} waits {1e3 * waited:5.1f} ms of {1e3 * step:6.1f} ms, {share:6.2%}; "
            f"step {slower:.3f} x {arguments.ways[0]}"
        )


if __name__ == "__main__":
    main()
