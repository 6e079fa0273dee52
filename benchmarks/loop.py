"""What does our training loop cost beyond a bare PyTorch loop of the same model?

    python -m benchmarks.loop [--rounds 6] [--steps 4]

Paired in one run, in turns: some steps of `Trainer.fit`, as many of a loop that does the least (forward,
loss, backward, clipping, AdamW), with the demo's model and batches that are already in memory. In seconds of
this process's CPU. What a start and a restart cost is measured by `benchmarks.faults_training`.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.paired import measure, table
from benchmarks.resume import build
from pipelines.catalog import Catalog
from pipelines.stream import read_samples
from schemas.jobs import PretrainJob, load
from schemas.records import Sample
from schemas.tasks import Stream
from xdecoder.prompts import Vocabulary
from xdecoder.training.batch import Batch
from xdecoder.training.losses import total
from xdecoder.training.trainer import Trainer

JOB = Path(__file__).resolve().parents[1] / "jobs" / "pretrain.yaml"


def ours(of: Trainer, batches: dict[Stream, Batch], steps: int) -> int:
    """As jobs/worker.py trains, reports and all."""

    def endless(batch: Batch) -> Iterator[tuple[Batch, int]]:
        while True:
            yield batch, of.step

    of.fit({s: endless(b) for s, b in batches.items()}, until=of.step + steps, on_log=lambda report: None)
    return of.step


def bare(of: Trainer, batches: dict[Stream, Batch], steps: int) -> int:
    """What is left when everything that can be left out is."""
    of.objective.train()
    for _ in range(steps):
        total(of.objective(tuple(batches.values())), of.config.loss).backward()
        nn.utils.clip_grad_norm_(of.model.parameters(), of.config.optim.clip)
        of.optimizer.step()
        of.optimizer.zero_grad(set_to_none=True)
        of.step += 1
    return of.step


def compare(of: Trainer, samples: list[Sample], *, rounds: int, steps: int) -> str:
    """The table of the two, trained in turns: one trainer, so that both see the same weights."""
    batches = {s: of.make_batch(s)(samples, range(len(samples))) for s in of.streams}
    ours(of, batches, 1)  # memory is taken, kernels are chosen
    ways = {"bare": lambda: bare(of, batches, steps), "Trainer.fit": lambda: ours(of, batches, steps)}
    return table(measure(ways, rounds), "bare")


def demo(store: Path | None) -> tuple[Trainer, list[Sample]]:
    """The demo's model, and as many samples as it takes in a step."""
    job = load(JOB)
    assert isinstance(job, PretrainJob)
    with tempfile.TemporaryDirectory(prefix="loop-") as name:
        data = Catalog(store or build(Path(name)), "demo").open()
        count = job.train.batch.segmentation
        samples = list(read_samples(data, split="train", stream="segmentation", limit=count))
        words = Vocabulary(taxonomy=data.taxonomy(seen_only=True), answers=data.card.answers)
        trainer = Trainer(job.model, job.train, words)
    return trainer, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of each way in a round")
    parser.add_argument("--store", type=Path, help="has the dataset demo; else a small one is built")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer, samples = demo(arguments.store)
    print(compare(trainer, samples, rounds=arguments.rounds, steps=arguments.steps))


if __name__ == "__main__":
    main()
