"""Captions with Karpathy's splits: `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`.

Settings used: `images`, `annotations`, `parts` (train, restval, val, test). An image lies in its `filepath`
(val2014, where there is one) below `images`. Source: https://cs.stanford.edu/people/karpathy/deepimagesent.
"""

from collections.abc import Iterator

from pydantic import Field

from pipelines.corpora.files import (
    Entry,
    Id,
    Text,
    annotation_file,
    data_file,
    label,
    load_json,
    of_parts,
    parse,
    section,
    texts,
)
from pipelines.corpora.rows import Refusal, Row, lost_captions, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image of the parts, one reject an unusable image or caption. Raises `CorpusError`."""
    path = annotation_file(corpus, "annotations")
    done: set[str] = set()
    for position, record in enumerate(of_parts(section(load_json(path), "images", path), corpus, path)):
        try:
            image = parse(_Image, record)
            if str(image.imgid) in done:
                raise Refusal("duplicate-id", "an image with this imgid was read already")
            done.add(str(image.imgid))
            captions, unusable = texts(sentence.raw for sentence in image.sentences)
            yield from lost_captions(corpus, f"image {image.imgid}", captions, unusable)
            if captions:
                yield _row(corpus, image, captions)
        except Refusal as refusal:
            yield refuse(corpus, label("image", record, "imgid", position), refusal)


def _row(corpus: CorpusConfig, image: "_Image", captions: dict[int, str]) -> Row:
    path, file = data_file(corpus, corpus.images, f"{image.filepath}/{image.filename}".strip("/"), "no-image")
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=str(image.imgid if image.cocoid is None else image.cocoid),
        image_path=path,
        height=None,
        width=None,
        captions=tuple(captions.values()),
        source=Source(
            corpus=corpus.name,
            files=(file,),
            ids=tuple(str(image.sentences[place].sentid) for place in captions),
            licence=corpus.licence,
        ),
    )


class _Sentence(Entry):
    raw: Text
    sentid: Id


class _Image(Entry):
    imgid: Id
    filename: Text = Field(min_length=1)
    filepath: Text = ""
    cocoid: Id | None = None
    sentences: tuple[_Sentence, ...] = Field(min_length=1)
