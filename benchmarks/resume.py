"""Is a training that is killed again and again, and resumed, the same to the last bit?

    python -m benchmarks.resume [--kills 20] [--steps 60] [--seed 0]

A tiny model learns all seven tasks from shards of the demo world, in one process and in two. Uninterrupted
first; then with SIGKILL for a rank drawn by chance at a moment drawn by chance, and resumed from what lies on
disk, until all steps are done and as many kills as asked have been survived. Compared: the loss of every step
and the final weights, bit by bit.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs import journal
from pipelines.catalog import Catalog
from pipelines.stream import training_stream
from schemas.jobs import ModelConfig, PretrainJob, TrainConfig, load
from schemas.tasks import Stream
from xdecoder.prompts import Vocabulary
from xdecoder.training.batch import Batch
from xdecoder.training.checkpoint import Checkpoints
from xdecoder.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "weights{rank}.pt"
TINY = (
    "model={width: 32, heads: 2, ffn: 64, decoder_layers: 2, encoder_layers: 1, latents: 8, init_layers: 1, "
    "text_contexts: 2, mask_pooling: true, text: {layers: 1, heads: 2, context: 20}, "
    "backbone: {name: resnet10t, options: {stem_type: '', norm_layer: groupnorm}}}",
    "train.batch={segmentation: 4, image_text: 4}",
    "train.augment={image_size: 32, image_text_size: 32}",
    "train.loss.points=64",
    "train.log_every=1",
    "train.checkpoint_every=5",
)
Streams = Mapping[Stream, Iterator[tuple[Batch, int]]]


@dataclass(frozen=True, kw_only=True)
class Course:
    """A training that can be lived through in pieces; `streams` are those from where a trainer stands."""

    model: ModelConfig
    train: TrainConfig
    vocabulary: Vocabulary
    streams: Callable[[Trainer], Streams]


@dataclass(frozen=True, kw_only=True)
class Lived:
    """What came of it: the loss of each step, the final weights, how often it was killed, how long it
    took.
    """

    curve: tuple[tuple[int, float], ...]
    weights: dict[str, torch.Tensor]
    kills: int
    seconds: float

    def same(self, other: "Lived") -> bool:
        equal = self.weights.keys() == other.weights.keys() and all(
            torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items()
        )
        return self.curve == other.curve and equal


def live(
    course: Course, folder: Path, *, world: int, kills: int = 0, seed: int = 0, pace_s: float = 1.0
) -> Lived:
    """Train to the end in `world` processes, killed at most `kills` times, about every `pace_s` seconds."""
    chance, started, done = random.Random(seed), time.monotonic(), 0
    fork = multiprocessing.get_context("fork")  # what is imported need not be imported again
    while True:
        meeting = folder / f"meeting{done}"
        folder.mkdir(parents=True, exist_ok=True)
        ranks = [
            fork.Process(target=_survivor, args=(course, folder, meeting, rank, world))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        if done < kills:
            _kill(ranks, chance.uniform(0.1, 2 * pace_s), chance)
        for process in ranks:
            process.join(600)
        if all(process.exitcode == 0 for process in ranks):
            break
        done += 1
        if done > kills + 2:
            raise SystemExit("the training ends with an error where nobody kills it")
        for process in ranks:
            process.kill()
            process.join()
    rows = journal.read(folder / "metrics.jsonl")
    return Lived(
        curve=tuple((row.step, row.metrics["loss"]) for row in rows),
        weights=torch.load(folder / WEIGHTS.format(rank=0)),
        kills=done,
        seconds=time.monotonic() - started,
    )


def _kill(ranks: list[ForkProcess], after_s: float, chance: random.Random) -> None:
    """One of them, unless all have come to an end by then."""
    victim = chance.choice(ranks)
    victim.join(after_s)
    if victim.is_alive() and victim.pid:
        os.kill(victim.pid, signal.SIGKILL)


def _survivor(*arguments: Any) -> None:
    """A rank whose peer was killed ends too, without a word."""
    try:
        _rank(*arguments)
    except RuntimeError:
        os._exit(1)


def _rank(course: Course, folder: Path, meeting: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        patience = datetime.timedelta(seconds=60)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=patience
        )
    trainer = Trainer(course.model, course.train, course.vocabulary, rank=rank, world_size=world)
    checkpoints = Checkpoints(folder / "checkpoints", keep=course.train.keep_checkpoints, facts={})
    checkpoints.restore(trainer)
    streams, written = course.streams(trainer), journal.Writer(folder / "metrics.jsonl")
    while trainer.step < course.train.steps:
        every = course.train.checkpoint_every
        trainer.fit(
            streams,
            until=min((trainer.step // every + 1) * every, course.train.steps),
            on_log=lambda r: written.append(r.step, r.metrics) if rank == 0 else None,
        )
        checkpoints.save(trainer)
    checkpoints.wait()
    torch.save(trainer.model.state_dict(), folder / WEIGHTS.format(rank=rank))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def build(store: Path) -> Path:
    """The demo world in shards, by a process of its own: this one must not start Ray before it forks."""
    small = ("demo.train_scenes=24", "demo.val_scenes=4", "demo.train_pairs=24", "demo.val_pairs=4")
    command = [
        sys.executable,
        "-m",
        "jobs",
        "jobs/rebuild.yaml",
        f"store={store}",
        *small,
        "build.shard_samples=8",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XDECODER_STORE"}
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
    return store


def _demo_streams(store: Path, trainer: Trainer) -> Streams:
    version = Catalog(store, "demo").open()
    return {
        stream: training_stream(
            version,
            stream=stream,
            seed=trainer.config.seed,
            global_batch=getattr(trainer.config.batch, stream),
            rank=trainer.rank,
            world_size=trainer.world_size,
            position=trainer.positions[stream],
            make_batch=trainer.make_batch(stream),
        )
        for stream in trainer.streams
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="has the dataset demo; else a small one is built")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        folder = Path(name)
        store = arguments.store or build(folder / "store")
        job = load(ROOT / "jobs" / "pretrain.yaml", [*TINY, f"train.steps={arguments.steps}"])
        assert isinstance(job, PretrainJob)
        data = Catalog(store, "demo").open()
        course = Course(
            model=job.model,
            train=job.train,
            vocabulary=Vocabulary(taxonomy=data.taxonomy(seen_only=True), answers=data.card.answers),
            streams=partial(_demo_streams, store),
        )
        for world in (1, 2):
            whole = live(course, folder / f"whole{world}", world=world)
            print(f"{world} process(es): {len(whole.curve)} steps in {whole.seconds:.0f} s, uninterrupted")
            survived, run = 0, 0
            while survived < arguments.kills:
                left = arguments.kills - survived
                pieces = live(
                    course,
                    folder / f"pieces{world}-{run}",
                    world=world,
                    kills=left,
                    seed=arguments.seed + run,
                    pace_s=whole.seconds / 8,
                )
                survived, run = survived + pieces.kills, run + 1
                verdict = {"kills": pieces.kills, "same to the last bit": pieces.same(whole)}
                print(f"  run {run}: {json.dumps(verdict)}, {pieces.seconds:.0f} s", flush=True)
                if not pieces.same(whole):
                    raise SystemExit("a resumed training differs from the uninterrupted one")


if __name__ == "__main__":
    main()
