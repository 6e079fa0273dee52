"""What flows: one SAMPLE is one image with whatever annotations it has.

`SampleMeta` is the JSON document that travels with an image on disk and between processes (`<key>.json` in a
shard); `Sample` is the same thing decoded, inside one process. A `Reject` is a record that was refused, and
why. Nothing here reads files.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1
Split = Literal["train", "val"]


class Record(BaseModel):
    """Base of all documents: frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(Record):
    """One region of the label map. `id` is the map's pixel value (0 is void); `bbox` is x, y, width, height
    in pixels.
    """

    id: int
    category: str
    isthing: bool
    iscrowd: bool = False
    area: int
    bbox: tuple[int, int, int, int]


class Rle(Record):
    """COCO compressed run-length encoding: `size` is height, width; `counts` the ASCII string."""

    size: tuple[int, int]
    counts: str


class Referring(Record):
    """Expressions that each refer to one region, given by its own mask (a RefCOCO mask is no panoptic
    segment).
    """

    sentences: tuple[str, ...]
    mask: Rle


class Question(Record):
    """A question, the answers people gave (VQA v2 holds ten) and its kind (VQA v2 `question_type`)."""

    question: str
    answers: tuple[str, ...]
    kind: str


class Source(Record):
    """Where a part of a sample came from: the corpus, the files under its root, the annotation ids, the
    licence.
    """

    corpus: str
    files: tuple[str, ...]
    ids: tuple[str, ...] = ()
    licence: str = ""


class SampleMeta(Record):
    """Everything of a SAMPLE but its pixels. A field that is None or empty was not annotated.

    `segments` is None where the image has no label map, and () where it has an empty one.
    """

    key: str
    split: Split
    height: int
    width: int
    sha256: str
    taxonomy: str | None = None
    segments: tuple[Segment, ...] | None = None
    referring: tuple[Referring, ...] = ()
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    sources: tuple[Source, ...] = ()


class Reject(Record):
    """One record that the build refused: `reason` is a short constant word, `detail` says what and where."""

    corpus: str
    record: str
    split: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A decoded SAMPLE.

    image    uint8[H, W, 3] RGB
    labels   uint16[H, W], the id of the segment at each pixel, 0 void; None where `meta.segments` is None
    """

    meta: SampleMeta
    image: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.uint16]] | None

    @property
    def key(self) -> str:
        return self.meta.key


# What a difference between two versions of a sample is told by.
PARTS = ("split", "pixels", "labels", "referring", "captions", "questions", "sources")

# manifest.parquet: one row a shard.
MANIFEST = pa.schema(
    {
        "shard": pa.string(),
        "split": pa.string(),
        "stream": pa.string(),
        "samples": pa.int64(),
        "size_bytes": pa.int64(),
        "sha256": pa.string(),
    }
)

# samples.parquet: one row a sample, with the byte range of its members inside its shard, the counts of its
# annotations, and 64 bits of a hash of each part of it, by which versions are compared. `copy_of` is the key
# of another training sample that shows the same picture, or empty.
SAMPLES = pa.schema(
    {
        "key": pa.string(),
        "split": pa.string(),
        "stream": pa.string(),
        "shard": pa.string(),
        "offset": pa.int64(),
        "size_bytes": pa.int64(),
        "sha256": pa.string(),
        "segments": pa.int32(),
        "referring": pa.int32(),
        "captions": pa.int32(),
        "questions": pa.int32(),
        "copy_of": pa.string(),
        **{f"{part}_hash": pa.uint64() for part in PARTS},
    }
)

REJECTS = pa.schema(
    {
        "corpus": pa.string(),
        "record": pa.string(),
        "split": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
)
