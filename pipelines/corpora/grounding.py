"""The grounding JSON of the original X-Decoder: COCO instances that carry their referring expressions.

A REFER record merged into the annotation that it refers to; the text is `raw` of each sentence. Made by the
converter of microsoft/X-Decoder. Settings used: `images`, `annotations`.
"""

from collections.abc import Iterator

from pydantic import Field

from pipelines.corpora.coco_images import CocoImages, row
from pipelines.corpora.coco_masks import Segmentation, mask
from pipelines.corpora.files import Entry, Id, Text, annotation_file, label, load_json, parse, section, texts
from pipelines.corpora.rows import Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Referring, Reject


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after one reject an unusable annotation or sentence.

    Raises `CorpusError`.
    """
    path = annotation_file(corpus, "annotations")
    document = load_json(path)
    images = CocoImages(corpus, document, path)
    by_image: dict[str, list[tuple[str, Referring]]] = {}
    done: set[str] = set()
    for position, record in enumerate(section(document, "annotations", path)):
        try:
            grounded = parse(_Grounded, record)
            if str(grounded.ann_id) in done:
                raise Refusal("duplicate-id", "an annotation with this ann_id was read already")
            done.add(str(grounded.ann_id))
            region = mask(grounded.segmentation, images[grounded.image_id])
            sentences, unusable = texts(sentence.raw for sentence in grounded.sentences)
            yield from (refuse(corpus, f"annotation {grounded.ann_id!s:.80}", why) for why in unusable)
            if sentences:
                referring = Referring(sentences=tuple(sentences.values()), mask=region)
                by_image.setdefault(str(grounded.image_id), []).append((str(grounded.ann_id), referring))
        except Refusal as refusal:
            yield refuse(corpus, label("annotation", record, "ann_id", position), refusal)
    for image_id, found in by_image.items():
        ids, regions = zip(*found, strict=True)
        yield row(corpus, images[image_id], ids, referring=regions)


class _Sentence(Entry):
    raw: Text


class _Grounded(Entry):
    ann_id: Id
    image_id: Id
    segmentation: Segmentation
    sentences: tuple[_Sentence, ...] = Field(min_length=1)
