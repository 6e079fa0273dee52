"""One row, or the rows of one image, with the facts of their files: refused with a reason, or a sample.

Pure: facts in, decisions out. What needs a look at all rows at once (duplicates, leakage, keys) is decided in
grouping.py.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from pipelines.corpora.coco_masks import mask
from pipelines.corpora.rows import Refusal, Row
from pipelines.facts import Files
from pipelines.inspection import Facts
from pipelines.labels import LabelError, segments_of
from pipelines.shards import MAX_SEGMENTS, Entry
from schemas.records import Reject, SampleMeta, Segment

Reason = Literal["size", "segments", "unannotated"]  # beside a file's own fault

_MAX_KEY = 70  # characters; with a suffix and `.segments.png` it must fit the 100 of a USTAR name
T = TypeVar("T")


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def files_of(row: Row) -> tuple[tuple[str, str], ...]:
    """The (kind, place) of every file that the row needs."""
    image = ("image", row.image_path)
    return (image,) if row.labels_path is None else (image, ("labels", row.labels_path))


def judge(row: Row, files: Files) -> tuple[Segment, ...] | Reject:
    """Its segments, none where it has no label map; or why the row cannot be used."""
    try:
        _check_image(row, files["image", row.image_path])
        if row.origins:  # masks of a version: here, where rows are looked at side by side, as it takes long
            _check_masks(row, files["image", row.image_path])
        segments = _segments(row, files)
        if not (segments or row.referring or row.captions or row.questions):
            raise _Refused("unannotated", "nothing is said about this image")
    except _Refused as refused:
        return reject(row, refused.reason, refused.detail)
    return segments


def sample_key(corpus: str, image_id: str) -> str:
    """The stable key of an image: letters, digits, dash and underscore, because WebDataset cuts keys at dots.

    Where that loses something of the id, a hash of the id stands behind it.
    """
    plain = f"{corpus}-{image_id}"
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", plain)
    return (
        safe if safe == plain and len(safe) <= _MAX_KEY else f"{safe[-_MAX_KEY + 9 :]}-{_short_hash(plain)}"
    )


def _check_image(row: Row, image: Facts) -> None:
    if image.fault:
        raise _Refused(image.fault, image.detail)
    stated, found = (row.height or image.height, row.width or image.width), (image.height, image.width)
    wrong = [size for size in (stated, *(r.mask.size for r in row.referring)) if size != found]
    if wrong:
        raise _Refused("size", f"annotated as height, width {wrong[0]}, the file is {found}")


def _check_masks(row: Row, image: Facts) -> None:
    for referring in row.referring:
        try:
            mask(referring.mask, image)
        except Refusal as refusal:
            raise _Refused(refusal.reason, refusal.detail) from None


def _segments(row: Row, files: Files) -> tuple[Segment, ...]:
    """Those that are listed or follow from the rule, areas and boxes as the pixels have them."""
    if row.labels_path is None:
        return ()
    labels = files["labels", row.labels_path]
    _check_labels(row, files["image", row.image_path], labels)
    if row.rule is None:
        listed = row.segments or ()
        _check_listed(row, {segment.id for segment in listed}, labels)
        return tuple(s.model_copy(update=vars(labels.regions[s.id])) for s in listed)
    try:
        return segments_of(row.rule, labels.regions)
    except LabelError as error:
        raise _Refused(error.fault, f"{_short(row)}: {error.detail}") from None


def _short(row: Row) -> str:
    """The label place, which may hold masks, cut."""
    return f"{row.labels_path:.200}"


def _check_labels(row: Row, image: Facts, labels: Facts) -> None:
    if labels.fault:
        raise _Refused(labels.fault, labels.detail)
    if (labels.height, labels.width) != (image.height, image.width):
        sizes = f"{(labels.height, labels.width)}, the image {(image.height, image.width)}"
        raise _Refused("size", f"{_short(row)} has height, width {sizes}")
    if len(labels.regions) > MAX_SEGMENTS:
        raise _Refused("segments", f"{_short(row)}: {len(labels.regions)} segments, at most {MAX_SEGMENTS}")


def _check_listed(row: Row, listed: set[int], labels: Facts) -> None:
    if listed != labels.regions.keys():
        unlisted, absent = (
            sorted(labels.regions.keys() - listed)[:5],
            sorted(listed - labels.regions.keys())[:5],
        )
        raise _Refused("segments", f"{_short(row)}: ids not listed {unlisted}, ids without pixels {absent}")


def entry(key: str, group: Sequence[Row], files: Files, index_map: str = "") -> Entry:
    """The sample of all rows of one image, of one split; at most one of them has segments."""
    first, image = group[0], files["image", group[0].image_path]
    labelled = next((row for row in group if row.labels_path is not None), None)
    labels = files["labels", str(labelled.labels_path)] if labelled else None
    meta = SampleMeta(
        key=key,
        split=first.split,
        height=image.height,
        width=image.width,
        sha256=image.sha256,
        taxonomy=labelled.taxonomy if labelled else None,
        segments=_segments(labelled, files) if labelled else None,
        referring=_distinct(r for row in group for r in row.referring),
        captions=_distinct(c for row in group for c in row.captions),
        questions=_distinct(q for row in group for q in row.questions),
        sources=tuple(source for row in group for source in (row.source, *row.origins)),
    )
    return Entry(
        meta=meta,
        image_path=first.image_path,
        labels_path=labelled.labels_path if labelled else None,
        labels_sha256=labels.sha256 if labels else "",
        size_bytes=image.size_bytes + (labels.size_bytes if labels else 0),
        index_map=index_map,
    )


def _distinct(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))


def reject(row: Row, reason: str, detail: str) -> Reject:
    return Reject(
        corpus=row.corpus, record=f"image {row.image_id}", split=row.split, reason=reason, detail=detail
    )


def name(row: Row) -> str:
    """How the detail of another row's reject names this one."""
    return f"{row.corpus} image {row.image_id}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
