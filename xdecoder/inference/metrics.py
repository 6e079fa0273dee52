"""Scores of masks: semantic, panoptic, instance and referring. Scores of words stand in `text_metrics`.

Every metric keeps something per image, so that the results of two ranks are merged by concatenation, a whole
evaluation is stored with `np.savez`, and a score can be recomputed for any weighting of the images (paired
bootstrap over images). Nothing here runs a model or reads a file.

    metric.update(...)          one image (retrieval: the whole gallery)
    metric.examples             how many were scored: images, phrases, texts or questions, as each class says
    metric.export()             {name: array}, for np.savez or another process
    metric.load(arrays)         appends what another one exported
    metric.compute(weights)     {score name: percent}, nan where nothing was there to score

Letters: N images, K classes of the taxonomy, H W pixels, P phrases.
"""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from schemas.masks import Array, encode_rle
from schemas.records import Sample
from schemas.taxonomy import Taxonomy
from xdecoder.inference.postprocess import Instances, PanopticMap

Scores = dict[str, float]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO
RECALLS = np.linspace(0, 1, 101)  # COCO


class Metric(Protocol):
    """What the evaluator may rely on, whatever the task."""

    @property
    def examples(self) -> int: ...
    def export(self) -> dict[str, Array]: ...
    def load(self, arrays: Mapping[str, Array]) -> None: ...
    def compute(self, weights: Array | None = None) -> Scores: ...


class Rows:
    """Rows of numbers, one an image (of detections: one a detection), merged by concatenation."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self._parts: list[Array] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def array(self) -> Array:
        """float64[N, *shape]."""
        self._parts = [np.concatenate([np.zeros((0, *self.shape)), *self._parts])]
        return self._parts[0]

    def append(self, row: Array) -> None:
        self.extend(np.asarray(row)[None])

    def extend(self, rows: Array) -> None:
        """Raises `ValueError` where the rows are of another shape, that is of another taxonomy or metric."""
        if rows.shape[1:] != self.shape:
            raise ValueError(f"rows of shape {rows.shape[1:]} do not fit a metric with rows of {self.shape}")
        self._parts.append(rows.astype(np.float64))
        self._num_rows += len(rows)

    def total(self, weights: Array | None = None) -> Array:
        """float64[*shape], the sum over images, each times its weight (>= 0; 1 where none are given)."""
        rows = self.array
        return rows.sum(0) if weights is None else np.tensordot(_checked(weights, len(rows)), rows, axes=1)


@dataclass(frozen=True, kw_only=True)
class TruthSegment:
    """One annotated segment: its pixel value, class index, and whether it is a crowd."""

    id: int
    label: int
    iscrowd: bool = False


@dataclass(frozen=True, kw_only=True)
class Truth:
    """labels int[H, W], the id of the segment at each pixel, 0 void; `segments` lists every id once."""

    labels: Array
    segments: tuple[TruthSegment, ...]

    def class_map(self) -> Array:
        """int64[H, W]: the class at each pixel, that of crowds too; -1 where void."""
        of_id = np.full(int(self.labels.max(initial=0)) + 1, -1)
        for segment in self.segments:
            of_id[segment.id] = segment.label
        return of_id[self.labels]


def truth_of(sample: Sample, taxonomy: Taxonomy) -> Truth:
    """The panoptic truth of a sample, classes as indices into the taxonomy.

    Raises `ValueError` where the sample has no label map or names a class that the taxonomy lacks.
    """
    if sample.labels is None or sample.meta.segments is None:
        raise ValueError(f"sample {sample.key!r} has no label map: it cannot be scored on segmentation")
    index = {name: i for i, name in enumerate(taxonomy.names)}
    unknown = sorted({s.category for s in sample.meta.segments} - index.keys())
    if unknown:
        raise ValueError(
            f"sample {sample.key!r} has classes {unknown} that taxonomy {taxonomy.name!r} lacks; "
            f"it has {taxonomy.names}"
        )
    segments = (
        TruthSegment(id=s.id, label=index[s.category], iscrowd=s.iscrowd) for s in sample.meta.segments
    )
    return Truth(labels=sample.labels, segments=tuple(segments))


class PanopticQuality:
    """PQ, SQ, RQ and PQ of things and of stuff, by the rules of panopticapi. Example: an image.

    Rows float64[K, 4]: sum of IoU, true positives, false positives, false negatives.
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self._rows = Rows(len(taxonomy.names), 4)

    @property
    def examples(self) -> int:
        return len(self._rows)

    def update(self, pred: PanopticMap, truth: Truth) -> None:
        """Raises `ValueError` where the maps differ in size or hold an id that is not listed."""
        self._rows.append(panoptic_row(pred, truth, len(self.taxonomy.names)))

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None, classes: Sequence[int] | None = None) -> Scores:
        """{PQ, SQ, RQ, PQ_things, PQ_stuff}: means over the classes (of the subset) that occur at all."""
        iou, tp, fp, fn = self._rows.total(weights).T
        weight = tp + fp / 2 + fn / 2
        chosen = _subset(classes, len(iou)) & (weight > 0)
        things = np.array([c.isthing for c in self.taxonomy.categories])
        pq, rq, sq = _ratio(iou, weight), _ratio(tp, weight), np.nan_to_num(_ratio(iou, tp))
        return {
            "PQ": _mean(pq[chosen]),
            "SQ": _mean(sq[chosen]),
            "RQ": _mean(rq[chosen]),
            "PQ_things": _mean(pq[chosen & things]),
            "PQ_stuff": _mean(pq[chosen & ~things]),
        }


