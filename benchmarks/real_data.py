"""Does the same code learn from real pictures? Two trials on corpora of your own, end to end on one machine.

    python -m benchmarks.real_data overfit PATH/coco       8 photographs by heart: PQ >= 85
    python -m benchmarks.real_data nuclei PATH/nuclei      microscopy: falling loss, rising PQ

Each builds a dataset version with Ray Data, trains without tracking, and scores by the evaluator.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import ray
from PIL import Image

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
from schemas.masks import Array, area_and_bbox, rgb_to_ids
from xdecoder.inference.evaluator import evaluate
from xdecoder.inference.predictor import Predictor
from xdecoder.prompts import Vocabulary
from xdecoder.training import checkpoint
from xdecoder.training.trainer import StepReport, Trainer

# of the picture: what is smaller has no mask at a quarter of 192 pixels, whoever predicts it
LEAST_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is read, at which size it is learnt, for how long, and how often it is scored on the way."""

    corpus: CorpusConfig
    side: int
    latents: int
    batch: int
    steps: int
    scale: tuple[float, float]
    flip: float
    scores: int


def _panoptic(name: str, folder: Path) -> CorpusConfig:
    return CorpusConfig(
        name=name,
        format="coco_panoptic",
        split="train",
        root=str(folder),
        images="images",
        annotations="panoptic.json",
        labels="panoptic",
    )


def overfit(root: Path, folder: Path) -> Trial:
    """The first 8 photographs with several things, all large: no augmentation, scored on themselves."""
    corpus = _panoptic("photos", folder)
    _select(root, folder, 8)
    return Trial(corpus=corpus, side=192, latents=20, batch=8, steps=300, scale=(1, 1), flip=0, scores=4)


def _select(root: Path, folder: Path, count: int) -> None:
    """Copy the photographs of the trial, with their label maps and a JSON of their own."""
    labels = root / "panoptic_things_derived"
    document = json.loads((root / "annotations" / "panoptic_things_derived.json").read_text())
    images = {image["id"]: image for image in document["images"]}

    def large(annotation: dict[str, Any]) -> bool:
        image, segments = images[annotation["image_id"]], annotation["segments_info"]
        least = LEAST_SHARE * image["height"] * image["width"]
        return len(segments) > 1 and all(segment["area"] >= least for segment in segments)

    chosen = [annotation for annotation in document["annotations"] if large(annotation)][:count]
    kept = [images[annotation["image_id"]] for annotation in chosen]
    for source, target, names in (
        (root / "images", folder / "images", [image["file_name"] for image in kept]),
        (labels, folder / "panoptic", [annotation["file_name"] for annotation in chosen]),
    ):
        target.mkdir(parents=True)
        for name in names:
            shutil.copy(source / name, target / name)
    (folder / "panoptic.json").write_text(json.dumps(document | {"images": kept, "annotations": chosen}))


def nuclei(root: Path, folder: Path) -> Trial:
    """Microscopy in tiles, as is usual where a picture has a hundred cells; scored on its training tiles."""
    corpus = _panoptic("nuclei", folder)
    _tile(root, folder, 128)
    return Trial(
        corpus=corpus, side=192, latents=40, batch=8, steps=400, scale=(0.8, 1.5), flip=0.5, scores=4
    )


def _tile(root: Path, folder: Path, side: int) -> None:
    """Cut every picture and its label map into squares, in the format that they came in."""
    document = json.loads((root / "panoptic.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for kind in ("images", "panoptic"):
        (folder / kind).mkdir(parents=True)
    for annotation in document["annotations"]:
        picture = Image.open(root / "images" / names[annotation["image_id"]]).convert("RGB")
        codes = Image.open(root / "panoptic" / annotation["file_name"]).convert("RGB")
        category = {segment["id"]: segment["category_id"] for segment in annotation["segments_info"]}
        for top, left in product(range(0, picture.height, side), range(0, picture.width, side)):
            window = (left, top, min(left + side, picture.width), min(top + side, picture.height))
            tile = len(images) + 1
            name = f"{tile:05d}.png"
            picture.crop(window).save(folder / "images" / name)
            codes.crop(window).save(folder / "panoptic" / name)
            ids = rgb_to_ids(np.asarray(codes.crop(window)))
            segments = [_segment(ids == i, int(i), category[int(i)]) for i in np.unique(ids) if i]
            images.append({"id": tile, "file_name": name, "height": ids.shape[0], "width": ids.shape[1]})
            annotations.append({"image_id": tile, "file_name": name, "segments_info": segments})
    tiled = document | {"images": images, "annotations": annotations}
    (folder / "panoptic.json").write_text(json.dumps(tiled))


def _segment(mask: Array, number: int, category: int) -> dict[str, Any]:
    area, box = area_and_bbox(mask)
    return {"id": number, "category_id": category, "iscrowd": 0, "area": area, "bbox": list(box)}


TRIALS = {"overfit": overfit, "nuclei": nuclei}


def model_config(trial: Trial) -> ModelConfig:
    return ModelConfig(
        width=128,
        heads=4,
        ffn=512,
        decoder_layers=3,
        encoder_layers=1,
        latents=trial.latents,
        init_layers=1,
        mask_pooling=True,
        text_contexts=4,
        backbone=BackboneConfig(name="resnet10t", out_indices=(1, 2, 3)),
        text=TextConfig(layers=2, heads=4, context=24),
    )


def train_config(trial: Trial) -> TrainConfig:
    return TrainConfig(
        steps=trial.steps,
        tasks=("panoptic",),
        task_sampling=(0, 0, 1),
        batch=BatchConfig(segmentation=trial.batch, image_text=1),
        augment=AugmentConfig(image_size=trial.side, scale=trial.scale, flip=trial.flip),
        optim=OptimConfig(lr=1e-3, backbone_scale=1, text_scale=1, warmup_steps=20, schedule="poly"),
        loss=LossConfig(points=2048, region_ce=2, class_layers=2),
        log_every=25,
    )


def run(trial: Trial, store: Path) -> None:
    """Build, train, and score `trial.scores` times on the way."""
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, address="local")
    try:
        catalog = Catalog(store, "trial")
        print(build((trial.corpus,), BuildConfig(), catalog))
    finally:
        ray.shutdown()
    version = catalog.open()
    config = train_config(trial)
    trainer = Trainer(
        model_config(trial), config, Vocabulary(taxonomy=version.taxonomy(seen_only=True), answers=())
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
    for name in ("PQ", "PQ_things", "PQ_stuff"):
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as store:
        trial = TRIALS[options.trial](options.root.resolve(), Path(store) / "corpus")
        run(trial, Path(store))


if __name__ == "__main__":
    main()
