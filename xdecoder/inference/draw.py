"""Pictures of predictions and of truths: overlays with a legend, texts under a picture, two pictures side by
side.

Numpy in, PIL images out; nothing is written. Small pictures are enlarged by a whole factor so that names can
be read. A class has the same colour in every picture of one class list, by its place there. H W are the
pixels of the picture as given.
"""

import colorsys
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from schemas.masks import Array

Colour = tuple[int, int, int]

LEAST_WIDTH = 360  # pixels of a finished picture
MOST_HEIGHT = 6 * LEAST_WIDTH  # pixels to which a narrow picture is enlarged; chosen by us
FONT = ImageFont.load_default(13)
LINE, MARGIN, SQUARE = 19, 6, 11  # pixels: a line of text, the space around it, a legend's square
OPACITY = 0.5
WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (90, 90, 90)


def colour(index: int) -> Colour:
    """The colour of the class or phrase at a place of its list.

    Hues go on by the golden angle, lightness and saturation in turn: no two of the first 16 are nearer than
    60 of 255 levels, no two of the first 40 nearer than 25.
    """
    hue, lightness = index * (5**0.5 - 1) / 2 % 1, (0.62, 0.8, 0.46)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, (1.0, 0.6)[index % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_panoptic(image: Array, labels: Array, names: Mapping[int, str], known: Sequence[str]) -> Image.Image:
    """uint8[H, W, 3], labels int[H, W], names by segment id; ids without a name (0) stay as they are.

    known    all classes, whose order gives their colours; those beyond them take the next ones
    """
    return _overlay(image, [labels == i for i in names], list(names.values()), list(names.values()), known)


def draw_semantic(image: Array, labels: Array, names: Sequence[str]) -> Image.Image:
    """uint8[H, W, 3], labels int[H, W] of class indices (negative: void), names of the classes."""
    present = [names[i] for i in np.unique(labels[labels >= 0])]
    return _overlay(image, [labels == names.index(n) for n in present], present, present, names)


def draw_instances(
    image: Array,
    masks: Array,
    names: Sequence[str],
    known: Sequence[str],
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """uint8[H, W, 3], masks bool[n, H, W] best first (the first lies on top), a name and maybe a score for
    each; `known` as in `draw_panoptic`.
    """
    texts = names if scores is None else [f"{n} {s:.2f}" for n, s in zip(names, scores, strict=True)]
    return _overlay(image, list(masks)[::-1], list(names)[::-1], list(texts)[::-1], known)


def draw_masks(image: Array, masks: Array, captions: Sequence[str]) -> Image.Image:
    """uint8[H, W, 3], masks bool[P, H, W], the phrase for each, which stands in the legend only."""
    return _overlay(image, list(masks), list(captions), [""] * len(captions), captions)


def draw_text(image: Array, lines: Sequence[str]) -> Image.Image:
    """uint8[H, W, 3] with a caption, or a question and its answer, underneath; long lines are wrapped."""
    return _over_strip(_enlarged(image), [(None, line) for line in lines])


def beside(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures on one sheet, each under its title."""
    gap = 2 * MARGIN
    size = left.width + gap + right.width, LINE + gap + max(left.height, right.height)
    sheet = Image.new("RGB", size, WHITE)
    pen = ImageDraw.Draw(sheet)
    for picture, title, x in ((left, titles[0], 0), (right, titles[1], left.width + gap)):
        pen.text((x + MARGIN, MARGIN), title, BLACK, FONT)
        sheet.paste(picture, (x, LINE + gap))
    return sheet


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), WHITE)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def _overlay(
    image: Array, masks: Sequence[Array], names: Sequence[str], texts: Sequence[str], known: Sequence[str]
) -> Image.Image:
    """Masks in the colour of their names, later ones on top, with their texts where there is room."""
    colours = {name: colour(i) for i, name in enumerate(dict.fromkeys((*known, *names)))}
    picture = _enlarged(image)
    factor = picture.width // image.shape[1]
    large = [m.repeat(factor, 0).repeat(factor, 1) for m in masks]
    pixels = np.asarray(picture).astype(np.float32)
    for mask, name in zip(large, names, strict=True):
        pixels[mask] += OPACITY * (np.array(colours[name]) - pixels[mask])
        pixels[mask & ~ndimage.binary_erosion(mask, iterations=2)] = colours[name]
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture, "RGBA")
    for mask, text in zip(large, texts, strict=True):
        _write_inside(pen, mask, text)
    times = Counter(names)
    return _over_strip(picture, [(colours[n], f"{n} x{k}" if k > 1 else n) for n, k in times.items()])


def _write_inside(pen: ImageDraw.ImageDraw, mask: Array, text: str) -> None:
    """Text at the point of the mask that is farthest from its border, if it is about as wide as the mask
    there.
    """
    width = pen.textlength(text, FONT)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    if not text or not mask.any() or 2.5 * depth.max() < width:
        return
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    left = min(max(x - width / 2, 2), mask.shape[1] - width - 3)
    box = (left - 2, y - LINE / 2 + 1, left + width + 2, y + LINE / 2 - 1)
    pen.rectangle(box, fill=(*BLACK, 150))
    pen.text((left, y - LINE / 2 + 1), text, WHITE, FONT)


def _over_strip(picture: Image.Image, entries: Iterable[tuple[Colour | None, str]]) -> Image.Image:
    """The picture with a white strip of texts under it.

    A text with a colour has a square of it in front and shares its line; one without starts a line.
    """
    width = max(picture.width, LEAST_WIDTH)
    placed: list[tuple[int, int, Colour | None, str]] = []
    x, y = MARGIN, MARGIN
    for tint, text in entries:
        indent = SQUARE + 5 if tint else 0
        for number, part in enumerate(_wrapped(text, width - 2 * MARGIN - indent)):
            needed = indent + math.ceil(FONT.getlength(part))
            if x > MARGIN and (tint is None or number or x + needed > width - MARGIN):
                x, y = MARGIN, y + LINE
            placed.append((x + indent, y, None if number else tint, part))
            x += needed + 2 * MARGIN
    strip = y + LINE + MARGIN if placed else 0
    sheet = Image.new("RGB", (width, picture.height + strip), WHITE)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for x, y, tint, part in placed:
        top = picture.height + y
        if tint:
            pen.rectangle((x - SQUARE - 5, top + 3, x - 5, top + 3 + SQUARE), fill=tint, outline=GREY)
        pen.text((x, top), part, BLACK, FONT)
    return sheet


def _wrapped(text: str, width: float) -> list[str]:
    """Lines of whole words, none wider than `width` pixels unless one word is."""
    lines: list[str] = []
    for word in text.split():
        if lines and FONT.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _enlarged(image: Array) -> Image.Image:
    """By a whole factor, so that masks enlarged likewise fit exactly: to LEAST_WIDTH pixels or more, unless
    that were more than MOST_HEIGHT pixels high.
    """
    factor = max(1, min(math.ceil(LEAST_WIDTH / image.shape[1]), MOST_HEIGHT // image.shape[0]))
    size = image.shape[1] * factor, image.shape[0] * factor
    return Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
