"""Laws of the metrics: equal to plain formulas and official tools, additive, strict on bad input."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from schemas.masks import encode_rle
from schemas.records import Question, Sample, SampleMeta, Segment
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference.metrics import (
    MaskAP,
    MeanIoU,
    Metric,
    PanopticQuality,
    ReferringIoU,
    Truth,
    TruthSegment,
    truth_of,
)
from xdecoder.inference.postprocess import Instances, PanopticMap, PredictedSegment
from xdecoder.inference.text_metrics import CaptionScores, RetrievalRecall, VqaAccuracy, vqa_accuracy
from xdecoder.inference.wording import ClassNames, normalise_answer

TAXONOMY = Taxonomy(
    name="tiny",
    categories=(
        Category(name="red circle", isthing=True),
        Category(name="hot dog", isthing=True),
        Category(name="dog", isthing=True, seen=False),
        Category(name="grass-merged", isthing=False),
        Category(name="sky", isthing=False),
    ),
)
THINGS = [c.isthing for c in TAXONOMY.categories]


def truth_map(rows: list[str], segments: list[tuple[int, int, bool]]) -> Truth:
    """A truth drawn in digits; segments are (id, class, iscrowd)."""
    labels = np.array([[int(d) for d in row] for row in rows], dtype=np.uint16)
    return Truth(
        labels=labels, segments=tuple(TruthSegment(id=i, label=c, iscrowd=k) for i, c, k in segments)
    )


def pred_map(rows: list[str], classes: list[int]) -> PanopticMap:
    labels = np.array([[int(d) for d in row] for row in rows], dtype=np.int32)
    segments = (
        PredictedSegment(id=i, label=c, score=1.0, isthing=THINGS[c]) for i, c in enumerate(classes, 1)
    )
    return PanopticMap(labels=labels, segments=tuple(segments))


def random_truth(rng: np.random.Generator) -> Truth:
    """Blocks of segments with void and, sometimes, a crowd; stuff of a class once."""
    labels = rng.integers(0, 6, size=(6, 8)).repeat(5, 0).repeat(5, 1).astype(np.uint16)
    classes = [int(rng.integers(0, 3)), int(rng.integers(0, 3)), 0, 3, 4]
    present = [i for i in range(1, 6) if (labels == i).any()]
    return Truth(
        labels=labels,
        segments=tuple(
            TruthSegment(id=i, label=classes[i - 1], iscrowd=bool(i == 3 and rng.random() < 0.5))
            for i in present
        ),
    )


def noisy(truth: Truth, rng: np.random.Generator) -> PanopticMap:
    """A prediction near the truth: pixels shifted, some classes wrong, crowds taken for one thing."""
    labels = np.roll(truth.labels, rng.integers(0, 3), axis=1).astype(np.int32)
    labels[rng.random(labels.shape) < 0.2] = rng.integers(0, 6)
    classes = {s.id: s.label if rng.random() < 0.8 else int(rng.integers(0, 5)) for s in truth.segments}
    present = [int(i) for i in np.unique(labels) if i]
    segments = (
        PredictedSegment(
            id=i, label=classes.get(i, 0), score=float(rng.random()), isthing=THINGS[classes.get(i, 0)]
        )
        for i in present
    )
    return PanopticMap(labels=labels, segments=tuple(segments))


def perfect(truth: Truth) -> PanopticMap:
    """The truth as a prediction."""
    segments = (
        PredictedSegment(id=s.id, label=s.label, score=1.0, isthing=THINGS[s.label]) for s in truth.segments
    )
    return PanopticMap(labels=truth.labels.astype(np.int32), segments=tuple(segments))


def random_instances(truth: Truth, rng: np.random.Generator) -> Instances:
    """Shifted true masks, crowds among them, with random scores and some wrong classes, best first."""
    masks = np.stack([np.roll(truth.labels == s.id, rng.integers(0, 3), 1) for s in truth.segments])
    labels = np.array([s.label if rng.random() < 0.8 else rng.integers(0, 3) for s in truth.segments])
    things = np.array(THINGS)[labels]
    scores = np.sort(rng.random(things.sum()).round(1).astype(np.float32))[::-1]  # rounded: ties occur
    return Instances(labels=labels[things].astype(np.int64), scores=scores, masks=masks[things])


# --------------------------------------------------------------------------------------------------- panoptic


def plain_pq(pairs: list[tuple[PanopticMap, Truth]], classes: range | list[int]) -> dict[str, float]:
    """PQ of Kirillov et al. with panopticapi's void and crowd rules, by loops over masks."""
    found = []
    for label in classes:
        ious, fp, fn = [], 0, 0
        for pred, truth in pairs:
            void = truth.labels == 0
            crowd = np.isin(truth.labels, [s.id for s in truth.segments if s.iscrowd and s.label == label])
            true = [truth.labels == s.id for s in truth.segments if s.label == label and not s.iscrowd]
            guess = [pred.labels == s.id for s in pred.segments if s.label == label]
            taken = set()
            for t in true:
                hit = [(g, (t & m).sum() / (t | (m & ~void)).sum()) for g, m in enumerate(guess)]
                hit = [(g, iou) for g, iou in hit if iou > 0.5]
                taken.update(g for g, _ in hit)
                ious.extend(iou for _, iou in hit)
                fn += not hit
            fp += sum(
                g not in taken and (m & (void | crowd)).sum() / m.sum() <= 0.5 for g, m in enumerate(guess)
            )
        if ious or fp or fn:
            found.append(
                (sum(ious) / (len(ious) + fp / 2 + fn / 2), len(ious) / (len(ious) + fp / 2 + fn / 2))
            )
    return {"PQ": 100 * np.mean([f[0] for f in found]), "RQ": 100 * np.mean([f[1] for f in found])}