class MeanIoU:
    """mIoU of a class map. Example: an image.

    Void pixels are not scored. A crowd segment counts as its class, as in COCO's stuff conversion: a pixel of
    a crowd of people is a person.

    Rows float64[K, 3]: pixels in the intersection, in the truth, in the prediction.
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self._rows = Rows(len(taxonomy.names), 3)

    @property
    def examples(self) -> int:
        return len(self._rows)

    def update(self, pred: Array, truth: Truth) -> None:
        """pred int[H, W] in [0, K). Raises `ValueError` where the maps differ in size."""
        _same_size(pred, truth.labels)
        num_classes = len(self.taxonomy.names)
        true = truth.class_map()
        true, guess = true[true >= 0], pred[true >= 0]
        counts = [np.bincount(c, minlength=num_classes) for c in (true[true == guess], true, guess)]
        self._rows.append(np.stack(counts, axis=1))

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None, classes: Sequence[int] | None = None) -> Scores:
        """{mIoU}: the mean over the classes (of the subset) that occur in the truth."""
        both, true, guess = self._rows.total(weights).T
        return {"mIoU": _mean(_ratio(both, true + guess - both)[_subset(classes, len(true)) & (true > 0)])}


class MaskAP:
    """COCO mask AP (all areas, 100 detections a class and image), matched by pycocotools. Example: an image.

    Kept per image: float64[K] the number of true things that are no crowd, and a row for each detection:
    image, class, score, then for each of the ten IoU thresholds 1 matched, 0 not, -1 ignored (on a crowd).
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self._things = np.array([c.isthing for c in taxonomy.categories])
        self._truths = Rows(len(taxonomy.names))
        self._detections = Rows(3 + len(IOU_THRESHOLDS))

    @property
    def examples(self) -> int:
        return len(self._truths)

    def update(self, pred: Instances, truth: Truth) -> None:
        """Stuff in the truth is left out. Raises `ValueError` where the masks differ in size."""
        _same_size(pred.masks[:1], truth.labels[None][: len(pred.masks)])
        things = [s for s in truth.segments if self._things[s.label]]
        true = [
            _annotation(i, s.label, truth.labels == s.id, iscrowd=s.iscrowd) for i, s in enumerate(things)
        ]
        columns = zip(pred.labels.tolist(), pred.masks, pred.scores.tolist(), strict=True)
        guess = [_annotation(i, label, mask, score=score) for i, (label, mask, score) in enumerate(columns)]
        image = self.examples
        self._truths.append(
            np.bincount([s.label for s in things if not s.iscrowd], minlength=len(self._things))
        )
        for matched in _coco_matches(true, guess):
            self._detections.append(np.concatenate([[image], matched]))

    def export(self) -> dict[str, Array]:
        return {"truths": self._truths.array, "detections": self._detections.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        shift = np.zeros(self._detections.shape)
        shift[0] = self.examples
        self._detections.extend(arrays["detections"] + shift)
        self._truths.extend(arrays["truths"])

    def compute(self, weights: Array | None = None, classes: Sequence[int] | None = None) -> Scores:
        """{AP, AP50}: means over the classes (of the subset) with truth."""
        weight = np.ones(self.examples) if weights is None else _checked(weights, self.examples)
        truths, rows = weight @ self._truths.array, self._detections.array
        chosen = np.flatnonzero(_subset(classes, len(truths)) & (truths > 0))
        precision = [_average_precision(rows[rows[:, 1] == c], weight, truths[c]) for c in chosen]
        table = np.array(precision).reshape(len(chosen), len(IOU_THRESHOLDS))
        return {"AP": _mean(table.mean(1)), "AP50": _mean(table[:, 0])}


class ReferringIoU:
    """cIoU, mIoU and P@0.5 of referred masks. Example: a phrase.

    Rows float64[5], sums over the phrases of an image: intersection, union, IoU, IoU > 0.5, phrases.
    """

    def __init__(self) -> None:
        self._rows = Rows(5)

    @property
    def examples(self) -> int:
        return round(self._rows.total()[4])

    def update(self, pred: Array, truth: Array) -> None:
        """pred, truth bool[P, H, W]: one mask a phrase. Raises `ValueError` where they differ in shape."""
        _same_size(pred, truth)
        both, either = (pred & truth).sum((1, 2)), (pred | truth).sum((1, 2))
        iou = np.where(either > 0, both / np.maximum(either, 1), 1.0)  # nothing found where nothing is: right
        self._rows.append(np.array([both.sum(), either.sum(), iou.sum(), (iou > 0.5).sum(), len(pred)]))

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None) -> Scores:
        """{cIoU, mIoU, P_0.5}: cIoU sums the pixels of all phrases, the others give each phrase one vote."""
        both, either, iou, hits, phrases = self._rows.total(weights)
        return {
            "cIoU": percent(both, either),
            "mIoU": percent(iou, phrases),
            "P_0.5": percent(hits, phrases),
        }


