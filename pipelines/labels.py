"""Label maps in the encodings of corpora -> runs of equal ids; from these regions, segments, index maps.

A *label place* says where a label map lies and how its ids are written. It is a place (places.py) of a PNG
with RGB ids, as COCO panoptic has them, or a JSON list: a name of `ENCODINGS`, then what that encoding needs,
for most the places of its files.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipelines import places
from pipelines.pixels import PixelsError, decode
from schemas.masks import Array, decode_rle
from schemas.records import Record, Rle, Segment

Encoding = Literal["rgb", "index", "index_from_0", "class_object", "masks"]
Load = Callable[[str], Image.Image]

# ADE20K's full form is customarily kept as 16-bit TIFF
_FORMATS = ("PNG", "TIFF")
CLASS_FACTOR = 256  # VOC: an object has at most 8 bits


class LabelError(ValueError):
    """A label map that cannot be what its encoding says. `fault` is the reason of the reject."""

    def __init__(self, fault: str, detail: str) -> None:
        super().__init__(fault, detail)
        self.fault, self.detail = fault, detail


@dataclass(frozen=True, kw_only=True)
class Region:
    """Pixels of one id: their number, and the tight box x, y, width, height."""

    area: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A label map as runs of equal pixels within a row, of which it has few.

    shape    height, width
    start    int64[R], the first pixel of each run, counted row after row; `length` int64[R] of each
    ids      int[V], all that there are, ascending, 0 void; `which` int64[R] of them each run has
    """

    shape: tuple[int, int]
    start: Array
    length: Array
    ids: Array
    which: Array

    @property
    def pixels(self) -> Array:
        """int[H, W] of ids."""
        return np.repeat(self.ids[self.which], self.length).reshape(self.shape)


