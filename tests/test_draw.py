"""Laws of the pictures: colours that are told apart, masks exactly where they are, texts inside the sheet."""

import numpy as np
import pytest
from PIL import Image

from xdecoder.inference import draw
from xdecoder.inference.draw import (
    beside,
    colour,
    draw_instances,
    draw_masks,
    draw_panoptic,
    draw_semantic,
    draw_text,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
LABELS = np.zeros((48, 64), np.int32)
LABELS[4:20, 8:40] = 1
LABELS[30:44, 30:60] = 2


KNOWN = ("dog", "grass", "unused")


def over(picture: Image.Image, image: np.ndarray = IMAGE) -> np.ndarray:
    """The part of the sheet that shows the picture, one pixel for each of the original."""
    factor = picture.width // image.shape[1]
    return np.asarray(picture)[factor // 2 : image.shape[0] * factor : factor, factor // 2 :: factor]


def test_colours_are_told_apart() -> None:
    for count, least in ((16, 60), (40, 25)):
        chosen = np.array([colour(i) for i in range(count)])
        apart = np.linalg.norm(chosen[:, None] - chosen, axis=-1)
        assert apart[~np.eye(count, dtype=bool)].min() > least
    assert len({colour(i) for i in range(1000)}) > 990


@pytest.mark.parametrize(
    "picture",
    [
        draw_panoptic(IMAGE, LABELS, {1: "dog", 2: "grass"}, KNOWN),
        draw_semantic(IMAGE, LABELS - 1, ["dog", "grass", "unused"]),
        draw_instances(IMAGE, np.stack([LABELS == 1, LABELS == 2]), ["dog", "grass"], KNOWN, [0.9, 0.4]),
        draw_masks(IMAGE, np.stack([LABELS == 1, LABELS == 2]), ["dog", "grass"]),
    ],
    ids=["panoptic", "semantic", "instances", "masks"],
)
def test_masks_are_coloured_and_all_else_is_left_as_it_was(picture: Image.Image) -> None:
    plain, drawn = over(draw_text(IMAGE, [])), over(picture)
    np.testing.assert_array_equal(drawn[LABELS == 0], plain[LABELS == 0])
    for i, name in ((1, "dog"), (2, "grass")):
        corner = tuple(np.argwhere(np.equal(LABELS, i))[0] + 1)  # away from the text in the middle
        expected = plain[corner] + draw.OPACITY * (np.array(colour(KNOWN.index(name))) - plain[corner])
        np.testing.assert_allclose(drawn[corner], expected, atol=1)
    assert picture.height > 48 * 6, "a legend stands below"


def test_the_best_instance_lies_on_top() -> None:
    both = np.ones((2, 48, 64), bool)
    top = draw_instances(IMAGE, both, ["dog", "grass"], KNOWN, [0.9, 0.4])
    edge = np.asarray(top)[0, 0]
    assert tuple(edge) == colour(KNOWN.index("dog"))


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_kept() -> None:
    assert draw_text(IMAGE, []).size == (64 * 6, 48 * 6)
    large = RNG.integers(0, 256, (300, 500, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(draw_text(large, [])), large)


@pytest.mark.parametrize(("height", "factor"), [(600, 3), (5000, 1)])
def test_a_narrow_picture_is_not_enlarged_without_end(height: int, factor: int) -> None:
    narrow = np.full((height, 2, 3), 7, np.uint8)
    picture = draw_semantic(narrow, np.zeros((height, 2), int), ["grass"])
    assert picture.width == draw.LEAST_WIDTH and picture.height < height * factor + 50
    row = np.asarray(picture)[height * factor // 2]
    assert (row.min(-1) < 255).sum() == 2 * factor, "beside it is paper"


@pytest.mark.parametrize("text", ["a very long caption " * 20, "x" * 20, "", "naïve café — ünïcode"])
def test_long_texts_are_wrapped_inside_the_sheet(text: str) -> None:
    picture = draw_text(IMAGE, [text])
    strip = np.asarray(picture)[48 * 6 :]
    assert strip[:, -draw.MARGIN :].min(initial=255) == 255, "nothing reaches the right margin"
    assert strip.min(initial=255) < 255 or not text
    assert all(draw.FONT.getlength(line) <= 200 for line in draw._wrapped(text, 200))


def test_nothing_to_draw_is_the_picture() -> None:
    empty = draw_panoptic(IMAGE, LABELS, {}, KNOWN)
    np.testing.assert_array_equal(np.asarray(empty), np.asarray(draw_text(IMAGE, [])))
    none = draw_instances(IMAGE, np.zeros((0, 48, 64), bool), [], KNOWN, [])
    np.testing.assert_array_equal(np.asarray(none), np.asarray(empty))
    draw_masks(IMAGE, np.zeros((1, 48, 64), bool), ["an empty mask is only named"])


def test_two_pictures_side_by_side() -> None:
    left, right = draw_text(IMAGE, []), draw_text(IMAGE, ["one line"])
    sheet = np.asarray(beside(left, right, ("truth", "prediction")))
    top = draw.LINE + 2 * draw.MARGIN
    np.testing.assert_array_equal(sheet[top : top + left.height, : left.width], np.asarray(left))
    np.testing.assert_array_equal(sheet[top:, -right.width :], np.asarray(right))
    assert sheet[:top, : left.width].min() < 128 and sheet[:top, -right.width :].min() < 128, (
        "both have titles"
    )
