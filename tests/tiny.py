"""A tiny model and a few samples made in memory, for the tests of the model and its training.

A picture is sky over grass with two squares on it, a red and a blue or green one; everything that is said of
it follows from where they are. The line between sky and grass is void.
"""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from schemas.jobs import (
    AugmentConfig,
    BackboneConfig,
    BatchConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)
from schemas.masks import area_and_bbox, encode_rle
from schemas.records import Question, Referring, Sample, SampleMeta, Segment
from schemas.taxonomy import Category, Taxonomy
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import Vocabulary
from xdecoder.tasks import BatchMaker
from xdecoder.training.batch import Batch

torch.set_num_threads(1)  # tensors this small are slower on two

MODEL = ModelConfig(
    width=32,
    heads=2,
    ffn=64,
    decoder_layers=2,
    encoder_layers=1,
    latents=8,
    init_layers=1,
    mask_pooling=True,
    text_contexts=2,
    backbone=BackboneConfig(name="resnet10t", options={"stem_type": "", "norm_layer": "groupnorm"}),
    text=TextConfig(layers=1, heads=2, context=20),
)
COLOURS = {
    "sky": (120, 180, 255),
    "grass": (60, 160, 60),
    "red square": (230, 30, 30),
    "blue square": (30, 30, 230),
    "green square": (10, 80, 10),
}
TAXONOMY = Taxonomy(
    name="tiny", categories=tuple(Category(name=name, isthing="square" in name) for name in COLOURS)
)
VOCABULARY = Vocabulary(taxonomy=TAXONOMY, answers=("yes", "no", "blue", "green"))


def train_config(**changes: Any) -> TrainConfig:
    """32-pixel views without chance, four samples a stream and step."""
    settings: dict[str, Any] = {
        "steps": 6,
        "batch": BatchConfig(segmentation=4, image_text=4),
        "augment": AugmentConfig(image_size=32, scale=(1, 1), flip=0, image_text_size=32),
        "optim": OptimConfig(
            lr=1e-3, backbone_scale=1, text_scale=1, warmup_steps=0, schedule="constant", weight_decay=0.01
        ),
        "loss": LossConfig(points=64, region_ce=1, nouns=1),
        "log_every": 1,
    }
    return TrainConfig(**(settings | changes))


def model(seed: int = 0, **changes: Any) -> XDecoder:
    torch.manual_seed(seed)
    return XDecoder(MODEL.model_copy(update=changes)).eval()


def samples(count: int = 4, *, height: int = 32, width: int = 32) -> list[Sample]:
    """Samples with every annotation there is, no two alike (up to eight)."""
    return [_sample(i, height, width) for i in range(count)]


def bare(sample: Sample, *fields: str) -> Sample:
    """The sample with these fields of its annotation alone."""
    empty: dict[str, Any] = {"segments": None, "referring": (), "captions": (), "questions": ()}
    meta = sample.meta.model_copy(update={k: v for k, v in empty.items() if k not in fields})
    return Sample(meta=meta, image=sample.image, labels=sample.labels if "segments" in fields else None)


def endless(
    make: BatchMaker, of: Sequence[Sample], size: int = 4, position: int = 0
) -> Iterator[tuple[Batch, int]]:
    """A stream over samples in memory: seeds and order follow from the position."""
    while True:
        places = range(position, position + size)
        position += size
        yield make([of[i % len(of)] for i in places], list(places)), position


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _sample(i: int, height: int, width: int) -> Sample:
    other = ("blue square", "green square")[i % 2]
    left, low, horizon = bool(i // 2 % 2), bool(i // 4 % 2), height // 2 + (i % 3) * height // 16
    labels = np.full((height, width), 1, dtype=np.uint16)
    labels[horizon] = 0
    labels[horizon + 1 :] = 2
    side, margin = height // 4, height // 16
    top = height - side - margin if low else margin
    for place, id in (left, 3), (not left, 4):
        start = margin if place else width - side - margin
        labels[top : top + side, start : start + side] = id
    names = ("sky", "grass", "red square", other)
    palette = np.array([(90, 90, 90), *(COLOURS[name] for name in names)], dtype=np.uint8)
    where = "left" if left else "right"
    return Sample(
        meta=SampleMeta(
            key=f"tiny-{i}",
            split="train",
            height=height,
            width=width,
            sha256=f"{i:064x}",
            taxonomy="tiny",
            segments=tuple(_segment(labels, id, name) for id, name in enumerate(names, 1)),
            referring=tuple(
                Referring(sentences=sentences, mask=encode_rle(labels == id))
                for id, sentences in ((3, (f"the {where} square", "red square")), (4, (other,)))
            ),
            captions=(f"a red square {where} of a {other} {'on grass' if low else 'in the sky'}",),
            questions=(
                Question(question="is red left?", answers=("yes" if left else "no",) * 10, kind="is"),
                Question(question="what color is it?", answers=(other.split()[0],) * 10, kind="what color"),
            ),
        ),
        image=palette[labels],
        labels=labels,
    )


def _segment(labels: np.ndarray[Any, Any], id: int, name: str) -> Segment:
    area, bbox = area_and_bbox(labels == id)
    return Segment(id=id, category=name, isthing="square" in name, area=area, bbox=bbox)
