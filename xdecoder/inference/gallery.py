"""One picture a task: what the model says beside what is true, for people to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from schemas.masks import decode_rle
from schemas.records import Sample
from xdecoder.inference import draw
from xdecoder.inference.exams import Sitting

TITLES = ("truth", "prediction")


def panoptic(sitting: Sitting, sample: Sample) -> Image.Image:
    config = sitting.config
    result = sitting.predictor.panoptic(
        [sample.image],
        sitting.taxonomy.seen(),
        object_threshold=config.object_threshold,
        overlap_threshold=config.overlap_threshold,
    )[0]
    return draw.beside(_truth(sample, result.names), result.draw(), TITLES)


def semantic(sitting: Sitting, sample: Sample) -> Image.Image:
    result = sitting.predictor.semantic([sample.image], sitting.taxonomy.seen())[0]
    return draw.beside(_truth(sample, result.names), result.draw(), TITLES)


def instance(sitting: Sitting, sample: Sample) -> Image.Image:
    result = sitting.predictor.instance([sample.image], sitting.taxonomy.seen())[0]
    return draw.beside(_truth(sample, result.names, stuff=False), result.draw(), TITLES)


def referring(sitting: Sitting, sample: Sample) -> Image.Image:
    phrases = [r.sentences[0] for r in sample.meta.referring]
    masks = np.stack([decode_rle(r.mask) for r in sample.meta.referring])
    result = sitting.predictor.refer(sample.image, phrases)
    return draw.beside(draw.draw_masks(sample.image, masks, phrases), result.draw(), TITLES)


def captioning(sitting: Sitting, sample: Sample) -> Image.Image:
    said = sitting.caption([sample.image])[0].text
    return draw.draw_text(sample.image, [f"says: {said}", f"true: {sample.meta.captions[0]}"])


def retrieval(sitting: Sitting, sample: Sample) -> Image.Image:
    """The picture with its own caption and how well they fit; a ranking needs the gallery and is no
    picture.
    """
    caption = sample.meta.captions[0]
    score = float(sitting.predictor.retrieve([sample.image], [caption]).scores[0, 0])
    return draw.draw_text(sample.image, [f"{score:.2f} {caption}"])


def vqa(sitting: Sitting, sample: Sample) -> Image.Image:
    results = sitting.predictor.answer(sample.image, [q.question for q in sample.meta.questions])
    pairs = zip(results, sample.meta.questions, strict=True)
    return draw.draw_text(sample.image, [f"{q.question} {r.text} (true: {q.answers[0]})" for r, q in pairs])


def _truth(sample: Sample, known: Sequence[str], *, stuff: bool = True) -> Image.Image:
    """In the colours of the prediction, whose classes are `known`."""
    assert sample.labels is not None
    names = {s.id: s.category for s in sample.meta.segments or () if stuff or s.isthing}
    return draw.draw_panoptic(sample.image, sample.labels, names, known)