def random_pairs(count: int) -> list[tuple[PanopticMap, Truth]]:
    rng = np.random.default_rng(5)
    truths = [random_truth(rng) for _ in range(count)]
    return [(noisy(t, rng), t) for t in truths]


def test_pq_equals_the_plain_formula() -> None:
    pairs = random_pairs(30)
    metric = PanopticQuality(TAXONOMY)
    for pair in pairs:
        metric.update(*pair)
    scores, plain = metric.compute(), plain_pq(pairs, range(5))
    assert 10 < plain["PQ"] < 90, "the case must be neither perfect nor hopeless"
    assert (scores["PQ"], scores["RQ"]) == pytest.approx((plain["PQ"], plain["RQ"]))
    assert scores["PQ_things"] == pytest.approx(plain_pq(pairs, [0, 1, 2])["PQ"])
    assert scores["PQ_stuff"] == pytest.approx(plain_pq(pairs, [3, 4])["PQ"])
    assert metric.compute(classes=[2])["PQ"] == pytest.approx(plain_pq(pairs, [2])["PQ"])
    assert math.isnan(metric.compute(classes=[2])["PQ_stuff"])
    assert metric.examples == 30


# truth rows, truth segments, prediction rows, predicted classes, expected row of class 0: iou sum, tp, fp, fn
PQ_CASES = {
    "exact": (["1100"], [(1, 0, False)], ["1100"], [0], [1, 1, 0, 0]),
    "IoU of exactly one half is no match": (
        ["1133"],
        [(1, 0, False), (3, 4, False)],
        ["1000"],
        [0],
        [0, 0, 1, 1],
    ),
    "void is outside the union": (["1100"], [(1, 0, False)], ["1111"], [0], [1, 1, 0, 0]),
    "mostly on void is no false positive": (["3000"], [(3, 4, False)], ["1111"], [0], [0, 0, 0, 0]),
    "half on void is a false positive": (["3300"], [(3, 4, False)], ["1111"], [0], [0, 0, 1, 0]),
    "on a crowd of its class": (["1113"], [(1, 0, True), (3, 4, False)], ["1111"], [0], [0, 0, 0, 0]),
    "on a crowd of another class": (["1113"], [(1, 1, True), (3, 4, False)], ["1111"], [0], [0, 0, 1, 0]),
    "crowd and void together": (["1033"], [(1, 0, True), (3, 4, False)], ["1110"], [0], [0, 0, 0, 0]),
    "a crowd is never missed": (["1133"], [(1, 0, True), (3, 4, False)], ["0000"], [], [0, 0, 0, 0]),
    "wrong class": (["1100"], [(1, 0, False)], ["1100"], [1], [0, 0, 0, 1]),
    "nothing predicted": (["1122"], [(1, 0, False), (2, 0, False)], ["0000"], [], [0, 0, 0, 2]),
}


@pytest.mark.parametrize("name", PQ_CASES)
def test_pq_cases(name: str) -> None:
    true_rows, segments, pred_rows, classes, expected = PQ_CASES[name]
    metric = PanopticQuality(TAXONOMY)
    metric.update(pred_map(pred_rows, classes), truth_map(true_rows, segments))
    assert metric.export()["rows"][0, 0].tolist() == pytest.approx(expected)


