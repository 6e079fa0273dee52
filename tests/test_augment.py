"""Laws of the views: picture, labels, regions and words move together; the same seed gives the same view."""

import numpy as np
import pytest
from tiny import COLOURS, samples

from schemas.jobs import AugmentConfig
from schemas.masks import Array, encode_rle
from schemas.records import Question, Referring, Sample, SampleMeta, Segment
from xdecoder.training.augment import PAD_VALUE, View, coloured, jittered, resized

SQUARE = AugmentConfig(image_size=64, scale=(1, 1), flip=0, image_text_size=48)
FLIPPED = SQUARE.model_copy(update={"flip": 1})
WILD = AugmentConfig(image_size=48, scale=(0.3, 2.5), flip=0.5, image_text_size=40)


def blocks(height: int = 60, width: int = 90, cell: int = 15) -> Sample:
    """Blocks whose colour says which segment is there, grey 10 x id; two of them are referred to."""
    rows, columns = height // cell, width // cell
    labels = np.arange(1, rows * columns + 1, dtype=np.uint16).reshape(rows, columns)
    labels = labels.repeat(cell, 0).repeat(cell, 1)
    segment = {"category": "block", "isthing": True, "area": cell * cell, "bbox": (0, 0, 1, 1)}
    regions = [(1, ("the left block", "leftmost")), (5, ("right of it",))]
    return Sample(
        meta=SampleMeta(
            key="blocks",
            split="train",
            height=height,
            width=width,
            sha256="0" * 64,
            segments=tuple(Segment(id=i, **segment) for i in range(1, rows * columns + 1)),  # type: ignore[arg-type]
            referring=tuple(Referring(sentences=s, mask=encode_rle(labels == i)) for i, s in regions),
            captions=("one left of two",),
            questions=(Question(question="which side, Left?", answers=("left", "the right"), kind="which"),),
        ),
        image=(10 * labels.astype(np.uint8))[..., None].repeat(3, 2),
        labels=labels,
    )


def inside(view: View) -> tuple[slice, slice]:
    return slice(0, view.size[0]), slice(0, view.size[1])


def same(a: View, b: View) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("image", "labels", "masks"))
    return arrays and (a.size, a.sentences, a.captions) == (b.size, b.sentences, b.captions)


def agreement(view: View) -> float:
    """The share of pixels whose colour is that of their label; edges between blocks are blurred."""
    assert view.labels is not None
    part = inside(view)
    difference = np.abs(view.image[part][..., 0].astype(int) - 10 * view.labels[part].astype(int))
    return float((difference <= 2).mean())


@pytest.mark.parametrize("seed", range(12))
def test_labels_and_regions_stay_on_their_picture(seed: int) -> None:
    view = jittered(blocks(), WILD, np.random.default_rng(seed))
    assert view.labels is not None and view.labels.dtype == np.uint16
    assert (
        view.image.shape == (48, 48, 3) and view.labels.shape == (48, 48) and view.masks.shape == (2, 48, 48)
    )
    assert agreement(view) > 0.5
    for mask, id in zip(view.masks, (1, 5), strict=True):
        np.testing.assert_array_equal(mask, view.labels == id)


def test_only_views_of_the_right_size_agree() -> None:
    """The measure above notices labels that are one block off."""
    view = jittered(blocks(), SQUARE, np.random.default_rng(0))
    assert view.labels is not None
    off = np.roll(view.labels, 10, axis=1)
    assert agreement(view) > 0.7 > 0.5 > np.mean(10 * off[:42] == view.image[:42, :, 0])


@pytest.mark.parametrize("seed", range(6))
def test_behind_the_picture_there_is_grey_void(seed: int) -> None:
    view = jittered(blocks(), WILD, np.random.default_rng(seed))
    outside = np.ones((48, 48), dtype=bool)
    outside[inside(view)] = False
    assert view.labels is not None
    assert (view.image[outside] == PAD_VALUE).all()
    assert not view.labels[outside].any() and not view.masks[:, outside].any()
    assert (view.labels[~outside] > 0).all()


def test_flipping_flips_everything_and_the_words_for_it() -> None:
    rng = np.random.default_rng
    for make in (jittered, resized):
        plain, flipped = make(blocks(), SQUARE, rng(0)), make(blocks(), FLIPPED, rng(0))
        part = inside(plain)
        assert plain.labels is not None and flipped.labels is not None and plain.size == flipped.size
        np.testing.assert_array_equal(flipped.image[part], plain.image[part][:, ::-1])
        np.testing.assert_array_equal(flipped.labels[part], plain.labels[part][:, ::-1])
        np.testing.assert_array_equal(flipped.masks[:, *part], plain.masks[:, *part][..., ::-1])
        assert plain.sentences == (("the left block", "leftmost"), ("right of it",))
        assert flipped.sentences == (("the right block", "rightmost"), ("left of it",))
        assert flipped.captions == ("one right of two",)
        (question,) = flipped.questions
        assert (question.question, question.answers) == ("which side, Right?", ("right", "the left"))