_PNG_DEPTH = 24  # the byte of a PNG that says how many bits a pixel has
_SPREAD = {2: 85, 4: 17}  # what PIL multiplies so few bits of grey by, to fill eight


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Its pixels; the sha256 and the size of everything that it was read from."""

    runs: Runs
    sha256: str
    size_bytes: int


class Kind(Record):
    """A class as a rule names it."""

    name: str
    isthing: bool


class SegmentRule(Record):
    """How the regions of a label map become segments, where the annotation does not list them.

    kinds     the class of each category id
    void      category ids whose regions are left void
    divisor   ids of `divisor` and more are category id x `divisor` + number of the instance (Cityscapes:
              1000, VOC pairs: 256), smaller ones are category ids; 0 where all are category ids
    crowds    a thing without a number is a crowd (Cityscapes); where it is false it is one thing
    One rule serves all rows of a corpus: store it once.
    """

    kinds: dict[int, Kind]
    void: frozenset[int] = frozenset()
    divisor: int = 0
    crowds: bool = False


def label_place(encoding: Encoding, *parts: str) -> str:
    """A label place of any encoding; of "rgb" it is the place itself."""
    return parts[0] if encoding == "rgb" else json.dumps([encoding, *parts])


def painted(masks: Sequence[Rle]) -> str:
    """The label place of masks of one size, painted in this order as ids 1, 2 ...: later ones on top."""
    height, width = masks[0].size
    return json.dumps(["masks", height, width, *(mask.counts for mask in masks)])


def holders(label: str) -> tuple[str, ...]:
    """The places of the files that a label place reads; none where the masks stand in it."""
    encoding, parts = _split(label)
    return () if encoding == "masks" else tuple(parts)


def read(label: str, max_pixels: int) -> LabelMap:
    """Decode a label map. Raises `LabelError`, and `OSError` where a file cannot be read."""
    encoding, parts = _split(label)
    digest, sizes = hashlib.sha256(), []

    def load(place: str) -> Image.Image:
        data = places.read(place)
        digest.update(data)
        sizes.append(len(data))
        image = decode(data, _FORMATS if encoding.startswith("index") else _FORMATS[:1], max_pixels)
        grey = image.format == "PNG" and image.mode == "L"
        spread = _SPREAD.get(data[_PNG_DEPTH], 1) if grey else 1
        return image.point(lambda value: value // spread) if spread > 1 else image

    try:
        ids = ENCODINGS[encoding](parts, load)
    except PixelsError as error:
        raise LabelError(error.fault, error.detail) from None
    if encoding == "masks":
        sizes.append(len(label))
    if encoding != "rgb":  # equal bytes mean another map in another encoding
        digest.update(label.encode() if encoding == "masks" else encoding.encode())
    return LabelMap(runs=runs_of(ids), sha256=digest.hexdigest(), size_bytes=sum(sizes))


def segments_of(rule: SegmentRule, regions: Mapping[int, Region]) -> tuple[Segment, ...]:
    """The segments that a rule finds, by id. Raises `LabelError` where an id has no class."""
    found, unknown = [], []
    for i, region in sorted(regions.items()):
        numbered = bool(rule.divisor) and i >= rule.divisor
        category = i // rule.divisor if numbered else i
        if category in rule.void:
            continue
        if category not in rule.kinds:
            unknown.append(i)
            continue
        kind = rule.kinds[category]
        crowd = rule.crowds and kind.isthing and not numbered
        found.append(Segment(id=i, category=kind.name, isthing=kind.isthing, iscrowd=crowd, **vars(region)))
    if unknown:
        raise LabelError("category", f"ids of no class: {unknown[:5]}")
    return tuple(found)


def runs_of(ids: Array) -> Runs:
    """int[H, W] -> its runs; to look for ids in all pixels would be slow."""
    flat = np.ascontiguousarray(ids).ravel()
    new = np.ones(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=new[1:])
    new[:: ids.shape[1]] = True
    start = np.flatnonzero(new)
    found, which = np.unique(flat[start], return_inverse=True)
    length = np.diff(start, append=flat.size)
    return Runs(shape=ids.shape, start=start, length=length, ids=found, which=which)


def regions_of(runs: Runs) -> dict[int, Region]:
    """Area and box of every id but 0."""
    (height, width), which = runs.shape, runs.which
    rows, left = np.divmod(runs.start, width)
    area = np.bincount(which, weights=runs.length).astype(np.int64)
    near = np.tile(np.array([[width], [height]]), len(runs.ids))
    far = np.zeros_like(near)
    np.minimum.at(near[0], which, left)
    np.minimum.at(near[1], which, rows)
    np.maximum.at(far[0], which, left + runs.length)
    np.maximum.at(far[1], which, rows + 1)
    boxes = np.concatenate([near, far - near]).T.tolist()
    found = zip(runs.ids.tolist(), area.tolist(), boxes, strict=True)
    return {i: Region(area=pixels, bbox=tuple(box)) for i, pixels, box in found if i != 0}


def index_map(runs: Runs, order: Sequence[int]) -> bytes:
    """A PNG of one channel: the place of each pixel's id in `order`, from 1; 0 of any other id.

    Of 8 bits where those are enough, else 16. Packed lightly, which makes it larger, though still small
    beside a photograph, and quicker to read (benchmarks.build).
    """
    places = {i: place for place, i in enumerate(order, 1)}
    place = [places.get(i, 0) for i in runs.ids.tolist()]
    dtype = np.uint8 if len(order) < 256 else np.uint16
    indexed = replace(runs, ids=np.array(place, dtype=dtype))
    sink = io.BytesIO()
    Image.fromarray(indexed.pixels).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def _split(label: str) -> tuple[Encoding, list[Any]]:
    if not label.startswith("["):
        return "rgb", [label]
    encoding, *parts = json.loads(label)
    return encoding, parts


def _rgb(parts: Sequence[str], load: Load) -> Array:
    """COCO panoptic: id = R + 256 G + 65536 B. Four bytes a pixel at once, which is faster than channels."""
    image = load(parts[0]).convert("RGB")
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), "<u4")
    return pixels.reshape(image.height, image.width) & 0xFFFFFF


def _index(parts: Sequence[str], load: Load) -> Array:
    """One channel of 1 to 16 bits, or palette indices: the value is the id, and 0 is void."""
    return _one_channel(load(parts[0]))


def _index_from_0(parts: Sequence[str], load: Load) -> Array:
    """One channel whose 0 is a class: id = value + 1. COCO-Stuff's pixel maps give category ids so."""
    return _one_channel(load(parts[0])) + 1


def _class_object(parts: Sequence[str], load: Load) -> Array:
    """Pascal VOC's two palette PNGs: id = 256 (class + 1) + object, so that the background is 256."""
    classes, objects = (_one_channel(load(part)) for part in parts)
    if classes.shape != objects.shape:
        raise LabelError("size", f"classes are {classes.shape}, objects {objects.shape} pixels")
    if objects.max(initial=0) >= CLASS_FACTOR:
        raise LabelError("corrupt", f"an object has number {objects.max()}, at most {CLASS_FACTOR - 1}")
    return CLASS_FACTOR * (classes + 1) + np.where(classes == _VOID, 0, objects)


_VOID = 255  # VOC's border between objects, in both PNGs


def _masks(parts: Sequence[Any], load: Load) -> Array:
    """Run lengths painted one over the other."""
    height, width, *counts = parts
    ids = np.zeros((height, width), dtype=np.int64)
    for i, runs in enumerate(counts, 1):
        ids[decode_rle(Rle(size=(height, width), counts=runs))] = i
    return ids


def _one_channel(image: Image.Image) -> Array:
    pixels: Array = np.asarray(image)
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        raise LabelError("corrupt", f"one channel of whole numbers is expected, the mode is {image.mode}")
    return pixels.astype(np.int64)


ENCODINGS: dict[Encoding, Callable[[Sequence[Any], Load], Array]] = {
    "rgb": _rgb,
    "index": _index,
    "index_from_0": _index_from_0,
    "class_object": _class_object,
    "masks": _masks,
}