def test_pq_does_not_depend_on_numbering() -> None:
    (pred, truth), *_ = random_pairs(1)
    swap = np.array([0, 5, 4, 3, 2, 1])
    renamed = PanopticMap(
        labels=swap[pred.labels].astype(np.int32),
        segments=tuple(
            PredictedSegment(id=int(swap[s.id]), label=s.label, score=0, isthing=s.isthing)
            for s in pred.segments
        ),
    )
    rows = []
    for p in (pred, renamed):
        metric = PanopticQuality(TAXONOMY)
        metric.update(p, truth)
        rows.append(metric.export()["rows"])
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (pred_map(["1200"], [0]), "predicted map has segments"),
        (pred_map(["1000"], [0, 1]), "predicted map has segments"),
        (pred_map(["100"], [0]), "resize the prediction"),
    ],
)
def test_pq_refuses_maps_that_do_not_fit(pred: PanopticMap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanopticQuality(TAXONOMY).update(pred, truth_map(["1100"], [(1, 0, False)]))


# ----------------------------------------------------------------------------------------- semantic, instance


def test_mean_iou_equals_the_plain_formula() -> None:
    rng = np.random.default_rng(1)
    metric, maps = MeanIoU(TAXONOMY), []
    for _ in range(5):
        truth = random_truth(rng)
        pred = rng.integers(0, 5, truth.labels.shape)
        metric.update(pred, truth)
        maps.append(
            (
                pred,
                np.array(
                    [-1, *(next((s.label for s in truth.segments if s.id == i), -1) for i in range(1, 6))]
                )[truth.labels],
            )
        )
    pred, true = (np.concatenate([m[i].ravel() for m in maps]) for i in (0, 1))
    pred, true = pred[true >= 0], true[true >= 0]
    ious = [
        ((pred == c) & (true == c)).sum() / ((pred == c) | (true == c)).sum()
        for c in range(5)
        if (true == c).any()
    ]
    assert metric.compute()["mIoU"] == pytest.approx(100 * np.mean(ious))


def test_mean_iou_counts_crowds_and_leaves_out_void_and_absent_classes() -> None:
    metric = MeanIoU(TAXONOMY)
    metric.update(np.array([[0, 0, 4, 1]]), truth_map(["1120"], [(1, 0, True), (2, 4, False)]))
    assert metric.compute() == {"mIoU": 100}
    assert math.isnan(metric.compute(classes=[1])["mIoU"])


def official_ap(pairs: list[tuple[Instances, Truth]]) -> tuple[float, float]:
    """COCOeval over all images at once."""
    true, guess = [], []
    for image, (pred, truth) in enumerate(pairs):
        for s in truth.segments:
            if THINGS[s.label]:
                mask = truth.labels == s.id
                true.append(
                    {
                        "image_id": image,
                        "category_id": s.label,
                        "iscrowd": int(s.iscrowd),
                        "area": int(mask.sum()),
                        "mask": mask,
                    }
                )
        for label, score, mask in zip(pred.labels, pred.scores, pred.masks, strict=True):
            guess.append({"image_id": image, "category_id": int(label), "score": float(score), "mask": mask})
    for number, a in enumerate(true + guess, 1):
        rle = encode_rle(a.pop("mask"))
        a |= {"id": number, "segmentation": {"size": list(rle.size), "counts": rle.counts.encode()}}
    coco = COCO()
    size = dict(zip(("height", "width"), pairs[0][1].labels.shape, strict=True))
    coco.dataset = {
        "images": [{"id": i, **size} for i in range(len(pairs))],
        "annotations": true,
        "categories": [{"id": c} for c in range(5)],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(guess), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0], 100 * evaluation.stats[1]


def instance_pairs(count: int) -> list[tuple[Instances, Truth]]:
    rng = np.random.default_rng(2)
    truths = [random_truth(rng) for _ in range(count)]
    return [(random_instances(t, rng), t) for t in truths]


def test_ap_equals_cocoeval_and_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = instance_pairs(25)
    metric = MaskAP(TAXONOMY)
    for pair in pairs:
        metric.update(*pair)
    scores = metric.compute()
    assert capsys.readouterr().out == ""
    official = official_ap(pairs)
    assert 5 < official[0] < 95
    assert (scores["AP"], scores["AP50"]) == pytest.approx(official)


def test_ap_weights_count_an_image_that_many_times() -> None:
    pairs, weights = instance_pairs(6), [2, 0, 1, 3, 1, 1]
    metric = MaskAP(TAXONOMY)
    for pair in pairs:
        metric.update(*pair)
    repeated = [pair for pair, w in zip(pairs, weights, strict=True) for _ in range(w)]
    assert metric.compute(np.array(weights))["AP"] == pytest.approx(official_ap(repeated)[0])


def test_ap_of_nothing_predicted_is_zero_and_without_truth_undefined() -> None:
    (_, truth), *_ = instance_pairs(1)
    none = Instances(
        labels=np.zeros(0, np.int64), scores=np.zeros(0, np.float32), masks=np.zeros((0, 30, 40), bool)
    )
    metric = MaskAP(TAXONOMY)
    metric.update(none, truth)
    assert metric.compute() == {"AP": 0, "AP50": 0}
    empty = MaskAP(TAXONOMY)
    empty.update(none, Truth(labels=np.zeros((30, 40), np.uint16), segments=()))
    assert math.isnan(empty.compute()["AP"]) and empty.examples == 1


def test_referring_iou_by_hand() -> None:
    metric = ReferringIoU()
    truth = np.array([[[1, 1, 0, 0]], [[0, 0, 1, 1]]], dtype=bool)
    metric.update(np.array([[[1, 1, 1, 0]], [[0, 0, 0, 1]]], dtype=bool), truth)  # 2/3 and exactly 1/2
    assert metric.compute() == pytest.approx({"cIoU": 60, "mIoU": 100 * (2 / 3 + 1 / 2) / 2, "P_0.5": 50})
    assert metric.examples == 2
    with pytest.raises(ValueError, match="resize the prediction"):
        metric.update(truth[:1], truth)


def test_truth_of_names_the_sample_and_what_is_wrong() -> None:
    segment = Segment(id=1, category="sky", isthing=False, area=4, bbox=(0, 0, 2, 2))
    meta = SampleMeta(key="a-1", split="val", height=2, width=2, sha256="", segments=(segment,))
    image, labels = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.uint16)
    assert truth_of(Sample(meta=meta, image=image, labels=labels), TAXONOMY).segments[0].label == 4
    with pytest.raises(ValueError, match="a-1.*no label map"):
        truth_of(Sample(meta=meta, image=image, labels=None), TAXONOMY)
    strange = meta.model_copy(update={"segments": (segment.model_copy(update={"category": "moon"}),)})
    with pytest.raises(ValueError, match="a-1.*moon.*tiny"):
        truth_of(Sample(meta=strange, image=image, labels=labels), TAXONOMY)


