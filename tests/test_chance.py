"""Chance levels by hand on tiny sets, and against what a constant or random answer really scores."""

import numpy as np
import pytest

from schemas.masks import area_and_bbox, encode_rle
from schemas.records import Question, Referring, Sample, SampleMeta, Segment
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference import chance
from xdecoder.inference.metrics import ReferringIoU
from xdecoder.inference.text_metrics import CaptionScores, RetrievalRecall

TAXONOMY = Taxonomy(
    name="tiny",
    categories=(
        Category(name="dog", isthing=True),
        Category(name="cat", isthing=True),
        Category(name="sky", isthing=False),
        Category(name="sea", isthing=False),
    ),
)
NAMES = TAXONOMY.names


def sample(labels: np.ndarray | None = None, classes: tuple[int, ...] = (), **fields: object) -> Sample:
    """A sample whose label map holds segments 1.. of these classes."""
    if labels is not None:
        fields["segments"] = tuple(
            Segment(
                id=i,
                category=NAMES[c],
                isthing=TAXONOMY.categories[c].isthing,
                area=area_and_bbox(labels == i)[0],
                bbox=area_and_bbox(labels == i)[1],
            )
            for i, c in enumerate(classes, 1)
        )
    height, width = (8, 8) if labels is None else labels.shape
    meta = SampleMeta(key="s", split="val", height=height, width=width, sha256="", **fields)
    return Sample(meta=meta, image=np.zeros((height, width, 3), np.uint8), labels=labels)


def halves(upper: int, lower: int, size: tuple[int, int] = (8, 8)) -> Sample:
    """A picture of two classes, one above the other."""
    labels = np.ones(size, dtype=np.uint16)
    labels[size[0] // 2 :] = 2
    return sample(labels, (upper, lower))


def test_pictures_that_are_all_alike_need_no_model() -> None:
    samples = [halves(2, 0, size) for size in ((8, 8), (20, 12), (300, 200))]
    assert chance.panoptic(samples, TAXONOMY)["PQ"] == 100
    assert chance.semantic(samples, TAXONOMY) == {"mIoU": 100}
    assert chance.instance(samples, TAXONOMY) == pytest.approx({"AP": 100, "AP50": 100})


def test_the_majority_is_right_as_often_as_it_occurs() -> None:
    samples = [halves(2, 3), halves(2, 3), halves(3, 2)]
    # sky above, sea below: of 3 segments a class 2 match fully, 1 true and 1 predicted do not
    assert chance.panoptic(samples, TAXONOMY)["PQ"] == pytest.approx(100 * 2 / (2 + 1))
    assert chance.semantic(samples, TAXONOMY)["mIoU"] == pytest.approx(100 * 2 / 4)


def test_void_is_no_class_of_the_constant_map() -> None:
    labels = np.zeros((8, 8), np.uint16)
    labels[0, 0] = 1
    samples = [sample(labels, (3,)), sample(labels.copy(), (3,)), halves(2, 0)]
    constant = chance.most_frequent_map(samples, TAXONOMY)
    assert constant[0, 0] == 3 and constant[-1, 0] == 0 and constant[0, -1] == 2


def test_an_instance_is_predicted_where_its_class_stands_half_as_often_as_at_its_peak() -> None:
    often, seldom = np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint16)
    often[:4, :4] = seldom[:, :] = 1
    samples = [sample(often, (0,))] * 2 + [sample(seldom, (0,))]
    # the peak is 3, elsewhere 1: the constant mask is the corner, right in two of three images
    expected = (
        100 * 67 / 101
    )  # precision 1 at recalls 0, 0.01 ... 0.66: all scores are equal, the miss is last
    assert chance.instance(samples, TAXONOMY) == pytest.approx({"AP": expected, "AP50": expected})


def test_stuff_is_no_instance() -> None:
    assert np.isnan(chance.instance([halves(2, 3)], TAXONOMY)["AP"])


