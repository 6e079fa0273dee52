"""One exam a task: show the model held-out samples, score what it says, and say what chance would score.

An exam takes the samples that have the task's annotation and returns a metric with its rows per image, the
scores to report, and the same scores of the best answer that ignores the image. Classes that have no mask in
training are void in the main scores; `panoptic` reports them on their own, with the full class list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from schemas.jobs import EvaluateConfig
from schemas.masks import Array, decode_rle
from schemas.records import Sample
from schemas.tasks import Task
from schemas.taxonomy import Taxonomy
from xdecoder.inference import chance
from xdecoder.inference.generate import Search
from xdecoder.inference.metrics import (
    MaskAP,
    MeanIoU,
    Metric,
    PanopticQuality,
    ReferringIoU,
    Scores,
    harmonic,
    truth_of,
)
from xdecoder.inference.predictor import Predictor, TextResult
from xdecoder.inference.text_metrics import CaptionScores, RetrievalRecall, VqaAccuracy
from xdecoder.inference.zeroshot import ZeroShot


@dataclass(frozen=True, kw_only=True)
class Exam:
    """What an exam found.

    metric     rows per image, for the bootstrap
    scores     name -> value, the headline first
    chance     the same names where chance is defined
    examples   how many were scored, in the metric's unit
    """

    metric: Metric
    scores: Scores
    chance: Scores
    examples: int


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a metric is made of: all classes with the unseen marked, and the kinds of question asked."""

    taxonomy: Taxonomy
    kinds: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """What every exam is given: the model, the rules, the subject, and how to tell progress."""

    predictor: Predictor
    config: EvaluateConfig
    subject: Subject
    progress: Callable[[int, int], None]

    @property
    def taxonomy(self) -> Taxonomy:
        return self.subject.taxonomy

    def caption(self, images: Sequence[Array]) -> list[TextResult]:
        search = Search(**self.config.caption.model_dump())
        return self.predictor.caption(images, max_tokens=self.config.max_caption_tokens, search=search)

    def batches(self, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
        step = self.config.batch
        return [samples[i : i + step] for i in range(0, len(samples), step)]


def panoptic(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """PQ, and what the other two task tokens do to it: the instance token forgets stuff, the semantic token
    counts.
    """
    taxonomy = sitting.taxonomy.seen()
    known = [visible(sample, taxonomy) for sample in samples]
    metric = _panoptic_quality(sitting, known, taxonomy, "panoptic")
    by_instance = _panoptic_quality(sitting, known, taxonomy, "instance").compute()
    by_semantic = _panoptic_quality(sitting, known, taxonomy, "semantic").compute()
    scores = metric.compute() | {
        "PQ_stuff_with_instance_token": by_instance["PQ_stuff"],
        "PQ_things_with_semantic_token": by_semantic["PQ_things"],
        "PQ_stuff_with_semantic_token": by_semantic["PQ_stuff"],
    }
    return Exam(
        metric=metric, scores=scores, chance=chance.panoptic(known, taxonomy), examples=metric.examples
    )


def _panoptic_quality(
    sitting: Sitting, samples: Sequence[Sample], taxonomy: Taxonomy, token: Task
) -> PanopticQuality:
    metric = PanopticQuality(taxonomy)
    for batch in sitting.batches(samples):
        results = sitting.predictor.panoptic(
            [sample.image for sample in batch],
            taxonomy,
            object_threshold=sitting.config.object_threshold,
            overlap_threshold=sitting.config.overlap_threshold,
            task=token,
        )
        for result, sample in zip(results, batch, strict=True):
            metric.update(result.map, truth_of(sample, taxonomy))
        sitting.progress(metric.examples, len(samples))
    return metric


def semantic(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """mIoU of the trained classes; then with the full class list, of seen and unseen classes and their
    harmonic mean.

    The latter three are ZegFormer's generalised zero-shot protocol (GZS3); they stand only where classes are
    unseen.
    """
    taxonomy = sitting.taxonomy.seen()
    known = [visible(sample, taxonomy) for sample in samples]
    metric = _mean_iou(sitting, known, taxonomy)
    scores = metric.compute()
    unseen = [i for i, c in enumerate(sitting.taxonomy.categories) if not c.seen]
    if unseen and not sitting.predictor.model.config.classes:  # a closed list cannot be asked for others
        predictor = sitting.predictor
        zeroshot = ZeroShot.of(sitting.config.zeroshot, predictor.model, predictor.card.image_text_size)
        general = _mean_iou(sitting, samples, sitting.taxonomy, zeroshot)
        seen = [i for i in range(len(sitting.taxonomy.names)) if i not in unseen]
        s, u = (general.compute(classes=chosen)["mIoU"] for chosen in (seen, unseen))
        scores |= {"GZS3_seen": s, "GZS3_unseen": u, "GZS3_harmonic": harmonic(s, u)}
    return Exam(
        metric=metric, scores=scores, chance=chance.semantic(known, taxonomy), examples=metric.examples
    )


def _mean_iou(
    sitting: Sitting, samples: Sequence[Sample], taxonomy: Taxonomy, zeroshot: ZeroShot | None = None
) -> MeanIoU:
    metric = MeanIoU(taxonomy)
    for batch in sitting.batches(samples):
        images = [sample.image for sample in batch]
        results = sitting.predictor.semantic(images, taxonomy, zeroshot=zeroshot)
        for result, sample in zip(results, batch, strict=True):
            metric.update(result.labels, truth_of(sample, taxonomy))
        sitting.progress(metric.examples, len(samples))
    return metric


def instance(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """Mask AP against the things of the panoptic truth."""
    taxonomy = sitting.taxonomy.seen()
    known = [visible(sample, taxonomy) for sample in samples]
    metric = MaskAP(taxonomy)
    for batch in sitting.batches(known):
        results = sitting.predictor.instance(
            [sample.image for sample in batch], taxonomy, top_k=sitting.config.instances
        )
        for result, sample in zip(results, batch, strict=True):
            metric.update(result.instances, truth_of(sample, taxonomy))
        sitting.progress(metric.examples, len(known))
    return Exam(
        metric=metric,
        scores=metric.compute(),
        chance=chance.instance(known, taxonomy),
        examples=metric.examples,
    )


def referring(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """Every sentence of every referred region."""
    metric = ReferringIoU()
    for done, sample in enumerate(samples, 1):
        pairs = [(s, decode_rle(r.mask)) for r in sample.meta.referring for s in r.sentences]
        result = sitting.predictor.refer(sample.image, [sentence for sentence, _ in pairs])
        metric.update(result.masks, np.stack([mask for _, mask in pairs]))
        sitting.progress(done, len(samples))
    return Exam(
        metric=metric, scores=metric.compute(), chance=chance.referring(samples), examples=metric.examples
    )


def retrieval(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """The first caption of each picture against all pictures."""
    texts = [sample.meta.captions[0] for sample in samples]
    owner = np.arange(len(samples))
    scores = sitting.predictor.retrieve([sample.image for sample in samples], texts).scores
    sitting.progress(len(samples), len(samples))
    metric = RetrievalRecall()
    metric.update(scores, owner)
    return Exam(
        metric=metric,
        scores=metric.compute(),
        chance=chance.retrieval(len(samples), owner),
        examples=metric.examples,
    )


def captioning(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """F1 of the things that captions name (class with its colour), and BLEU-4."""
    names = sorted(sitting.taxonomy.things)
    metric = CaptionScores(names)
    for batch in sitting.batches(samples):
        images = [sample.image for sample in batch]
        results = sitting.caption(images)
        for result, sample in zip(results, batch, strict=True):
            metric.update(result.text, sample.meta.captions)
        sitting.progress(metric.examples, len(samples))
    return Exam(
        metric=metric,
        scores=metric.compute(),
        chance=chance.captioning(samples, names),
        examples=metric.examples,
    )


def vqa(sitting: Sitting, samples: Sequence[Sample]) -> Exam:
    """VQA accuracy, overall and by kind of question."""
    metric = VqaAccuracy(sitting.subject.kinds)
    for done, sample in enumerate(samples, 1):
        results = sitting.predictor.answer(sample.image, [q.question for q in sample.meta.questions])
        metric.update([result.text for result in results], sample.meta.questions)
        sitting.progress(done, len(samples))
    return Exam(metric=metric, scores=metric.compute(), chance=chance.vqa(samples), examples=metric.examples)


def visible(sample: Sample, taxonomy: Taxonomy) -> Sample:
    """The sample with the segments of classes outside the taxonomy made void."""
    assert sample.labels is not None and sample.meta.segments is not None
    kept = tuple(s for s in sample.meta.segments if s.category in taxonomy.names)
    if len(kept) == len(sample.meta.segments):
        return sample
    labels = np.where(np.isin(sample.labels, [s.id for s in kept]), sample.labels, 0).astype(np.uint16)
    return replace(sample, labels=labels, meta=sample.meta.model_copy(update={"segments": kept}))