# -------------------------------------------------------------------------------------------------- retrieval


def test_recall_equals_sorting_when_there_are_no_ties() -> None:
    rng = np.random.default_rng(0)
    similarity, owner = rng.random((12, 30)), rng.integers(0, 12, 30)
    owner[:12] = np.arange(12)
    similarity[owner, np.arange(30)] += 0.3
    metric = RetrievalRecall()
    metric.update(similarity, owner)
    scores = metric.compute()
    for k in (1, 5, 10):
        texts = [owner[t] in np.argsort(-similarity[:, t])[:k] for t in range(30)]
        images = [
            bool(set(np.argsort(-similarity[i])[:k]) & set(np.flatnonzero(owner == i))) for i in range(12)
        ]
        assert scores[f"text_to_image_R{k}"] == pytest.approx(100 * np.mean(texts))
        assert scores[f"image_to_text_R{k}"] == pytest.approx(100 * np.mean(images))
    assert metric.examples == 30


def test_recall_bounds_and_pessimistic_ties() -> None:
    best, flat = RetrievalRecall(), RetrievalRecall()
    best.update(np.eye(20), np.arange(20))
    flat.update(np.ones((20, 20)), np.arange(20))
    assert set(best.compute().values()) == {100}
    assert set(flat.compute().values()) == {0}


def test_recall_does_not_depend_on_the_order_of_the_gallery() -> None:
    rng = np.random.default_rng(0)
    similarity, images, texts = rng.random((9, 9)), rng.permutation(9), rng.permutation(9)
    one, two = RetrievalRecall(), RetrievalRecall()
    one.update(similarity, np.arange(9))
    two.update(similarity[images][:, texts], np.argsort(images)[texts])
    assert one.compute() == pytest.approx(two.compute())


def test_recall_refuses_what_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match="not finite"):
        RetrievalRecall().update(np.full((2, 2), np.nan), np.arange(2))
    with pytest.raises(ValueError, match="owner must name an image"):
        RetrievalRecall().update(np.eye(2), np.array([0, 2]))


