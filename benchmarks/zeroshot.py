"""Are classes that never had a mask segmented by their names? Group and name against name every pixel.

    python -m jobs jobs/rebuild.yaml demo.train_scenes=1500 demo.train_pairs=1500 demo.val_scenes=150
    python -m benchmarks.zeroshot store      all recipes, three seeds each: seen, unseen, harmonic mean, ZS3

The first makes the demo world, where two classes have no mask in training; `demo.unseen=[...]` chooses
others. Every recipe has the same backbone, pixel decoder, text encoder, pictures and steps
(jobs/pretrain.yaml, smaller: `SIZE`) and reads class names alone but for `with_captions`. Those with segments
name them by mask pooling too, as the demo does. Scores are mIoU of GZS3: all classes are allowed at every
pixel; once as they are and once with `GAMMA` taken from the scores of seen classes (ZegFormer's calibration).
The last is ZS3: the unseen alone are allowed and scored.

Every finished training is a line of store/zeroshot.jsonl, and is not repeated: an interrupted run goes on.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.catalog import Catalog, DatasetVersion
from pipelines.stream import read_samples, training_stream
from schemas.jobs import PretrainJob, load
from schemas.records import Sample
from schemas.tasks import Stream
from schemas.taxonomy import Taxonomy
from xdecoder.inference.evaluator import evaluate
from xdecoder.inference.predictor import Predictor
from xdecoder.prompts import Vocabulary
from xdecoder.tasks import BatchMaker
from xdecoder.training.batch import Batch
from xdecoder.training.checkpoint import card
from xdecoder.training.trainer import Trainer

JOB = Path(__file__).resolve().parents[1] / "jobs" / "pretrain.yaml"
SCORES = ("GZS3_seen", "GZS3_unseen", "GZS3_harmonic")
GAMMA = 0.1  # chosen by us, not tuned
HEADS = ("seen", "unseen", "mean", "seen-g", "unseen-g", "mean-g", "ZS3")
MASKS_ALONE = (
    "model.task_tokens=false",
    "train.tasks=[semantic]",
    "train.task_sampling=[1, 0, 0]",
    "evaluate.tasks=[semantic]",
    "evaluate.pictures=0",
)
# All trainings are to end within half an hour of two cores.
SIZE = (
    "model.backbone.options={channels: [32, 64, 128, 256]}",
    "train.batch.segmentation=8",
    "train.batch.image_text=8",
    "train.steps=600",
)
# What each recipe changes of jobs/pretrain.yaml.
RECIPES: Mapping[str, tuple[str, ...]] = {
    # ZegFormer: group first, then compare segments with names; a learned no-object
    "decoupled": (*MASKS_ALONE, "model.no_object=null"),
    # SPNet, the per-pixel baseline with names: every pixel's feature is compared with them
    "per_pixel": (
        *MASKS_ALONE,
        "model.output=pixels",
        "model.decoder_layers=0",
        "model.mask_pooling=false",
        "train.loss.region_ce=0",
    ),
    # X-Decoder's own parts, without and with captions, which speak of the unseen classes
    "without_captions": MASKS_ALONE,
    "with_captions": (
        *MASKS_ALONE,
        "train.tasks=[semantic, retrieval, captioning]",
        "train.loss.retrieval=0.1",  # whole sentences pull names apart: with 0.5 the unseen are found less
        "train.loss.nouns=10",  # beside 5 for the names of masks
    ),
}
Streams = Callable[[Stream, int, BatchMaker], Iterator[tuple[Batch, int]]]


@dataclass(frozen=True, kw_only=True)
class World:
    """Where pictures come from: endless training batches by stream and seed, and held-out samples."""

    taxonomy: Taxonomy
    train: Streams
    held_out: Callable[[], Iterator[Sample]]


def trial(job: PretrainJob, world: World, seed: int) -> tuple[float, ...]:
    """Train one model and sit the exams: `HEADS`, in percent; -g is calibrated."""
    config = job.train.model_copy(update={"seed": seed})
    trainer = Trainer(job.model, config, Vocabulary(taxonomy=world.taxonomy.seen(), answers=()))
    streams = {s: world.train(s, seed, trainer.make_batch(s)) for s in trainer.streams}
    trainer.fit(streams, until=config.steps, on_log=lambda report: None)
    predictor = Predictor(trainer.model, card(trainer))
    unseen = [c.model_copy(update={"seen": True}) for c in world.taxonomy.categories if not c.seen]
    alone = world.taxonomy.model_copy(update={"categories": tuple(unseen)})
    exams = {"segmentation": world.held_out}
    scores: list[float] = []
    for gamma in (0.0, GAMMA):
        zeroshot = job.evaluate.zeroshot.model_copy(update={"gamma": gamma})
        settings = job.evaluate.model_copy(update={"zeroshot": zeroshot})
        found = evaluate(predictor, exams, settings, world.taxonomy, lambda *done: None)
        scores += [found.value("semantic", score).value for score in SCORES]
    zero = evaluate(predictor, exams, job.evaluate, alone, lambda *done: None)
    return (*scores, zero.value("semantic", "mIoU").value)


def built(version: DatasetVersion, job: PretrainJob) -> World:
    """A dataset version, as `jobs/rebuild.yaml` left it."""

    def train(stream: Stream, seed: int, make: BatchMaker) -> Iterator[tuple[Batch, int]]:
        return training_stream(
            version,
            stream=stream,
            seed=seed,
            global_batch=getattr(job.train.batch, stream),
            rank=0,
            world_size=1,
            make_batch=make,
        )

    return World(
        taxonomy=version.taxonomy(),
        train=train,
        held_out=lambda: read_samples(version, split="val", stream="segmentation"),
    )


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The scores of finished trainings, in a file: a line each."""

    path: Path

    def known(self) -> dict[str, list[float]]:
        """By what was trained."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = map(json.loads, lines)
        return {row["trained"]: row["scores"] for row in rows}

    def add(self, trained: str, name: str, seed: int, scores: Sequence[float]) -> None:
        row = {"recipe": name, "seed": seed, "scores": scores, "trained": trained}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def digest(job: PretrainJob, version: str, seed: int) -> str:
    """What follows from everything that a training and its scores depend on."""
    return hashlib.sha256(f"{job.model_dump_json()} {version} {seed} {GAMMA}".encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(options.threads)
    ledger = Ledger(path=options.store / "zeroshot.jsonl")
    print(f"{'recipe':18}{'seed':>6}" + "".join(f"{head:>10}" for head in HEADS), flush=True)
    rows: dict[str, list[Sequence[float]]] = {name: [] for name in options.recipes}
    for seed in range(options.seeds):  # outermost: however few are done, they are pairs
        for name in options.recipes:
            rows[name].append(scores(options.store, ledger, name, seed))
            print(f"{name:18}{seed:>6}" + "".join(f"{v:>10.1f}" for v in rows[name][-1]), flush=True)
    for name, found in rows.items():
        mean, spread = np.mean(found, 0), np.std(found, 0)
        figures = ", ".join(f"{m:.1f} +- {s:.1f}" for m, s in zip(mean, spread, strict=True))
        print(f"{name}: {figures} over {options.seeds} seeds", flush=True)


def scores(store: Path, ledger: Ledger, name: str, seed: int) -> Sequence[float]:
    """Of one training: from the file, or trained now."""
    job = load(JOB, [*RECIPES[name], *SIZE])
    assert isinstance(job, PretrainJob)
    version = Catalog(store, job.dataset.name).open(job.dataset.version)
    trained = digest(job, version.id, seed)
    known = ledger.known()
    if trained not in known:
        known[trained] = list(trial(job, built(version, job), seed))
        ledger.add(trained, name, seed, known[trained])
    return known[trained]


if __name__ == "__main__":
    main()
