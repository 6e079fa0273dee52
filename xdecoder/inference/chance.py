"""What the best answer scores that ignores the image, for each task: the figure to print beside a model's.

Each constant answer is chosen on the evaluation set itself, so it is a little better than anything that could
be chosen beforehand, and it is scored by the same metrics. Results are keyed like the metric's own. No model
and no file is read.

`samples` are gone through twice where a constant has to be found first, so they must be a list or something
that starts anew for each loop, not a generator.

Letters: K classes, G side of the common grid, H W pixels.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from schemas.masks import Array, decode_rle
from schemas.records import Sample
from schemas.taxonomy import Taxonomy
from xdecoder.inference.metrics import (
    MaskAP,
    MeanIoU,
    PanopticQuality,
    ReferringIoU,
    Scores,
    Truth,
    truth_of,
)
from xdecoder.inference.postprocess import Instances, PanopticMap, PredictedSegment
from xdecoder.inference.text_metrics import (
    RANKS,
    CaptionScores,
    References,
    VqaAccuracy,
    bleu,
    bleu_row,
    set_f1,
)
from xdecoder.inference.wording import ClassNames, normalise_answer, words

GRID = 128  # G: pictures of all sizes are compared on G x G cells
CAPTION_CANDIDATES = 200


def panoptic(samples: Iterable[Sample], taxonomy: Taxonomy) -> Scores:
    """PQ of one map for all: the most frequent class of each cell, the cells of a class one segment."""
    samples = _again(samples)
    constant, metric = most_frequent_map(samples, taxonomy), PanopticQuality(taxonomy)
    for truth in _truths(samples, taxonomy):
        classes, labels = np.unique(_fit(constant, truth.labels.shape), return_inverse=True)
        segments = (
            PredictedSegment(id=i, label=int(c), score=1.0, isthing=taxonomy.categories[c].isthing)
            for i, c in enumerate(classes, 1)
        )
        labels = (labels.reshape(truth.labels.shape) + 1).astype(np.int32)
        metric.update(PanopticMap(labels=labels, segments=tuple(segments)), truth)
    return metric.compute()


def semantic(samples: Iterable[Sample], taxonomy: Taxonomy) -> Scores:
    """mIoU of one map for all: the most frequent class of each cell."""
    samples = _again(samples)
    constant, metric = most_frequent_map(samples, taxonomy), MeanIoU(taxonomy)
    for truth in _truths(samples, taxonomy):
        metric.update(_fit(constant, truth.labels.shape), truth)
    return metric.compute()


def instance(samples: Iterable[Sample], taxonomy: Taxonomy) -> Scores:
    """AP of one mask for each thing class: the cells where the class stands at least half as often as
    anywhere.
    """
    samples = _again(samples)
    counts, metric = class_counts(samples, taxonomy), MaskAP(taxonomy)
    peaks = counts.max((1, 2))
    labels = np.array(
        [i for i, c in enumerate(taxonomy.categories) if c.isthing and peaks[i]], dtype=np.int64
    )
    labels = labels[np.argsort(-peaks[labels], kind="stable")]
    masks = counts[labels] >= np.maximum(peaks[labels, None, None], 1) / 2
    scores = (peaks[labels] / max(peaks.max(), 1)).astype(np.float32)
    for truth in _truths(samples, taxonomy):
        fitted = np.array([_fit(m, truth.labels.shape) for m in masks]).reshape(-1, *truth.labels.shape)
        metric.update(Instances(labels=labels, scores=scores, masks=fitted.astype(bool)), truth)
    return metric.compute()


def referring(samples: Iterable[Sample]) -> Scores:
    """Expected IoUs of a random thing of the image (of a random referred region where the image has no
    segments).
    """
    metric = ReferringIoU()
    for sample in samples:
        if not sample.meta.referring:
            continue
        truth = np.stack([decode_rle(r.mask) for r in sample.meta.referring])
        choices = _things(sample, truth)
        both = np.einsum("thw,chw->tc", truth, choices, dtype=np.float64)
        either = truth.sum((1, 2))[:, None] + choices.sum((1, 2)) - both
        iou = both / np.maximum(either, 1)
        expected = np.stack([both.mean(1), either.mean(1), iou.mean(1), (iou > 0.5).mean(1)], axis=1)
        phrases = np.array([len(r.sentences) for r in sample.meta.referring], dtype=np.float64)
        metric.load({"rows": np.append(phrases @ expected, phrases.sum())[None]})
    return metric.compute()


def retrieval(num_images: int, owner: Array) -> Scores:
    """Recall of a random order of the gallery: owner int[T] is the image of each text."""
    scores = {f"text_to_image_R{k}": 100 * min(1.0, k / num_images) for k in RANKS}
    own = np.bincount(owner)  # texts of each image
    for k in RANKS:
        drawn = min(k, len(owner))
        missed = [
            math.comb(len(owner) - n, drawn) / math.comb(len(owner), drawn) for n in own[own > 0].tolist()
        ]
        scores[f"image_to_text_R{k}"] = 100 * (1 - float(np.mean(missed)))
    return scores


def captioning(samples: Iterable[Sample], names: Sequence[str], seed: int = 0) -> Scores:
    """F1 of the best constant set of classes (found greedily), BLEU-4 of the best of 200 references as a
    constant caption. The two need not be the same caption.
    """
    references = [sample.meta.captions for sample in samples if sample.meta.captions]
    if not references:
        return CaptionScores(names).compute()
    return {"F1": _constant_f1(references, names), "BLEU4": _constant_bleu(references, seed)}


def vqa(samples: Iterable[Sample]) -> Scores:
    """Accuracy of the most frequent answer of each kind of question."""
    asked = [sample.meta.questions for sample in samples if sample.meta.questions]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in (q for questions in asked for q in questions):
        answers[question.kind].update(map(normalise_answer, question.answers))
    best = {kind: max(sorted(counts), key=counts.__getitem__, default="") for kind, counts in answers.items()}
    metric = VqaAccuracy(list(best))
    for questions in asked:
        metric.update([best[q.kind] for q in questions], questions)
    return metric.compute()


def class_counts(samples: Iterable[Sample], taxonomy: Taxonomy) -> Array:
    """int64[K, G, G]: in how many images each cell has each class (crowds as their class, void as none)."""
    counts = np.zeros((len(taxonomy.names), GRID, GRID), dtype=np.int64)
    for truth in _truths(samples, taxonomy):
        cells = _fit(truth.class_map(), (GRID, GRID))
        for label in np.unique(cells[cells >= 0]):
            counts[label] += cells == label
    return counts


def most_frequent_map(samples: Iterable[Sample], taxonomy: Taxonomy) -> Array:
    """int64[G, G]: the most frequent class of each cell; that of all cells together where a cell is always
    void.
    """
    counts = class_counts(samples, taxonomy)
    return np.where(counts.any(0), counts.argmax(0), counts.sum((1, 2)).argmax())


def _constant_f1(references: Sequence[Sequence[str]], names: Sequence[str]) -> float:
    finder = ClassNames(names)
    named = [frozenset().union(*map(finder.named, captions)) for captions in references]

    def score(guess: frozenset[str]) -> float:
        return 100 * float(np.mean([set_f1(guess, true) for true in named]))

    best: frozenset[str] = frozenset()
    while len(best) < len(names):
        longer = max((best | {n} for n in names if n not in best), key=score)
        if score(longer) <= score(best):
            break
        best = longer
    return score(best)


def _constant_bleu(references: Sequence[Sequence[str]], seed: int) -> float:
    texts = [References.of(captions) for captions in references]
    candidates = sorted({caption for captions in references for caption in captions})
    if len(candidates) > CAPTION_CANDIDATES:
        candidates = (
            np.random.default_rng(seed).choice(candidates, CAPTION_CANDIDATES, replace=False).tolist()
        )
    return max(bleu(np.sum([bleu_row(words(c), true) for true in texts], axis=0)) for c in candidates)


def _things(sample: Sample, referred: Array) -> Array:
    """bool[n, H, W]: the things of the sample but crowds; the referred regions where there are none."""
    segments = sample.meta.segments or ()
    ids = [s.id for s in segments if s.isthing and not s.iscrowd]
    return np.stack([sample.labels == i for i in ids]) if ids and sample.labels is not None else referred


def _truths(samples: Iterable[Sample], taxonomy: Taxonomy) -> Iterable[Truth]:
    return (truth_of(sample, taxonomy) for sample in samples if sample.meta.segments is not None)


def _again(samples: Iterable[Sample]) -> Iterable[Sample]:
    if iter(samples) is samples:
        raise ValueError(
            "samples are gone through twice: give a list, or something that starts anew for each loop"
        )
    return samples


def _fit(cells: Array, size: tuple[int, ...]) -> Array:
    """Nearest neighbour, cell centres: [a, b] -> [H, W]."""
    rows, cols = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, cells.shape, strict=True))
    return cells[rows[:, None], cols]