# --------------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two red circles on grass.", {"red circle", "grass-merged"}),
        ("a red circle, and a dog", {"red circle", "dog"}),
        ("a hot dog under the skies", {"hot dog", "sky"}),
        ("hot dogs and dogs", {"hot dog", "dog"}),
        ("a red square and a circle", set()),
        ("doghouse", set()),
        ("", set()),
    ],
)
def test_names_in_a_text(text: str, expected: set[str]) -> None:
    assert ClassNames(TAXONOMY.names).named(text) == expected


def test_names_of_any_class_list() -> None:
    names = ClassNames(
        ["person", "knife", "wine glass", "sofa, couch", "bus", "skis", "wall-other-merged", "cross", "car"]
    )
    said = names.named(
        "People with knives, wine-glasses and buses; a couch and a ski by the walls. No crosses, take care!"
    )
    assert said == {
        "person",
        "knife",
        "wine glass",
        "sofa, couch",
        "bus",
        "skis",
        "wall-other-merged",
        "cross",
    }


def test_the_longest_name_is_meant() -> None:
    assert ClassNames(["dog", "dog house", "hot dog"]).named("a dog house and a hot dog") == {
        "dog house",
        "hot dog",
    }


def test_bleu_by_hand() -> None:
    """Papineni et al., as the COCO toolkit sums it: two captions, clipped counts, closest length."""
    metric = CaptionScores([])
    metric.update(
        "the the the cat sat", ["The cat sat down.", "a cat sat on the mat"]
    )  # lengths 5; 4 or 6: the shorter
    metric.update("a red circle on grass", ["a red circle on the grass"])
    # hits n=1: min(3,1)+1+1 = 3, and 5; n=2: "the cat", "cat sat" = 2, and 3; n=3: "the cat sat" = 1, and 2;
    # n=4: 0, and 1
    precision = (8 / 10) * (5 / 8) * (3 / 6) * (1 / 4)
    assert metric.compute()["BLEU4"] == pytest.approx(100 * precision**0.25 * 1)  # 10 words against 4 + 6


def test_brevity_penalty() -> None:
    metric = CaptionScores([])
    metric.update("a b c d", ["a b c d e"])
    assert metric.compute()["BLEU4"] == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_caption_bounds() -> None:
    right, wrong = CaptionScores(TAXONOMY.names), CaptionScores(TAXONOMY.names)
    text = "two red circles and a dog on grass"
    right.update(text, [text, "dogs"])
    wrong.update("", [text])
    assert right.compute() == pytest.approx({"F1": 100, "BLEU4": 100})
    assert wrong.compute() == {"F1": 0, "BLEU4": 0}
    with pytest.raises(ValueError, match="no references"):
        right.update(text, [])


def test_f1_is_over_sets() -> None:
    metric = CaptionScores(TAXONOMY.names)
    metric.update(
        "a dog and a red circle", ["dogs on grass", "three dogs under the sky"]
    )  # 1 of 2 named, 1 of 3 found
    assert metric.compute()["F1"] == pytest.approx(100 * 2 / 5)


