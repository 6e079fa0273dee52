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


_SEGMENT = pa.struct(
    {
        "id": pa.int32(),
        "category": pa.string(),
        "isthing": pa.bool_(),
        "iscrowd": pa.bool_(),
        "area": pa.int64(),
        "bbox": pa.list_(pa.int32()),
    }
)
_RLE = pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()})
_REFERRING = pa.struct({"sentences": pa.list_(pa.string()), "mask": _RLE})
_QUESTION = pa.struct({"question": pa.string(), "answers": pa.list_(pa.string()), "kind": pa.string()})
_SOURCE = pa.struct(
    {
        "corpus": pa.string(),
        "files": pa.list_(pa.string()),
        "ids": pa.list_(pa.string()),
        "licence": pa.string(),
    }
)

# One light row of the build: a SampleMeta plus where its pixels lie. The bytes never enter this table.
SAMPLE = pa.schema(
    {
        "key": pa.string(),
        "split": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "sha256": pa.string(),
        "taxonomy": pa.string(),
        "segments": pa.list_(_SEGMENT),
        "referring": pa.list_(_REFERRING),
        "captions": pa.list_(pa.string()),
        "questions": pa.list_(_QUESTION),
        "sources": pa.list_(_SOURCE),
        "image_path": pa.string(),
        "labels_path": pa.string(),
    }
)

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

# samples.parquet: one row a sample, with the byte range of its members inside its shard; `copy_of` is the key
# of a training sample that shows the same picture, or empty.
SAMPLES = pa.schema(
    {
        "key": pa.string(),
        "split": pa.string(),
        "stream": pa.string(),
        "shard": pa.string(),
        "offset": pa.int64(),
        "size_bytes": pa.int64(),
        "sha256": pa.string(),
        "copy_of": pa.string(),
        "segments": pa.int32(),
        "referring": pa.int32(),
        "captions": pa.int32(),
        "questions": pa.int32(),
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
