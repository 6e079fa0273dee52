"""Look at every file of a corpus once: does it decode whole, how large is it, which segment ids does it hold?

A bad file is a row with a fault, never an exception. What
follows from the facts is decided in curate.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines import labels, places
from pipelines.duplicates import SIDE, hashes, is_flat, thumbnail
from pipelines.labels import LabelError, Region, Runs
from pipelines.pixels import PHOTOGRAPHS, PixelsError, decode, upright
from schemas.pictures import to_rgb

# One row a file. `fault` is empty where it is good; `regions` holds id, area, x, y, width, height of each id.
# `thumbnail` and `hash` are those of duplicates.py; empty and 0 of labels and of images that are all flat.
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
class Facts:
    """What one file is. `fault` is the reason of a reject, or empty; `regions` by id, of labels only.

    `thumbnail` and `hash` tell copies of an image (duplicates.py); empty where there is nothing to tell.
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


def rows_of(files: Mapping[tuple[str, str], Facts]) -> list[dict[str, Any]]:
    """Facts by (kind, path) -> rows of FACTS, in the same order."""
    rows = []
    for (kind, path), facts in files.items():
        flat = [n for i, r in facts.regions.items() for n in (i, r.area, *r.bbox)]
        rows.append(vars(facts) | {"kind": kind, "path": path, "regions": flat})
    return rows


def facts_by_file(table: pa.Table) -> dict[tuple[str, str], Facts]:
    """FACTS -> facts by (kind, path), in the same order."""
    found = {}
    for row in table.to_pylist():
        numbers = np.reshape(row.pop("regions"), (-1, 6)).astype(np.int64).tolist()
        regions = {i: Region(area=area, bbox=(x, y, w, h)) for i, area, x, y, w, h in numbers}
        kind, path = row.pop("kind"), row.pop("path")
        found[kind, path] = Facts(regions=regions, **row)
    return found


def inspect(kind: str, path: str, max_pixels: int) -> tuple[Facts, Runs | None]:
    """Hash what lies at a place (places.py; of "labels" a label place) and decode it to the last row.

    Beside the facts stand the pixels of a good label map.
    """
    try:
        return _labels(path, max_pixels) if kind == "labels" else (_image(path, max_pixels), None)
    except (PixelsError, LabelError) as error:
        return _faulty(error.fault, path, error.detail), None
    except OSError as error:
        return _faulty("unreadable", path, f"{type(error).__name__}: {error}"), None


def _labels(path: str, max_pixels: int) -> tuple[Facts, Runs]:
    found = labels.read(path, max_pixels)
    (height, width), regions = found.runs.shape, labels.regions_of(found.runs)
    facts = Facts(
        sha256=found.sha256, size_bytes=found.size_bytes, height=height, width=width, regions=regions
    )
    return facts, found.runs


def _image(path: str, max_pixels: int) -> Facts:
    data = places.read(path)
    image = upright(decode(data, PHOTOGRAPHS, max_pixels))
    look, hashed = fingerprint(image)
    return Facts(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        height=image.height,
        width=image.width,
        regions={},
        thumbnail=look,
        hash=hashed,
    )


def fingerprint(image: Image.Image) -> tuple[bytes, int]:
    """The thumbnail and its hash, of duplicates.py; empty and 0 where all is flat."""
    shown = image if image.mode == "RGB" else Image.fromarray(to_rgb(image))
    small = shown.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=1.5)
    seen = thumbnail(np.asarray(small.convert("YCbCr")))
    return (b"", 0) if is_flat(seen) else (seen.tobytes(), int(hashes(seen[None])[0]))


def _faulty(fault: str, path: str, detail: str) -> Facts:
    return Facts(regions={}, fault=fault, detail=f"{path:.200}: {detail}"[:500])