def panoptic_row(pred: PanopticMap, truth: Truth, num_classes: int) -> Array:
    """float64[K, 4], sum of IoU, TP, FP, FN of one image, by panopticapi's rules.

    A pair of one class with IoU > 0.5 is a match; pixels of the prediction on void are outside the union. A
    prediction that lies to more than half on void or on a crowd of its class is no false positive; a crowd is
    never missed.
    """
    pixels = _intersections(pred, truth)  # int64[truth ids, predicted ids]
    areas_true, areas_pred = pixels.sum(1), pixels.sum(0)
    row = np.zeros((num_classes, 4))
    matched: set[int] = set()
    free = pixels[0].copy()  # pixels of each predicted segment that may not count against it
    for true in truth.segments:
        same = [p.id for p in pred.segments if p.label == true.label]
        if true.iscrowd:
            free[same] += pixels[true.id, same]
            continue
        union = areas_true[true.id] + areas_pred[same] - pixels[true.id, same] - pixels[0, same]
        iou = _ratio(pixels[true.id, same], union)
        hit = np.flatnonzero(iou > 0.5)[:1]
        row[true.label] += [iou[hit].sum(), len(hit), 0, 1 - len(hit)]
        matched.update(same[i] for i in hit)
    for guess in pred.segments:
        if guess.id not in matched and free[guess.id] / areas_pred[guess.id] <= 0.5:
            row[guess.label, 2] += 1
    return row


def _annotation(
    index: int, label: int, mask: Array, *, iscrowd: bool = False, score: float = 1.0
) -> dict[str, Any]:
    rle = encode_rle(mask)
    return {
        "id": index + 1,  # 0 means "no match" to COCOeval
        "image_id": 1,
        "category_id": label,
        "segmentation": {"size": list(rle.size), "counts": rle.counts.encode("ascii")},
        "area": int(mask.sum()),
        "iscrowd": int(iscrowd),
        "ignore": int(iscrowd),
        "score": score,
    }


