"""COCO captions: a JSON with `images` and `annotations`, several captions an image.

Settings used: `images`, `annotations`. Format: https://cocodataset.org/#format-data, section 5.
"""

from collections.abc import Iterator

from pipelines.corpora.coco_images import CocoImages, row
from pipelines.corpora.files import Entry, Id, Text, annotation_file, label, load_json, parse, section, text
from pipelines.corpora.rows import Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image that has captions, in the order of `images`; one reject an unusable caption or image.

    Raises `CorpusError`.
    """
    path = annotation_file(corpus, "annotations")
    document = load_json(path)
    images = CocoImages(corpus, document, path)
    by_image: dict[str, list[_Caption]] = {}
    done: set[str] = set()
    for position, record in enumerate(section(document, "annotations", path)):
        try:
            caption = _caption(record)
            if str(caption.id) in done:
                raise Refusal("duplicate-id", "a caption with this id was read already")
            done.add(str(caption.id))
            by_image.setdefault(str(caption.image_id), []).append(caption)
        except Refusal as refusal:
            yield refuse(corpus, label("caption", record, "id", position), refusal)
    in_order = [image_id for image_id in images.ids() if image_id in by_image]
    for image_id in dict.fromkeys([*in_order, *by_image]):
        try:
            captions = by_image[image_id]
            ids = (str(caption.id) for caption in captions)
            yield row(corpus, images[image_id], ids, captions=tuple(caption.caption for caption in captions))
        except Refusal as refusal:
            yield refuse(corpus, f"image {image_id}", refusal)


def _caption(record: object) -> "_Caption":
    caption = parse(_Caption, record)
    return caption.model_copy(update={"caption": text(caption.caption)})


class _Caption(Entry):
    id: Id
    image_id: Id
    caption: Text
