"""Look at every file of a corpus once: does it decode whole, how large is it, which segment ids does it hold?

Runs in Ray tasks, a batch of paths at a time. A bad file is a row with a fault, never an exception. What
follows from the facts is decided in curate.py.
"""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from pipelines.duplicates import SIDE, hashes, is_flat, thumbnail
from schemas.masks import Array, rgb_to_ids

FORMATS = {"image": ("JPEG", "PNG"), "labels": ("PNG",)}  # the decoders that may see untrusted bytes

# One row a file. `fault` is empty where it is good; `regions` holds id, area, x, y, width, height of each id.
# `thumbnail` and `hash` are those of pipelines/duplicates.py; empty and 0 for labels and where all is flat.
FACTS = pa.schema(
    {
        "kind": pa.string(),
        "path": pa.string(),
        "sha256": pa.string(),
        "size_bytes": pa.int64(),
        "height": pa.int32(),
        "width": pa.int32(),
        "regions": pa.list_(pa.int64()),
        "thumbnail": pa.binary(),
        "hash": pa.uint64(),
        "fault": pa.string(),
        "detail": pa.string(),
    }
)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Pixels of one id: their number, and the tight box x, y, width, height."""

    area: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one file is. `fault` is the reason of a reject, or empty; `regions` by id, of labels only.

    `thumbnail` and `hash` tell copies of an image (pipelines/duplicates.py); empty where they could not.
    """

    sha256: str = ""
    size_bytes: int = 0
    height: int = 0
    width: int = 0
    regions: dict[int, Region]
    thumbnail: bytes = b""
    hash: int = 0
    fault: str = ""
    detail: str = ""


def inspect_table(files: pa.Table, max_pixels: int) -> pa.Table:
    """Columns kind ("image" or "labels") and path -> FACTS, in the same order."""
    rows = []
    for kind, path in zip(files["kind"].to_pylist(), files["path"].to_pylist(), strict=True):
        facts = inspect(kind, Path(path), max_pixels)
        flat = [n for i, r in facts.regions.items() for n in (i, r.area, *r.bbox)]
        rows.append(vars(facts) | {"kind": kind, "path": path, "regions": flat})
    return pa.Table.from_pylist(rows, schema=FACTS)


def facts_by_file(table: pa.Table) -> dict[tuple[str, str], Facts]:
    """FACTS -> facts by (kind, path)."""
    found = {}
    for row in table.to_pylist():
        numbers = np.reshape(row.pop("regions"), (-1, 6)).astype(np.int64).tolist()
        regions = {i: Region(area=area, bbox=(x, y, w, h)) for i, area, x, y, w, h in numbers}
        kind, path = row.pop("kind"), row.pop("path")
        found[kind, path] = Facts(regions=regions, **row)
    return found


def inspect(kind: str, path: Path, max_pixels: int) -> Facts:
    """Hash a file and decode it to the last row."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return _faulty("unreadable", path, error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides, below
            image = Image.open(io.BytesIO(data), formats=FORMATS[kind])
        if image.width * image.height > max_pixels:
            return _faulty("pixels", path, f"{image.width} x {image.height} is more than {max_pixels} pixels")
        regions = regions_of(rgb_to_ids(np.asarray(image.convert("RGB")))) if kind == "labels" else {}
        image.load()
        seen, hashed = _fingerprint(image) if kind == "image" else (b"", 0)
    except Image.DecompressionBombError as error:
        return _faulty("pixels", path, error)
    except Exception as error:  # what a decoder raises on hostile bytes is anything
        return _faulty("corrupt", path, error)
    return Facts(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        height=image.height,
        width=image.width,
        regions=regions,
        thumbnail=seen,
        hash=hashed,
    )


def _fingerprint(image: Image.Image) -> tuple[bytes, int]:
    """The thumbnail, upright, and its hash: about a seventh of the time that reading and decoding take."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256)  # which `convert` would cut off at 255
    shown = image if image.mode == "RGB" else image.convert("RGB")
    small = shown.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=1.5)
    upright = ImageOps.exif_transpose(small).convert("YCbCr")
    seen = thumbnail(np.asarray(upright))
    return (b"", 0) if is_flat(seen) else (seen.tobytes(), int(hashes(seen[None])[0]))


def regions_of(ids: Array) -> dict[int, Region]:
    """int[H, W] -> area and box of every id but 0.

    Works on runs of equal pixels in a row, of which a label map has few: `np.unique` on all pixels is 20x
    slower.
    """
    height, width = ids.shape
    starts = np.ones((height, width), dtype=bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    rows, left = np.nonzero(starts)
    flat = rows * width + left
    length = np.diff(np.append(flat, ids.size))
    values, which = np.unique(ids[rows, left], return_inverse=True)
    area = np.bincount(which, weights=length).astype(np.int64)
    near = np.tile(np.array([[width], [height]]), len(values))
    far = np.zeros_like(near)
    np.minimum.at(near[0], which, left)
    np.minimum.at(near[1], which, rows)
    np.maximum.at(far[0], which, left + length)
    np.maximum.at(far[1], which, rows + 1)
    boxes = np.concatenate([near, far - near]).T.tolist()
    found = zip(values.tolist(), area.tolist(), boxes, strict=True)
    return {i: Region(area=pixels, bbox=tuple(box)) for i, pixels, box in found if i != 0}


def _faulty(fault: str, path: Path, error: Exception | str) -> Facts:
    why = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    # the decoder's message may hold the address of a buffer, which differs from run to run
    return Facts(regions={}, fault=fault, detail=f"{path}: {why.split(' <_io')[0]}"[:500])
