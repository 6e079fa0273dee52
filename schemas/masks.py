"""Masks in the forms they travel in: COCO RGB ids, polygons, run lengths, label maps. Numpy in, numpy out."""

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

    Raises `ValueError` where it is none of the three, is empty, or has another size than the image.
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
        if isinstance(counts, list):
            merged = coco_mask.frPyObjects(segmentation, height, width)
        else:
            merged = {"size": [height, width], "counts": counts.encode("ascii")}
    else:
        raise ValueError(
            f"segmentation is neither polygons (6 numbers or more each) nor run lengths: {segmentation!r:.80}"
        )
    return Rle(size=(height, width), counts=merged["counts"].decode("ascii"))


def area_and_bbox(mask: Array) -> tuple[int, tuple[int, int, int, int]]:
    """Area in pixels and tight x, y, width, height of bool[H, W]; all zero where the mask is empty."""
    area = int(mask.sum())
    if not area:
        return 0, (0, 0, 0, 0)
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return area, (int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1))
