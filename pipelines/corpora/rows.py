"""What every reader yields: a `Row` for an image with its annotations, or a `Reject` with the reason.

No pixels: heights, widths, areas and boxes are what the annotation file claims, and the build checks them.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipelines.labels import SegmentRule
from schemas.jobs import CorpusConfig
from schemas.records import Question, Referring, Reject, Segment, Source, Split

# Why a reader refuses a record; the build adds reasons of its own for what only the pixels tell.
Reason = Literal[
    "record", "path", "no-image", "no-labels", "category", "segmentation", "text", "duplicate-id"
]

# What the `record` of a reject begins with where it is something said of an image, which stays.
PARTS = ("annotation", "answer", "caption", "object", "question", "ref", "region")

MAX_DETAIL = 500  # characters; chosen by us, so that a record cannot fill the table of rejects with itself


class CorpusError(ValueError):
    """A corpus that cannot be read at all. The message names the file and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(encodable(message))


class Refusal(Exception):
    """Raised inside a reader about one record; `refuse` turns it into a `Reject`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image and what one corpus says about it.

    corpus, split   of the `CorpusConfig` it came from
    image_id        stable within the corpus, e.g. "397133"; a relative path where images have no number
    image_number    the image in a list that several corpora share, e.g. "coco 397133" or "voc 2007_000032";
                    empty without one
    unnamed         `image_id` is a row's number, which moves; the build puts a hash of the bytes in its place
    image_path      the place of the image (pipelines/places.py): an absolute path of an existing file under
                    the corpus root, or a tar member or a cell of a table in such a file
    height, width   pixels as the annotation file states them, None where it does not
    taxonomy        name of the taxonomy that the segments' categories belong to
    labels_path     the label place of the segments' pixels (pipelines/labels.py); None without segments
    segments        `id` is the id in that label map; the build renumbers them 1..n in this order
    rule            where the annotation lists no segments: how they follow from the label map; one of
                    `segments` and `rule` stands with `labels_path`
    origins         of a sample that was built before: the sources that it had, beside this corpus
    """

    corpus: str
    split: Split
    image_id: str
    image_path: str
    height: int | None
    width: int | None
    taxonomy: str | None = None
    labels_path: str | None = None
    segments: tuple[Segment, ...] | None = None
    rule: SegmentRule | None = None
    referring: tuple[Referring, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    source: Source
    origins: tuple[Source, ...] = ()
    image_number: str = ""
    unnamed: bool = False


def refuse(corpus: CorpusConfig, record: str, refusal: Refusal) -> Reject:
    """The row of the rejects table for a refused record.

    record    which one, e.g. "image 397133"; begins with one of `PARTS` where its image may stay
    """
    return Reject(
        corpus=corpus.name,
        record=encodable(record),
        split=corpus.split,
        reason=refusal.reason,
        detail=encodable(refusal.detail)[:MAX_DETAIL],
    )


def lost_captions(
    corpus: CorpusConfig, image: str, kept: Collection[object], unusable: Iterable[Refusal]
) -> Iterator[Reject]:
    """The rejects of an image's unusable captions; of the image itself where none was kept."""
    record = f"caption of {image}" if kept else image
    return (refuse(corpus, record, refusal) for refusal in unusable)


def encodable(text: str) -> str:
    """The text with its surrogates, as broken UTF-8 in names of files gives them, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
