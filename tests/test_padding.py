"""The law of padding: what is said of a picture or a text does not depend on what else is in the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import MODEL, VOCABULARY, model, samples
from torch import Tensor

from schemas.jobs import BackboneConfig
from schemas.masks import Array
from schemas.tasks import TASKS
from xdecoder.inference.predictor import Predictor
from xdecoder.model.decoder import PATTERNS, PatternName
from xdecoder.model.files import ModelCard
from xdecoder.model.xdecoder import XDecoder

TEXTS = ("dog", "a red square on grass", "the one that is left of both", "is it?")
SIZES = ((32, 48), (48, 16), (32, 48), (16, 64))  # canvases; each is padded a little itself
BACKBONES = {
    "group normalisation": MODEL.backbone,
    "batch normalisation": BackboneConfig(name="resnet10t", out_indices=(1, 2, 3)),
    "the mean of the whole picture": BackboneConfig(),  # FocalNet, the default
    "attention over channels": BackboneConfig(name="resnet10t", options={"block_args": {"attn_layer": "se"}}),
}


@pytest.fixture(scope="module", params=BACKBONES)
def of(request: pytest.FixtureRequest) -> XDecoder:
    made = model(backbone=BACKBONES[request.param]).requires_grad_(False)
    for module in made.backbone.modules():  # statistics that are not the initial ones
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
    return made


def pictures(of: XDecoder, sizes: tuple[tuple[int, int], ...] = SIZES) -> tuple[list[Tensor], list[Tensor]]:
    draw, grow = torch.Generator().manual_seed(0), max(1, of.stride // 16)
    images = [torch.rand(3, grow * h, grow * w, generator=draw) for h, w in sizes]
    padding = [torch.zeros(image.shape[1:], dtype=torch.bool) for image in images]
    for mask in padding:
        mask[:, -5:] = True
    return images, padding


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_pictures_and_texts_of_many_sizes_are_decoded_as_each_alone(
    of: XDecoder, pattern: PatternName
) -> None:
    images, padding = pictures(of)
    spoken = bool(PATTERNS[pattern].sees["text"])
    tasks = of.text(of.task_ids).sentence[:4]
    several = of.encode_each(images, padding)
    text = of.encode_texts(TEXTS) if spoken else None
    together = of.ask(several, pattern, torch.arange(4), tasks, text)
    masks = of.masks(together.final, several, torch.arange(4))
    for i in range(4):
        pixels = of.encode(images[i][None], padding[i][None])
        text = of.encode_texts(TEXTS[i : i + 1]) if spoken else None
        alone = of.ask(pixels, pattern, torch.tensor([0]), tasks[i : i + 1], text)
        for a, b in zip(together.predictions, alone.predictions, strict=True):
            for field in ("semantic", "image", "mask_embed"):
                close(getattr(a, field)[i], getattr(b, field)[0])
            if a.text is not None and b.text is not None:
                close(a.text[i, : b.text.shape[1]], b.text[0])
        own = of.masks(alone.final, pixels, torch.tensor([0]))[0]
        close(masks[i, :, : own.shape[1], : own.shape[2]], own)
        close(several.pooled[i], pixels.pooled[0])


def test_one_canvas_for_all_would_not_do(of: XDecoder) -> None:
    """What `encode_each` is for: in the originals' way, the border of a picture sees the batch's padding."""
    images, padding = pictures(of, SIZES[:1])
    large = torch.nn.functional.pad(images[0], (0, 64, 0, 64), value=0.5)
    outside = torch.nn.functional.pad(padding[0], (0, 64, 0, 64), value=True)
    one = of.encode(large[None], outside[None]).mask_features
    own = of.encode(images[0][None], padding[0][None]).mask_features
    assert (one[..., : own.shape[2], : own.shape[3]] - own).abs().max() > 1e-3


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def arrays() -> list[Array]:
    """Wide, high, small and like the first."""
    made = [
        samples(i + 1, height=h, width=w)[i].image for i, (h, w) in enumerate(((40, 70), (90, 50), (33, 32)))
    ]
    return [*made, made[0][::-1].copy()]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    card = ModelCard(
        model=MODEL,
        taxonomy=VOCABULARY.taxonomy,
        answers=VOCABULARY.answers,
        image_size=48,
        image_text_size=32,
    )
    return Predictor(model(1), card, batch=3)


def test_answers_to_pictures_of_many_sizes_are_those_to_each_alone(
    predictor: Predictor, arrays: list[Array]
) -> None:
    for ask in (_panoptic, _semantic, _instance, _caption):
        together = ask(predictor, arrays)
        for i, array in enumerate(arrays):
            np.testing.assert_equal(ask(predictor, [array])[0], together[i])
    texts = list(TEXTS)
    together = predictor.retrieve(arrays, texts).scores
    for i, array in enumerate(arrays):
        for n, text in enumerate(texts):
            np.testing.assert_allclose(
                predictor.retrieve([array], [text]).scores[0, 0], together[i, n], atol=1e-4
            )


def test_class_scores_and_masks_agree_as_numbers(predictor: Predictor, arrays: list[Array]) -> None:
    taxonomy = VOCABULARY.taxonomy
    for task in TASKS[:3]:
        together = list(predictor._segments(arrays, taxonomy, task))
        for (_, probs, masks, frame), array in zip(together, arrays, strict=True):
            ((_, own_probs, own_masks, own_frame),) = predictor._segments([array], taxonomy, task)
            close(probs, own_probs)
            close(masks, own_masks)
            assert frame == own_frame


def _panoptic(predictor: Predictor, images: list[Array]) -> list[Any]:
    return [r.map.labels for r in predictor.panoptic(images, object_threshold=0)]


def _semantic(predictor: Predictor, images: list[Array]) -> list[Any]:
    return [r.labels for r in predictor.semantic(images)]


def _instance(predictor: Predictor, images: list[Array]) -> list[Any]:
    return [r.instances.masks for r in predictor.instance(images, top_k=5)]


def _caption(predictor: Predictor, images: list[Array]) -> list[Any]:
    return [r.text for r in predictor.caption(images, max_tokens=5)]
