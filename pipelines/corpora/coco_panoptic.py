"""COCO panoptic: a JSON of segments, and a folder of PNGs whose colours are ids.

id = R + 256 G + 65536 B, 0 is void. Settings used: `images`, `annotations`, `labels`.
Format: https://cocodataset.org/#format-data, section 4.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from pipelines.corpora.coco_images import CocoImages, class_list, row
from pipelines.corpora.files import (
    Entry,
    Id,
    annotation_file,
    data_file,
    id_of,
    index,
    label,
    load_json,
    only,
    parse,
    section,
)
from pipelines.corpora.rows import Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Segment
from schemas.taxonomy import Category, Taxonomy


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an annotation; one reject an unusable one, an image without, an image record that is none.

    Raises `CorpusError`.
    """
    path = annotation_file(corpus, "annotations")
    document = load_json(path)
    images = CocoImages(corpus, document, path)
    categories = index(section(document, "categories", path))
    done: set[str | None] = set()
    for position, record in enumerate(section(document, "annotations", path)):
        try:
            annotation = parse(_Annotation, record)
            if str(annotation.image_id) in done:
                raise Refusal("duplicate-id", "the image has an annotation already")
            yield _row(corpus, annotation, images, categories)
        except Refusal as refusal:
            yield refuse(corpus, label("image", record, "image_id", position), refusal)
        done.add(id_of(record, "image_id"))
    yield from images.unusable()
    for image_id in images.ids():
        if image_id not in done:
            yield refuse(corpus, f"image {image_id}", Refusal("no-labels", "the image has no annotation"))


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The `categories` in the order of the file, named after the corpus. Raises `CorpusError`."""
    return class_list(corpus, _Category, lambda c: Category(name=c.name, isthing=c.isthing))


def _row(
    corpus: CorpusConfig, annotation: "_Annotation", images: CocoImages, categories: dict[str, list[Any]]
) -> Row:
    image = images[annotation.image_id]
    labels_path, labels_file = data_file(corpus, corpus.labels, annotation.file_name, "no-labels")
    ids = Counter(segment.id for segment in annotation.segments_info)
    if twice := [segment_id for segment_id, count in ids.items() if count > 1]:
        raise Refusal("segmentation", f"segment ids stand twice: {twice}")
    in_order = sorted(annotation.segments_info, key=lambda info: info.id)
    return row(
        corpus,
        image,
        (image.id,),
        files=(labels_file,),
        taxonomy=corpus.name,
        labels_path=labels_path,
        segments=tuple(_segment(info, categories) for info in in_order),
    )


def _segment(info: "_SegmentInfo", categories: dict[str, list[Any]]) -> Segment:
    category = parse(_Category, only(categories, info.category_id, "category", "category"))
    x, y, width, height = (round(side) for side in info.bbox)
    return Segment(
        id=info.id,
        category=category.name,
        isthing=category.isthing,
        iscrowd=info.iscrowd,
        area=round(info.area),
        bbox=(x, y, width, height),
    )


Side = Annotated[float, Field(gt=-(2**31), lt=2**31)]
Length = Annotated[float, Field(ge=0, lt=2**31)]


class _Category(Entry):
    id: Id
    name: str = Field(min_length=1)
    isthing: bool


class _SegmentInfo(Entry):
    id: int = Field(gt=0, lt=2**24, description="0 is void, and a PNG pixel has 24 bits")
    category_id: Id
    iscrowd: bool = False
    area: Annotated[float, Field(ge=0, lt=2**62)]
    bbox: tuple[Side, Side, Length, Length]


class _Annotation(Entry):
    image_id: Id
    file_name: str = Field(min_length=1)
    segments_info: tuple[_SegmentInfo, ...]