def test_referring_equals_the_mean_over_many_random_draws() -> None:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(4):
        labels = rng.integers(0, 4, (4, 4)).repeat(3, 0).repeat(3, 1).astype(np.uint16)
        labels[0, :3] = (1, 2, 3)
        masks = [labels == 1, (labels == 1) | (labels == 2)]
        refs = tuple(
            Referring(sentences=("a", "b")[: i + 1], mask=encode_rle(m)) for i, m in enumerate(masks)
        )
        samples.append(sample(labels, (0, 1, 2), referring=refs))
    metric = ReferringIoU()
    for _ in range(2000):
        for s in samples:
            truth = np.stack([s.labels == 1, *[(s.labels == 1) | (s.labels == 2)] * 2])
            guess = np.stack([s.labels == i for i in rng.integers(1, 3, 3)])  # segment 3 is stuff
            metric.update(guess, truth)
    assert chance.referring(samples) == pytest.approx(metric.compute(), rel=0.03)


def test_referring_never_draws_a_crowd() -> None:
    labels = np.ones((8, 8), dtype=np.uint16)
    labels[4:] = 2
    both = sample(labels, (0, 1), referring=(Referring(sentences=("x",), mask=encode_rle(labels == 1)),))
    first, second = both.meta.segments
    crowd = both.meta.model_copy(update={"segments": (first, second.model_copy(update={"iscrowd": True}))})
    assert chance.referring([both])["mIoU"] == 50
    assert chance.referring([Sample(meta=crowd, image=both.image, labels=labels)])["mIoU"] == 100


def test_referring_without_segments_draws_among_the_referred_regions() -> None:
    left = np.zeros((8, 8), bool)
    left[:, :4] = True
    refs = tuple(Referring(sentences=("x",), mask=encode_rle(m)) for m in (left, ~left))
    assert chance.referring([sample(referring=refs), sample()])["mIoU"] == 50


def test_retrieval_equals_the_mean_over_random_galleries() -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), 2)
    runs = []
    for _ in range(400):
        metric = RetrievalRecall()
        metric.update(rng.random((12, 24)), owner)
        runs.append(metric.compute())
    expected = chance.retrieval(12, owner)
    assert expected["text_to_image_R1"] == pytest.approx(100 / 12)
    assert {k: np.mean([r[k] for r in runs]) for k in expected} == pytest.approx(expected, rel=0.1)
    assert set(chance.retrieval(1, np.array([0])).values()) == {100}


def test_captioning_takes_the_best_constant() -> None:
    texts = ["a dog under the sky", "a dog under the sky", "a cat by the sea"]
    samples = [sample(captions=(text,)) for text in texts] + [sample()]
    scores = chance.captioning(samples, NAMES)
    assert scores["F1"] == pytest.approx(100 * 2 / 3)
    metric = CaptionScores(NAMES)
    for text in texts:
        metric.update(texts[0], (text,))
    assert scores == pytest.approx(metric.compute())
    assert all(np.isnan(v) for v in chance.captioning([sample()], NAMES).values())


def test_vqa_takes_the_most_frequent_answer_of_each_kind() -> None:
    def asked(kind: str, answer: str) -> Question:
        return Question(question="?", kind=kind, answers=(answer,) * 10)

    samples = [
        sample(questions=(asked("how many", "two"), asked("is there a", "no"))),
        sample(questions=(asked("how many", "2"), asked("is there a", "no"))),
        sample(questions=(asked("how many", "1"), asked("is there a", "yes"), asked("is there a", "no"))),
    ]
    scores = chance.vqa(samples)
    assert scores == pytest.approx(
        {"accuracy": 500 / 7, "accuracy/how many": 200 / 3, "accuracy/is there a": 75}
    )


def test_a_generator_is_refused_where_two_passes_are_needed() -> None:
    for function in (chance.panoptic, chance.semantic, chance.instance):
        with pytest.raises(ValueError, match="give a list"):
            function((s for s in [halves(2, 3)]), TAXONOMY)


def test_samples_without_truth_are_passed_over() -> None:
    assert chance.panoptic([sample(), halves(2, 3)], TAXONOMY)["PQ"] == 100
    assert np.isnan(chance.panoptic([sample()], TAXONOMY)["PQ"])
