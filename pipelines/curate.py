"""Keep or reject, with a reason; join what several corpora say of one image. Pure: facts in, decisions out.

The balance is a law: every row read is either part of exactly one sample, or exactly one reject.
An image that any evaluation split holds never reaches training: not by its bytes, not by the number that it
has in a common list of images, not as a copy that only looks the same (duplicates.py). Rows of equal bytes
are one sample; images that only look the same stay two, because masks and words like "left" need not fit the
other one, or all but the best annotated are refused.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from pipelines.corpora.rows import Row
from pipelines.duplicates import THUMBNAIL_BYTES, find_copies
from pipelines.inspection import Facts
from pipelines.shards import MAX_SEGMENTS, Entry
from schemas.jobs import CurateConfig
from schemas.records import Reject, SampleMeta, Segment

Files = Mapping[tuple[str, str], Facts]  # by ("image" or "labels", path)
Reason = Literal[
    "size", "segments", "unannotated", "leakage", "duplicate-labels", "near-duplicate"
]  # beside a file's own fault

DEFAULTS = CurateConfig()
_MAX_KEY = 80  # characters; with a suffix it must fit the 100 of a USTAR name
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Curated:
    """Samples in key order, rejects, and how many rows went into the samples."""

    entries: tuple[Entry, ...]
    rejects: tuple[Reject, ...]
    num_kept: int


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def curate(rows: Sequence[Row], files: Files, config: CurateConfig = DEFAULTS) -> Curated:
    """Rows in the order of the corpora -> samples and rejects."""
    rejects: list[Reject] = []
    good = [row for row in rows if _passes(row, files, rejects)]
    held_out = _HeldOut(good, files)
    origins = _origins(good, files)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in good:
        sha256 = files["image", row.image_path].sha256
        group = groups.get((row.split, sha256), [])
        if row.split == "train" and (why := held_out.holds(row, sha256, origins.get(sha256))):
            rejects.append(_reject(row, "leakage", why))
        elif config.near_duplicates == "reject" and row.split == "train" and sha256 in origins:
            origin = _name(origins[sha256])
            rejects.append(_reject(row, "near-duplicate", f"a copy of {origin}, which is kept"))
        elif row.segments is not None and any(other.segments is not None for other in group):
            rejects.append(_reject(row, "duplicate-labels", f"{_name(group[0])} has segments of this image"))
        else:
            groups.setdefault((row.split, sha256), []).append(row)
    keys: set[str] = set()
    entries = {group: _entry(members, files, keys) for group, members in groups.items()}
    for split, sha256 in entries.keys() & {("train", copy) for copy in origins}:
        origin = files["image", origins[sha256].image_path].sha256
        key = entries[split, origin].meta.key if (split, origin) in entries else ""
        entries[split, sha256] = replace(entries[split, sha256], copy_of=key)
    return Curated(
        entries=tuple(sorted(entries.values(), key=lambda e: e.meta.key)),
        rejects=tuple(rejects),
        num_kept=sum(len(group) for group in groups.values()),
    )


class _HeldOut:
    """The images of the evaluation splits, by bytes and by number."""

    def __init__(self, rows: Sequence[Row], files: Files) -> None:
        # of several, the first by name is reported
        held = sorted((row for row in rows if row.split != "train"), key=_rank, reverse=True)
        self._by_bytes = {files["image", row.image_path].sha256: row for row in held}
        self._by_number = {row.image_number: row for row in held if row.image_number}

    def holds(self, row: Row, sha256: str, origin: Row | None) -> str:
        """Why a training row must go, or nothing."""
        if sha256 in self._by_bytes:
            return f"{_name(self._by_bytes[sha256])} of the val split is this image"
        if row.image_number and row.image_number in self._by_number:
            return f"{_name(self._by_number[row.image_number])} of the val split has its number"
        if origin is not None and origin.split != "train":
            return f"{_name(origin)} of the val split looks the same; at most resized, cropped or mirrored"
        return ""


def _origins(rows: Sequence[Row], files: Files) -> dict[str, Row]:
    """What each image that is a copy is a copy of, by the sha256 of the copy.

    The order decides which of two copies is the origin: the better annotated, then the larger one, then by
    sha256. It does not depend on the order of the rows.
    """
    best: dict[str, Row] = {}
    for row in rows:
        facts = files["image", row.image_path]
        if len(facts.thumbnail) == THUMBNAIL_BYTES:
            other = best.get(facts.sha256, row)
            best[facts.sha256] = min(row, other, key=_rank)
    ordered = sorted(best.items(), key=lambda item: (*_rank(item[1])[:3], -_pixels(item[1], files), item[0]))
    images = [files["image", row.image_path] for _, row in ordered]
    thumbnails = np.frombuffer(b"".join(image.thumbnail for image in images), np.uint8)
    copy_of = find_copies(
        np.array([image.hash for image in images], dtype=np.uint64),
        thumbnails.reshape(-1, THUMBNAIL_BYTES),
        np.array([row.split != "train" for _, row in ordered], dtype=bool),
    )
    return {ordered[i][0]: ordered[copy_of[i]][1] for i in np.flatnonzero(copy_of >= 0).tolist()}


def _rank(row: Row) -> tuple[bool, bool, bool, str, str]:
    """Held out first, then what has segments, then expressions; the rest is for an order without ties."""
    return row.split == "train", not row.segments, not row.referring, row.corpus, row.image_id


def _pixels(row: Row, files: Files) -> int:
    image = files["image", row.image_path]
    return image.height * image.width


def sample_key(corpus: str, image_id: str) -> str:
    """The stable key of an image: letters, digits, dash and underscore, because WebDataset cuts keys at dots.

    Where that loses something of the id, a hash of the id stands behind it.
    """
    plain = f"{corpus}-{image_id}"
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", plain)
    return (
        safe if safe == plain and len(safe) <= _MAX_KEY else f"{safe[-_MAX_KEY + 9 :]}-{_short_hash(plain)}"
    )


def _passes(row: Row, files: Files, rejects: list[Reject]) -> bool:
    try:
        _check_image(row, files["image", row.image_path])
        if row.segments is not None:
            _check_labels(row, files["image", row.image_path], files["labels", str(row.labels_path)])
        if not (row.segments or row.referring or row.captions or row.questions):
            raise _Refused("unannotated", "nothing is said about this image")
    except _Refused as refused:
        rejects.append(_reject(row, refused.reason, refused.detail))
        return False
    return True


def _check_image(row: Row, image: Facts) -> None:
    if image.fault:
        raise _Refused(image.fault, image.detail)
    stated, found = (row.height or image.height, row.width or image.width), (image.height, image.width)
    wrong = [size for size in (stated, *(r.mask.size for r in row.referring)) if size != found]
    if wrong:
        raise _Refused("size", f"annotated as height, width {wrong[0]}, the file is {found}")


def _check_labels(row: Row, image: Facts, labels: Facts) -> None:
    if labels.fault:
        raise _Refused(labels.fault, labels.detail)
    if (labels.height, labels.width) != (image.height, image.width):
        sizes = f"{(labels.height, labels.width)}, the image {(image.height, image.width)}"
        raise _Refused("size", f"{row.labels_path} has height, width {sizes}")
    listed = {segment.id for segment in row.segments or ()}
    if listed != labels.regions.keys():
        unlisted, absent = (
            sorted(labels.regions.keys() - listed)[:5],
            sorted(listed - labels.regions.keys())[:5],
        )
        raise _Refused(
            "segments", f"{row.labels_path}: ids not listed {unlisted}, ids without pixels {absent}"
        )
    if len(listed) > MAX_SEGMENTS:
        raise _Refused("segments", f"{row.labels_path}: {len(listed)} segments, at most {MAX_SEGMENTS}")


def _entry(group: Sequence[Row], files: Files, keys: set[str]) -> Entry:
    first, image = group[0], files["image", group[0].image_path]
    key = sample_key(first.corpus, first.image_id)
    if key in keys:  # two images of one id, say of two splits that each count from 1
        key = f"{key}-{image.sha256[:8]}"
    keys.add(key)
    labelled = next((row for row in group if row.segments is not None), None)
    labels = files["labels", str(labelled.labels_path)] if labelled else None
    meta = SampleMeta(
        key=key,
        split=first.split,
        height=image.height,
        width=image.width,
        sha256=image.sha256,
        taxonomy=labelled.taxonomy if labelled else None,
        segments=_measured(labelled.segments or (), labels) if labelled and labels else None,
        referring=_distinct(r for row in group for r in row.referring),
        captions=_distinct(c for row in group for c in row.captions),
        questions=_distinct(q for row in group for q in row.questions),
        sources=tuple(row.source for row in group),
    )
    return Entry(
        meta=meta,
        image_path=first.image_path,
        labels_path=labelled.labels_path if labelled else None,
        labels_sha256=labels.sha256 if labels else "",
        size_bytes=image.size_bytes + (labels.size_bytes if labels else 0),
    )


def _measured(segments: Sequence[Segment], labels: Facts) -> tuple[Segment, ...]:
    """Areas and boxes as the pixels have them, whatever the annotation says."""
    return tuple(s.model_copy(update=vars(labels.regions[s.id])) for s in segments)


def _distinct(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))


def _reject(row: Row, reason: str, detail: str) -> Reject:
    return Reject(
        corpus=row.corpus, record=f"image {row.image_id}", split=row.split, reason=reason, detail=detail
    )


def _name(row: Row) -> str:
    return f"{row.corpus} image {row.image_id}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
