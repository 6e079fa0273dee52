"""COCO instances: objects as polygons or run lengths; a label map of things alone is derived from them.

Objects overlap and a label map cannot: smaller ones lie on top of larger ones, and crowds, which stay crowds,
lie under all of them. What no object covers is void. Settings used: `images`, `annotations`.
Format: https://cocodataset.org/#format-data, section 1.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipelines.corpora.coco_images import CocoImage, CocoImages
from pipelines.corpora.coco_masks import MAX_INSTANCES, Coordinate, Segmentation, mask
from pipelines.corpora.files import Entry, Id, annotation_file, index, label, load_json, only, parse, section
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from pipelines.labels import painted
from schemas.jobs import CorpusConfig
from schemas.masks import area_of, visible_areas
from schemas.records import Reject, Rle, Segment, Source
from schemas.taxonomy import Category, Taxonomy


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image with objects, in the order of `images`; one reject an unusable or hidden object.

    Raises `CorpusError`.
    """
    path = annotation_file(corpus, "annotations")
    document = load_json(path)
    images = CocoImages(corpus, document, path)
    categories = index(section(document, "categories", path))
    by_image: dict[str, list[_Object]] = {}
    done: set[str] = set()
    for position, record in enumerate(section(document, "annotations", path)):
        try:
            parsed = parse(_Object, record)
            parse(_Category, only(categories, parsed.category_id, "category", "category"))
            if str(parsed.id) in done:
                raise Refusal("duplicate-id", "an object with this id was read already")
            done.add(str(parsed.id))
            by_image.setdefault(str(parsed.image_id), []).append(parsed)
        except Refusal as refusal:
            yield refuse(corpus, label("object", record, "id", position), refusal)
    for image_id in dict.fromkeys([*images.ids(), *by_image]):
        yield from _image(corpus, images, image_id, by_image.get(image_id, []), categories)


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The `categories` in the order of the file, all of them things. Raises `CorpusError`."""
    path = annotation_file(corpus, "annotations")
    try:
        parsed = [parse(_Category, record) for record in section(load_json(path), "categories", path)]
        categories = tuple(Category(name=c.name, isthing=True) for c in parsed)
        return Taxonomy(name=corpus.name, categories=categories)
    except Refusal as refusal:
        raise CorpusError(f"{path}: a category is malformed: {refusal.detail}") from None
    except ValidationError as error:
        raise CorpusError(f"{path}: {error.errors()[0]['msg']}") from None


def _image(
    corpus: CorpusConfig,
    images: CocoImages,
    image_id: str,
    objects: list["_Object"],
    categories: dict[str, list[Any]],
) -> Iterator[Row | Reject]:
    try:
        image = images[image_id]
        if not objects:
            raise Refusal("no-labels", "the image has no object")
    except Refusal as refusal:
        yield refuse(corpus, f"image {image_id}", refusal)
        return
    masks: list[tuple[_Object, Rle]] = []
    for one in objects:
        try:
            masks.append((one, mask(one.segmentation, image)))
        except Refusal as refusal:
            yield refuse(corpus, f"object {one.id}", refusal)
    masks.sort(key=lambda pair: (not pair[0].iscrowd, -area_of(pair[1]), str(pair[0].id)))
    shown = visible_areas([rle for _, rle in masks])
    visible: list[tuple[_Object, Rle]] = []
    for (one, rle), area in zip(masks, shown, strict=True):
        if area and len(visible) < MAX_INSTANCES:
            visible.append((one, rle))
        else:
            hidden = "other objects cover all of it" if not area else f"object {MAX_INSTANCES} and more"
            yield refuse(corpus, f"object {one.id}", Refusal("segmentation", hidden))
    if visible:
        yield _row(corpus, image, visible, categories)
    else:
        yield refuse(corpus, f"image {image_id}", Refusal("no-labels", "no object of the image can be used"))


def _row(
    corpus: CorpusConfig,
    image: CocoImage,
    visible: list[tuple["_Object", Rle]],
    categories: dict[str, list[Any]],
) -> Row:
    segments = (
        Segment(
            id=i,
            category=parse(_Category, only(categories, one.category_id, "category", "category")).name,
            isthing=True,
            iscrowd=one.iscrowd,
            area=0,  # the build counts the pixels that are seen
            bbox=(0, 0, 0, 0),
        )
        for i, (one, _) in enumerate(visible, 1)
    )
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=image.id,
        image_path=image.path,
        height=image.height,
        width=image.width,
        taxonomy=corpus.name,
        labels_path=painted([rle for _, rle in visible]),
        segments=tuple(segments),
        source=Source(
            corpus=corpus.name,
            files=(image.file,),
            ids=tuple(str(one.id) for one, _ in visible),
            licence=image.licence,
        ),
    )


Length = Annotated[Coordinate, Field(ge=0)]


class _Category(Entry):
    id: Id
    name: str = Field(min_length=1)


class _Object(Entry):
    id: Id
    image_id: Id
    category_id: Id
    iscrowd: bool = False
    segmentation: Segmentation
    # not used: the pixels decide. A box that is no box says that the record is broken
    bbox: tuple[Coordinate, Coordinate, Length, Length] | None = None