# -------------------------------------------------------------------------------------------------------- VQA


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two.", "2"),
        ("a red circle", "red circle"),
        ("  The   Dog ", "dog"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("don't know!", "don't know"),
        ("red, blue", "red blue"),
        ("2:50 pm", "2:50 pm"),
        ("none", "0"),
        ("t-shirt", "t shirt"),
    ],
)
def test_normalised_answers(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(agree: int, expected: float) -> None:
    assert vqa_accuracy("two", ["2"] * agree + ["7"] * (10 - agree)) == pytest.approx(expected)


def test_vqa_accuracy_of_few_people() -> None:
    assert vqa_accuracy("yes", ["yes"]) == 1
    assert vqa_accuracy("yes", ["no"]) == vqa_accuracy("yes", []) == 0
    assert vqa_accuracy("yes", ["yes", "yes"]) == 1


def question(kind: str, *answers: str) -> Question:
    return Question(question="?", answers=answers, kind=kind)


def test_vqa_by_kind() -> None:
    metric = VqaAccuracy(["how many", "color"])
    metric.update(["2", "red"], [question("how many", "two"), question("color", "blue")])
    metric.update(["blue"], [question("color", "blue")])
    assert metric.compute() == pytest.approx(
        {"accuracy": 200 / 3, "accuracy/color": 50, "accuracy/how many": 100}
    )
    assert metric.examples == 3
    with pytest.raises(ValueError, match="'why' is none of"):
        metric.update(["so"], [question("why", "so")])


# ---------------------------------------------------------------------------------------- laws of all metrics


def filled(name: str, part: slice) -> Metric:
    """A metric of each kind over some of the same eight random images."""
    rng = np.random.default_rng(7)
    if name == "panoptic":
        panoptic = PanopticQuality(TAXONOMY)
        for pair in random_pairs(8)[part]:
            panoptic.update(*pair)
        return panoptic
    if name == "semantic":
        semantic = MeanIoU(TAXONOMY)
        for _, truth in random_pairs(8)[part]:
            semantic.update(np.full(truth.labels.shape, 3), truth)
        return semantic
    if name == "instance":
        instance = MaskAP(TAXONOMY)
        for instances, truth in instance_pairs(8)[part]:
            instance.update(instances, truth)
        return instance
    if name == "referring":
        referring = ReferringIoU()
        for masks in (rng.random((8, 2, 3, 4, 5)) < 0.7)[part]:
            referring.update(*masks)
        return referring
    if name == "captioning":
        captions = CaptionScores(TAXONOMY.names)
        for number in range(8)[part]:
            captions.update(
                f"a dog and {number % 3} red circles on grass", ["a dog and 2 red circles on sand"]
            )
        return captions
    answers = VqaAccuracy(["a", "b"])
    for number in range(8)[part]:
        answers.update(["yes"], [question("ab"[number % 2], *("yes" if number % 3 else "no",) * 10)])
    return answers


NAMES = ["panoptic", "semantic", "instance", "referring", "captioning", "vqa"]


@pytest.mark.parametrize("name", NAMES)
def test_merged_halves_equal_the_whole(name: str, tmp_path) -> None:
    whole, first, second = filled(name, slice(None)), filled(name, slice(0, 3)), filled(name, slice(3, None))
    np.savez(tmp_path / "rows.npz", **second.export())
    with np.load(tmp_path / "rows.npz") as arrays:
        first.load(arrays)
    assert first.compute() == pytest.approx(whole.compute(), nan_ok=True)
    weights = np.arange(8)
    assert first.compute(weights) == pytest.approx(whole.compute(weights), nan_ok=True)
    assert first.examples == whole.examples == 8 * (3 if name == "referring" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_two_is_the_image_twice_and_of_zero_is_its_absence(name: str) -> None:
    whole, twice = filled(name, slice(None)), filled(name, slice(1, None))
    twice.load(filled(name, slice(2, 3)).export())
    weights = np.array([0, 1, 2, 1, 1, 1, 1, 1])
    assert whole.compute(weights) == pytest.approx(twice.compute(), nan_ok=True)
    assert whole.compute(np.ones(8)) == pytest.approx(whole.compute(), nan_ok=True)


@pytest.mark.parametrize("name", NAMES)
def test_bad_weights_are_refused_and_nothing_seen_is_nan(name: str) -> None:
    metric = filled(name, slice(None))
    for weights in (np.ones(7), np.full(8, -1)):
        with pytest.raises(ValueError, match="weights must be 8 numbers"):
            metric.compute(weights)
    empty = filled(name, slice(0, 0))
    assert empty.examples == 0 and all(math.isnan(v) for v in empty.compute().values())


def test_rows_of_another_taxonomy_are_refused() -> None:
    small = Taxonomy(name="small", categories=TAXONOMY.categories[:2])
    with pytest.raises(ValueError, match="do not fit"):
        PanopticQuality(small).load(filled("panoptic", slice(None)).export())


def test_the_truth_itself_scores_100() -> None:
    metric, semantic, instance = PanopticQuality(TAXONOMY), MeanIoU(TAXONOMY), MaskAP(TAXONOMY)
    for _, truth in random_pairs(6):
        metric.update(perfect(truth), truth)
        of_id = np.zeros(6, dtype=np.int64)
        for s in truth.segments:
            of_id[s.id] = s.label
        semantic.update(of_id[truth.labels], truth)
        things = [s for s in truth.segments if THINGS[s.label] and not s.iscrowd]
        masks = np.array([truth.labels == s.id for s in things]).reshape(len(things), *truth.labels.shape)
        labels = np.array([s.label for s in things], dtype=np.int64)
        instance.update(Instances(labels=labels, scores=np.ones(len(things), np.float32), masks=masks), truth)
    assert set(metric.compute().values()) == {100}
    assert semantic.compute() == {"mIoU": 100}
    assert instance.compute() == pytest.approx({"AP": 100, "AP50": 100})
