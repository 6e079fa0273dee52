"""Does the same code learn from real pictures? Two trials on corpora of your own, end to end on one machine.

    python -m benchmarks.real_data overfit ../shared/data/coco      8 photographs by heart: PQ >= 85
    python -m benchmarks.real_data nuclei ../shared/data/nuclei     microscopy: falling loss, rising PQ

Each builds a dataset version with Ray Data, trains without tracking, and scores by the evaluator.
"""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray

from pipelines.build import build
from pipelines.catalog import Catalog, DatasetVersion
from pipelines.stream import read_samples, training_stream
from schemas.jobs import (
    AugmentConfig,
    BackboneConfig,
    BatchConfig,
    BuildConfig,
    CorpusConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)
from xdecoder.inference.evaluator import evaluate
from xdecoder.inference.predictor import Predictor
from xdecoder.prompts import Vocabulary
from xdecoder.training import checkpoint
from xdecoder.training.trainer import StepReport, Trainer


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is read, at which size it is learnt, for how long, and what is scored."""

    corpora: tuple[CorpusConfig, ...]
    side: int
    batch: int
    steps: int
    lr: float
    scale: tuple[float, float]
    flip: float
    scores: int


def overfit(root: Path) -> Trial:
    """The first 8 photographs with instances: no augmentation, scored on themselves."""
    corpus = CorpusConfig(
        name="photos",
        format="coco_panoptic",
        split="train",
        root=str(root),
        images="images",
        annotations="annotations/panoptic_things_derived.json",
        labels="panoptic_things_derived",
        limit=8,
    )
    return Trial(
        corpora=(corpus,),
        side=256,
        batch=8,
        steps=700,
        lr=1e-3,
        scale=(1, 1),
        flip=0,
        scores=4,
    )


def nuclei(root: Path) -> Trial:
    """Microscopy, scored four times on its own training pictures, seen through crops of other scales."""
    corpus = CorpusConfig(
        name="nuclei",
        format="coco_panoptic",
        split="train",
        root=str(root),
        images="images",
        annotations="panoptic.json",
        labels="panoptic",
    )
    return Trial(
        corpora=(corpus,),
        side=256,
        batch=8,
        steps=300,
        lr=1e-3,
        scale=(0.8, 1.5),
        flip=0.5,
        scores=4,
    )


TRIALS = {"overfit": overfit, "nuclei": nuclei}


def model_config(latents: int) -> ModelConfig:
    return ModelConfig(
        width=128,
        heads=4,
        ffn=512,
        decoder_layers=3,
        encoder_layers=1,
        latents=latents,
        init_layers=1,
        text_contexts=4,
        backbone=BackboneConfig(
            name="resnet18", out_indices=(1, 2, 3, 4), options={"norm_layer": "groupnorm"}
        ),
        text=TextConfig(layers=2, heads=4, context=24),
    )


def train_config(trial: Trial) -> TrainConfig:
    return TrainConfig(
        steps=trial.steps,
        tasks=("panoptic",),
        task_sampling=(0, 0, 1),
        batch=BatchConfig(segmentation=trial.batch, image_text=1),
        augment=AugmentConfig(image_size=trial.side, scale=trial.scale, flip=trial.flip),
        optim=OptimConfig(
            lr=trial.lr, backbone_scale=1, text_scale=1, warmup_steps=20, schedule="poly", weight_decay=0.01
        ),
        loss=LossConfig(points=2048),
        log_every=25,
    )


def run(trial: Trial, store: Path, latents: int) -> None:
    """Build, train, and score `trial.scores` times on the way."""
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, address="local")
    try:
        catalog = Catalog(store, "trial")
        print(build(trial.corpora, BuildConfig(), catalog))
    finally:
        ray.shutdown()
    version = catalog.open()
    config = train_config(trial)
    trainer = Trainer(
        model_config(latents), config, Vocabulary(taxonomy=version.taxonomy(seen_only=True), answers=())
    )
    stream = training_stream(
        version,
        stream="segmentation",
        seed=0,
        global_batch=trial.batch,
        rank=0,
        world_size=1,
        make_batch=trainer.make_batch("segmentation"),
    )
    started = time.monotonic()

    def on_log(report: StepReport) -> None:
        shown = " ".join(f"{k} {v:.3g}" for k, v in report.metrics.items() if k.startswith("loss"))
        print(f"step {report.step}/{config.steps} {time.monotonic() - started:.0f} s {shown}", flush=True)

    for part in range(1, trial.scores + 1):
        trainer.fit({"segmentation": stream}, until=config.steps * part // trial.scores, on_log=on_log)
        score(trainer, version, trial, store / "model")


def score(trainer: Trainer, version: DatasetVersion, trial: Trial, folder: Path) -> None:
    checkpoint.export(trainer, folder)
    evaluation = evaluate(
        Predictor.load(folder),
        {"segmentation": lambda: read_samples(version, split="train", stream="segmentation")},
        EvaluateConfig(tasks=("panoptic",), split="train", object_threshold=0.5, pictures=0),
        version.taxonomy(seen_only=True),
        lambda task, done, total: None,
    )
    for name in ("PQ", "SQ", "RQ"):
        row = evaluation.value("panoptic", name)
        print(
            f"step {trainer.step}: {name} {row.value:.1f} (chance {row.chance:.1f}, {row.examples} pictures)",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("root", type=Path, help="the corpus")
    parser.add_argument("--latents", type=int, default=100)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as store:
        run(TRIALS[options.trial](options.root.resolve()), Path(store), options.latents)


if __name__ == "__main__":
    main()
