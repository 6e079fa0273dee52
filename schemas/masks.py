"""Masks in the forms they travel in: COCO RGB ids, polygons, run lengths, label maps. Numpy in, numpy out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from schemas.records import Rle

Array = np.ndarray[Any, Any]


def rgb_to_ids(rgb: Array) -> Array:
    """COCO panoptic colours to segment ids: uint8[H, W, 3] -> int32[H, W], id = R + 256 G + 65536 B; 0 is
    void.
    """
    wide = rgb[..., :3].astype(np.int32)
    return wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]


def ids_to_rgb(ids: Array) -> Array:
    """The reverse of `rgb_to_ids`: int[H, W] in [0, 2^24) -> uint8[H, W, 3]."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def encode_rle(mask: Array) -> Rle:
    """bool[H, W] -> COCO compressed run lengths."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Rle(size=tuple(encoded["size"]), counts=encoded["counts"].decode("ascii"))


def decode_rle(rle: Rle) -> Array:
    """COCO compressed run lengths -> bool[H, W]."""
    return coco_mask.decode({"size": list(rle.size), "counts": rle.counts.encode("ascii")}).astype(bool)


def annotation_rle(segmentation: Any, height: int, width: int) -> Rle:
    """A COCO `segmentation` (polygons, uncompressed or compressed RLE) -> run lengths; parts are united, not
    summed.

    Raises `ValueError` where it is none of the three, is empty, or does not cover exactly the image.
    """
    if (
        isinstance(segmentation, list)
        and segmentation
        and all(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
    ):
        merged = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if tuple(segmentation["size"]) != (height, width):
            raise ValueError(f"run lengths are {segmentation['size']}, the image is {[height, width]}")
        counts = segmentation["counts"]
        runs = counts if isinstance(counts, list) else _run_lengths(counts)
        # pycocotools leaves the memory that no run covers as it was
        if min(runs, default=0) < 0 or sum(runs) != height * width:
            raise ValueError(f"run lengths cover {sum(runs)} pixels, the image has {height} x {width}")
        if isinstance(counts, list):
            merged = coco_mask.frPyObjects(segmentation, height, width)
        else:
            merged = {"size": [height, width], "counts": counts.encode("ascii")}
    else:
        raise ValueError(
            f"segmentation is neither polygons (6 numbers or more each) nor run lengths: {segmentation!r:.80}"
        )
    return Rle(size=(height, width), counts=merged["counts"].decode("ascii"))


def _run_lengths(counts: str) -> list[int]:
    """COCO's text of run lengths as numbers; `ValueError` where it breaks off or has other characters.

    Five bits a character, the sixth announces another one; from the fourth number on it is the difference to
    the last but one. pycocotools would read on behind a text that breaks off.
    """
    runs: list[int] = []
    value = shift = 0
    for bits in (ord(character) - 48 for character in counts):
        if not 0 <= bits < 64:
            raise ValueError(f"{chr(bits + 48)!r} is no character of compressed run lengths")
        if shift > 60:
            raise ValueError("compressed run lengths hold a number of more than 64 bits")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths break off within a number")
    return runs


def area_and_bbox(mask: Array) -> tuple[int, tuple[int, int, int, int]]:
    """Area in pixels and tight x, y, width, height of bool[H, W]; all zero where the mask is empty."""
    area = int(mask.sum())
    if not area:
        return 0, (0, 0, 0, 0)
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return area, (int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1))


def area_of(rle: Rle) -> int:
    """Pixels of a mask, without decoding it."""
    return int(coco_mask.area({"size": list(rle.size), "counts": rle.counts.encode("ascii")}))


def visible_areas(masks: Sequence[Rle]) -> list[int]:
    """Masks of one size, painted one over the other -> the pixels of each that are still seen."""
    plain = [{"size": list(rle.size), "counts": rle.counts.encode("ascii")} for rle in masks]
    areas: list[int] = []
    above = None
    for one in reversed(plain):
        hidden = coco_mask.area(coco_mask.merge([one, above], intersect=True)) if above else 0
        areas.append(int(coco_mask.area(one)) - int(hidden))
        above = coco_mask.merge([one, above]) if above else one
    return areas[::-1]


def box_rle(box: tuple[int, int, int, int], height: int, width: int) -> Rle:
    """The mask of a box x, y, width, height in pixels, clipped to the image."""
    x, y, w, h = box
    mask = np.zeros((height, width), dtype=bool)
    mask[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = True
    return encode_rle(mask)
