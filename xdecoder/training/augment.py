"""Samples to training views: jitter, crop, flip and colour, applied to picture, masks and words together.

Letters: `H W` pixels of the sample, `S` side of the square view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from schemas.jobs import AugmentConfig
from schemas.masks import Array, decode_rle
from schemas.records import Question, Sample, Segment
from xdecoder.prompts import mirror

PAD_VALUE = 128  # grey, as detectron2 pads


@dataclass(frozen=True, kw_only=True)
class View:
    """One sample as the model will see it.

    image        uint8[S, S, 3], the picture at the top left, grey behind it
    size         height and width of the picture inside the view
    labels       uint16[S, S], 0 is void and padding; None where the sample has no label map
    masks        bool[n, S, S], one for each referred region, with its `sentences`
    """

    key: str
    image: Array
    size: tuple[int, int]
    labels: Array | None
    segments: tuple[Segment, ...]
    masks: Array
    sentences: tuple[tuple[str, ...], ...]
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """Resize to `scaled`, take the window at `corner`, mirror it or not."""

    scaled: tuple[int, int]
    corner: tuple[int, int]
    side: int
    flip: bool

    @property
    def size(self) -> tuple[int, int]:
        return (
            min(self.side, self.scaled[0] - self.corner[0]),
            min(self.side, self.scaled[1] - self.corner[1]),
        )

    def picture(self, pixels: Array) -> Array:
        """uint8[H, W, 3] -> the view, bilinear, grey behind it."""
        image = Image.fromarray(pixels)
        if image.size != self.scaled[::-1]:
            image = image.resize(self.scaled[::-1], Image.Resampling.BILINEAR)
        top, left = self.corner
        height, width = self.size
        return self._placed(np.asarray(image)[top : top + height, left : left + width], PAD_VALUE)

    def labels(self, pixels: Array) -> Array:
        """[H, W] of any type -> the view, nearest, zero behind it.

        Not by PIL, whose rounding differs between 8 and 16 bits: masks would not lie on their label map.
        """
        rows, columns = (
            _nearest(start, size, original, scaled)
            for start, size, original, scaled in zip(
                self.corner, self.size, pixels.shape, self.scaled, strict=True
            )
        )
        return self._placed(pixels.take(rows, axis=0).take(columns, axis=1), 0)

    def _placed(self, window: Array, fill: int) -> Array:
        height, width = self.size
        view = np.full((self.side, self.side, *window.shape[2:]), fill, dtype=window.dtype)
        view[:height, :width] = window[:, ::-1] if self.flip else window
        return view


@lru_cache(maxsize=64)  # asked again for each mask of a picture
def _nearest(start: int, size: int, original: int, scaled: int) -> Array:
    """Which of `original` pixels each of `size` ones shows, from `start` on of `scaled`: int64[size]."""
    return (2 * np.arange(start, start + size) + 1) * original // (2 * scaled)


def jittered(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> View:
    """Large-scale jitter, fixed square crop, flip: the view for segmentation.

    The scale is drawn from `config.scale`; the picture is resized to fit scale x image_size and a window of
    image_size is taken from it.
    """
    side = config.image_size
    height, width = sample.image.shape[:2]
    fit = rng.uniform(*config.scale) * side / max(height, width)
    scaled = (max(1, round(height * fit)), max(1, round(width * fit)))
    top, left = (int(rng.integers(0, max(0, s - side) + 1)) for s in scaled)
    geometry = _Geometry(scaled=scaled, corner=(top, left), side=side, flip=bool(rng.random() < config.flip))
    return _view(sample, geometry, config, rng)


def resized(sample: Sample, config: AugmentConfig, rng: np.random.Generator) -> View:
    """The whole picture, squeezed to a square, flipped or not: the view for image and text (X-Decoder,
    4.3).
    """
    side = config.image_text_size
    flip = bool(rng.random() < config.flip)
    geometry = _Geometry(scaled=(side, side), corner=(0, 0), side=side, flip=flip)
    return _view(sample, geometry, config, rng)


def coloured(pixels: Array, rng: np.random.Generator) -> Array:
    """Other brightness, contrast, saturation and hue, each in half of the cases: uint8[H, W, 3] -> the same.

    SSD's colour jitter as Mask2Former and OneFormer use it: brightness +-32, contrast and saturation times
    0.5 to 1.5, hue +-18 of 180; contrast before the two others or after them.
    """
    early = bool(rng.random() < 0.5)
    x = pixels.astype(np.float32)
    x = x + rng.uniform(-32, 32) if rng.random() < 0.5 else x
    x = _contrasted(x, rng) if early else x
    hsv = np.array(Image.fromarray(x.clip(0, 255).astype(np.uint8)).convert("HSV")).astype(np.float32)
    if rng.random() < 0.5:
        hsv[..., 1] = (hsv[..., 1] * rng.uniform(0.5, 1.5)).clip(0, 255)
    if rng.random() < 0.5:
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-18, 18) * 256 / 180) % 256
    x = np.array(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    x = x if early else _contrasted(x, rng)
    return x.clip(0, 255).astype(np.uint8)


def _contrasted(pixels: Array, rng: np.random.Generator) -> Array:
    return pixels * np.float32(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else pixels


def _view(sample: Sample, geometry: _Geometry, config: AugmentConfig, rng: np.random.Generator) -> View:
    image = geometry.picture(sample.image)
    if config.colour:
        inside = np.s_[: geometry.size[0], : geometry.size[1]]
        image[inside] = coloured(image[inside], rng)
    words = mirror if geometry.flip else str
    referring = sample.meta.referring
    masks = [geometry.labels(decode_rle(r.mask)) for r in referring]
    return View(
        key=sample.key,
        image=image,
        size=geometry.size,
        labels=None if sample.labels is None else geometry.labels(sample.labels),
        segments=sample.meta.segments or (),
        masks=np.array(masks, dtype=bool).reshape(-1, geometry.side, geometry.side),
        sentences=tuple(_each(words, r.sentences) for r in referring),
        captions=_each(words, sample.meta.captions),
        questions=tuple(
            q.model_copy(update={"question": words(q.question), "answers": _each(words, q.answers)})
            for q in sample.meta.questions
        ),
    )


def _each(words: Callable[[str], str], texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(words(text) for text in texts)