def test_half_of_the_views_are_flipped() -> None:
    config = SQUARE.model_copy(update={"flip": 0.5})
    flips = sum(
        resized(blocks(), config, np.random.default_rng(i)).captions[0] == "one right of two"
        for i in range(200)
    )
    assert 70 < flips < 130


def test_the_same_seed_gives_the_same_view() -> None:
    views = [jittered(blocks(), WILD, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert same(views[0], views[1]) and not same(views[0], views[2])


def test_a_small_scale_shows_the_whole_picture_and_a_large_one_a_window() -> None:
    small = jittered(blocks(), WILD.model_copy(update={"scale": (0.5, 0.5)}), np.random.default_rng(0))
    assert small.size == (16, 24)  # half of 48, in the picture's own proportions
    large = jittered(blocks(), WILD.model_copy(update={"scale": (3, 3)}), np.random.default_rng(0))
    assert large.size == (48, 48)
    assert large.labels is not None and len(np.unique(large.labels)) < 24


def test_windows_reach_every_corner() -> None:
    config = WILD.model_copy(update={"scale": (2, 2), "flip": 0})
    seen: set[int] = set()
    for seed in range(60):
        labels = jittered(blocks(), config, np.random.default_rng(seed)).labels
        assert labels is not None
        seen |= set(np.unique(labels).tolist())
    assert {1, 6, 19, 24} <= seen


def still(side: int) -> AugmentConfig:
    """Nothing random: the whole picture, its long side `side`."""
    return AugmentConfig(image_size=side, scale=(1, 1), flip=0)


def test_image_text_views_are_squeezed_and_still_views_are_not() -> None:
    squeezed = resized(blocks(), SQUARE, np.random.default_rng(0))
    assert squeezed.size == (48, 48) and agreement(squeezed) > 0.5
    whole = jittered(blocks(), still(45), np.random.default_rng(0))
    assert whole.size == (30, 45) and whole.image.shape == (45, 45, 3)


def test_a_picture_of_one_size_is_not_touched() -> None:
    (sample,) = samples(1, height=64, width=64)
    view = jittered(sample, still(64), np.random.default_rng(0))
    np.testing.assert_array_equal(view.image, sample.image)
    assert view.labels is not None and sample.labels is not None
    np.testing.assert_array_equal(view.labels, sample.labels)
    sky: Array = view.image[view.labels == 1]
    assert (sky == COLOURS["sky"]).all()


def test_samples_without_labels_or_regions_stay_so() -> None:
    sample = blocks()
    meta = sample.meta.model_copy(update={"segments": None, "referring": ()})
    view = jittered(Sample(meta=meta, image=sample.image, labels=None), WILD, np.random.default_rng(0))
    assert view.labels is None and view.segments == () and view.masks.shape == (0, 48, 48)


def test_colour_changes_the_picture_alone_and_is_off_by_default() -> None:
    sample = samples(1)[0]
    vivid = SQUARE.model_copy(update={"colour": True})
    for seed in range(8):
        plain, other = (jittered(sample, c, np.random.default_rng(seed)) for c in (SQUARE, vivid))
        assert plain.labels is not None and other.labels is not None
        assert np.array_equal(plain.labels, other.labels) and np.array_equal(plain.masks, other.masks)
        assert (other.image[other.size[0] :] == PAD_VALUE).all()
    assert any(
        not np.array_equal(*(jittered(sample, c, np.random.default_rng(s)).image for c in (SQUARE, vivid)))
        for s in range(8)
    )
    assert not AugmentConfig().colour


def test_colour_stays_within_the_jitter_of_the_papers() -> None:
    """Grey has no hue and no saturation: brightness adds up to 32, contrast multiplies by 0.5 to 1.5."""
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = [coloured(grey, np.random.default_rng(seed)) for seed in range(300)]
    assert all((v == v[0, 0, 0]).all() for v in values)
    found = np.array([v[0, 0, 0] for v in values])
    assert found.min() >= 33 and found.max() <= 199 and found.min() < 60 and found.max() > 150
    assert 0.15 < (found == 100).mean() < 0.35  # a quarter meets neither of the two
