"""Are classes that never had a mask segmented by their names? Group and name against name every pixel.

    python -m jobs jobs/rebuild.yaml         the demo world, where two classes have no mask in training
    python -m benchmarks.zeroshot store      all recipes, three seeds each: seen, unseen, harmonic mean

Every recipe has the demo's backbone, pixel decoder, text encoder, pictures and steps (jobs/pretrain.yaml)
and reads class names alone but for `with_captions`. Those with segments name them by mask pooling too, as the
demo does. Scores are mIoU of GZS3: all classes are allowed at every pixel.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.catalog import Catalog
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
MASKS_ALONE = (
    "model.task_tokens=false",
    "train.tasks=[semantic]",
    "train.task_sampling=[1, 0, 0]",
    "evaluate.tasks=[semantic]",
    "evaluate.pictures=0",
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
    "with_captions": (*MASKS_ALONE, "train.tasks=[semantic, retrieval, captioning]"),
}
Streams = Callable[[Stream, int, BatchMaker], Iterator[tuple[Batch, int]]]


@dataclass(frozen=True, kw_only=True)
class World:
    """Where pictures come from: endless training batches by stream and seed, and held-out samples."""

    taxonomy: Taxonomy
    train: Streams
    held_out: Callable[[], Iterator[Sample]]


def trial(job: PretrainJob, world: World, seed: int) -> tuple[float, ...]:
    """Train one model and sit the exam: seen, unseen and harmonic mean, in percent."""
    config = job.train.model_copy(update={"seed": seed})
    trainer = Trainer(job.model, config, Vocabulary(taxonomy=world.taxonomy.seen(), answers=()))
    streams = {s: world.train(s, seed, trainer.make_batch(s)) for s in trainer.streams}
    trainer.fit(streams, until=config.steps, on_log=lambda report: None)
    evaluation = evaluate(
        Predictor(trainer.model, card(trainer)),
        {"segmentation": world.held_out},
        job.evaluate,
        world.taxonomy,
        lambda task, done, total: None,
    )
    return tuple(evaluation.value("semantic", score).value for score in SCORES)


def built(store: Path, job: PretrainJob) -> World:
    """The dataset version that the job names, as `jobs/rebuild.yaml` left it."""
    version = Catalog(store, job.dataset.name).open(job.dataset.version)

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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0 takes those of jobs/pretrain.yaml")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(f"{'recipe':18}{'seed':>6}{'seen':>8}{'unseen':>8}{'mean':>8}", flush=True)
    for name in options.recipes:
        steps = [f"train.steps={options.steps}"] if options.steps else []
        job = load(JOB, [*RECIPES[name], *steps])
        assert isinstance(job, PretrainJob)
        world = built(options.store, job)
        rows = []
        for seed in range(options.seeds):
            rows.append(trial(job, world, seed))
            print(f"{name:18}{seed:>6}" + "".join(f"{v:>8.1f}" for v in rows[-1]), flush=True)
        mean, spread = np.mean(rows, 0), np.std(rows, 0)
        figures = ", ".join(f"{m:.1f} +- {s:.1f}" for m, s in zip(mean, spread, strict=True))
        print(f"{name}: {figures} over {options.seeds} seeds", flush=True)


if __name__ == "__main__":
    main()
