"""COCO instances: objects as polygons or run lengths; a label map of things alone is derived from them.

Objects overlap and a label map cannot: smaller ones lie on top of larger ones, and crowds, which stay crowds,
lie under all of them. What no object covers is void. Settings used: `images`, `annotations`.
Format: https://cocodataset.org/#format-data, section 1.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from pipelines.corpora.coco_images import CocoImage, CocoImages, class_list, row
from pipelines.corpora.coco_masks import MAX_INSTANCES, Coordinate, Segmentation, mask
from pipelines.corpora.files import Entry, Id, annotation_file, index, label, load_json, only, parse, section
from pipelines.corpora.rows import Refusal, Row, refuse
from pipelines.labels import painted
from schemas.jobs import CorpusConfig
from schemas.masks import area_of, visible_areas
from schemas.records import Reject, Rle, Segment
from schemas.taxonomy import Category, Taxonomy


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image with objects, in the order of `images`; one reject an unusable object or image.

    Raises `CorpusError`.
    """
    path = annotation_file(corpus, "annotations")
    document = load_json(path)
    images = CocoImages(corpus, document, path)
    categories = index(section(document, "categories", path))
    by_image: dict[str, list[_Named]] = {}
    done: set[str] = set()
    for position, record in enumerate(section(document, "annotations", path)):
        try:
            parsed = parse(_Object, record)
            category = parse(_Category, only(categories, parsed.category_id, "category", "category"))
            if str(parsed.id) in done:
                raise Refusal("duplicate-id", "an object with this id was read already")
            done.add(str(parsed.id))
            by_image.setdefault(str(parsed.image_id), []).append((category.name, parsed))
        except Refusal as refusal:
            yield refuse(corpus, label("object", record, "id", position), refusal)
    yield from images.unusable()
    for image_id in dict.fromkeys([*images.ids(), *by_image]):
        yield from _image(corpus, images, image_id, by_image.get(image_id, []))


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The `categories` in the order of the file, all of them things. Raises `CorpusError`."""
    return class_list(corpus, _Category, lambda c: Category(name=c.name, isthing=True))


def _image(
    corpus: CorpusConfig,
    images: CocoImages,
    image_id: str,
    objects: list["_Named"],
) -> Iterator[Row | Reject]:
    try:
        image = images[image_id]
        if not objects:
            raise Refusal("no-labels", "the image has no object")
    except Refusal as refusal:
        yield refuse(corpus, f"image {image_id}", refusal)
        return
    masks: list[tuple[str, _Object, Rle]] = []
    for name, one in objects:
        try:
            masks.append((name, one, mask(one.segmentation, image)))
        except Refusal as refusal:
            yield refuse(corpus, f"object {one.id}", refusal)
    masks.sort(key=lambda found: (not found[1].iscrowd, -area_of(found[2]), str(found[1].id)))
    shown = visible_areas([rle for *_, rle in masks])
    visible: list[tuple[str, _Object, Rle]] = []
    for (name, one, rle), area in zip(masks, shown, strict=True):
        if area and len(visible) < MAX_INSTANCES:
            visible.append((name, one, rle))
        else:
            hidden = "other objects cover all of it" if not area else f"object {MAX_INSTANCES} and more"
            yield refuse(corpus, f"object {one.id}", Refusal("segmentation", hidden))
    if visible:
        yield _row(corpus, image, visible)
    else:
        yield refuse(corpus, f"image {image_id}", Refusal("no-labels", "no object of the image can be used"))


def _row(corpus: CorpusConfig, image: CocoImage, visible: list[tuple[str, "_Object", Rle]]) -> Row:
    segments = (
        Segment(
            id=i,
            category=name,
            isthing=True,
            iscrowd=one.iscrowd,
            area=0,  # the build counts the pixels that are seen
            bbox=(0, 0, 0, 0),
        )
        for i, (name, one, _) in enumerate(visible, 1)
    )
    return row(
        corpus,
        image,
        (str(one.id) for _, one, _ in visible),
        taxonomy=corpus.name,
        labels_path=painted([rle for *_, rle in visible]),
        segments=tuple(segments),
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


_Named = tuple[str, _Object]  # with the name of its class