def _coco(annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    labels = sorted({a["category_id"] for a in annotations})
    image = {"id": 1, "height": None, "width": None}  # read by annToRLE, but not needed for run lengths
    coco.dataset = {"images": [image], "annotations": annotations, "categories": [{"id": k} for k in labels]}
    coco.createIndex()
    return coco


def _coco_matches(true: list[dict[str, Any]], guess: list[dict[str, Any]]) -> Array:
    """float64[D, 2 + 10] of one image: class, score, outcome at each threshold as `MaskAP` keeps it."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(true), _coco(guess), "segm")
        params = evaluation.params
        params.imgIds, params.catIds = [1], sorted({a["category_id"] for a in true + guess})
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        evaluation.evaluate()
    rows = [np.zeros((0, 2 + len(IOU_THRESHOLDS)))]
    for found in filter(None, evaluation.evalImgs):
        outcome = np.where(found["dtIgnore"], -1, found["dtMatches"] > 0).T
        scores = np.array(found["dtScores"])[:, None]
        rows.append(np.concatenate([np.full_like(scores, found["category_id"]), scores, outcome], axis=1))
    return np.concatenate(rows)


def _average_precision(rows: Array, weight: Array, truths: float) -> Array:
    """float64[10] in [0, 1]: COCO's 101-point precision of one class, detections weighted by their image."""
    rows = rows[np.argsort(-rows[:, 2], kind="stable")]
    counts = weight[rows[:, 0].astype(int)][:, None]
    right = np.cumsum(counts * (rows[:, 3:] == 1), axis=0)
    wrong = np.cumsum(counts * (rows[:, 3:] == 0), axis=0)
    precision = right / np.maximum(right + wrong, np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    padded = np.concatenate([envelope, np.zeros((1, envelope.shape[1]))])
    recall = (right / truths).T
    return np.array([padded[np.searchsorted(r, RECALLS), t].mean() for t, r in enumerate(recall)])


def _intersections(pred: PanopticMap, truth: Truth) -> Array:
    """int64[truth ids, predicted ids], the pixels that two segments share; row 0 is void."""
    _same_size(pred.labels, truth.labels)
    height = max([0, int(truth.labels.max(initial=0)), *(s.id for s in truth.segments)]) + 1
    width = max([0, int(pred.labels.max(initial=0)), *(s.id for s in pred.segments)]) + 1
    pairs = truth.labels.astype(np.int64) * width + pred.labels
    pixels = np.bincount(pairs.ravel(), minlength=height * width).reshape(height, width)
    for whose, areas, segments in (
        ("true", pixels.sum(1), truth.segments),
        ("predicted", pixels.sum(0), pred.segments),
    ):
        drawn, listed = set(np.flatnonzero(areas).tolist()) - {0}, {s.id for s in segments}
        if drawn != listed:
            raise ValueError(f"{whose} map has segments {sorted(drawn)}, but {sorted(listed)} are listed")
    return pixels


def _same_size(pred: Array, truth: Array) -> None:
    if pred.shape != truth.shape:
        raise ValueError(
            f"prediction is {pred.shape}, truth is {truth.shape}: resize the prediction to the original first"
        )


def _checked(weights: Array, num_images: int) -> Array:
    if weights.shape != (num_images,) or not (weights >= 0).all():
        raise ValueError(f"weights must be {num_images} numbers >= 0, one an image, got {weights!r:.200}")
    return weights


def _subset(classes: Sequence[int] | None, num_classes: int) -> Array:
    return (
        np.ones(num_classes, dtype=bool)
        if classes is None
        else np.isin(np.arange(num_classes), list(classes))
    )


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)


def _mean(fractions: Array) -> float:
    return 100 * float(fractions.mean()) if fractions.size else math.nan


def harmonic(seen: float, unseen: float) -> float:
    """2 S U / (S + U), the harmonic mean of GZS3; zero where both are zero."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def percent(part: float, whole: float) -> float:
    """100 part / whole; nan where there is nothing to divide by."""
    return 100 * float(part / whole) if whole else math.nan
