"""RefCOCO, RefCOCO+, RefCOCOg: a pickle of expressions that point into an instances JSON.

Settings used: `images`, `annotations` (the pickle `refs(...).p`), `instances`, `parts`.
Layout: https://github.com/lichengunc/refer. The pickle is read as data only; nothing in it can run.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.corpora.coco_images import CocoImage, CocoImages, row
from pipelines.corpora.coco_masks import Segmentation, mask
from pipelines.corpora.files import (
    Entry,
    Id,
    Text,
    annotation_file,
    index,
    label,
    load_json,
    of_parts,
    only,
    parse,
    section,
    texts,
)
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Referring, Reject, Rle


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after one reject an unusable ref or sentence.

    Raises `CorpusError`.
    """
    refs_path, instances_path = annotation_file(corpus, "annotations"), annotation_file(corpus, "instances")
    document = load_json(instances_path)
    images = CocoImages(corpus, document, instances_path)
    instances = index(section(document, "annotations", instances_path))
    by_image: dict[str, list[tuple[str, Referring]]] = {}
    done: set[str] = set()
    for position, record in enumerate(of_parts(load_refs(refs_path), corpus, refs_path)):
        try:
            ref = parse(_Ref, record)
            if str(ref.ref_id) in done:
                raise Refusal("duplicate-id", "a ref with this id was read already")
            done.add(str(ref.ref_id))
            region = _mask(ref, images[ref.image_id], instances)
            sentences, unusable = texts(sentence.sent for sentence in ref.sentences)
            yield from (refuse(corpus, f"ref {ref.ref_id!s:.80}", why) for why in unusable)
            if sentences:
                referring = Referring(sentences=tuple(sentences.values()), mask=region)
                by_image.setdefault(str(ref.image_id), []).append((str(ref.ref_id), referring))
        except Refusal as refusal:
            yield refuse(corpus, label("ref", record, "ref_id", position), refusal)
    for image_id, found in by_image.items():
        ids, regions = zip(*found, strict=True)
        yield row(corpus, images[image_id], ids, referring=regions)


def load_refs(path: Path) -> list[Any]:
    """The list inside a `refs(...).p`. Raises `CorpusError` where it is anything but plain data."""
    try:
        whole = io.BytesIO(path.read_bytes())  # which gives no more than it has, whatever length is claimed
        # Python 2 wrote the published files; what is not UTF-8 becomes a surrogate, which `parse` refuses
        refs = _PlainUnpickler(whole, encoding="utf-8", errors="surrogateescape").load()
    except Exception as error:  # a malformed pickle can raise anything
        raise CorpusError(
            f"{path}: not a pickle of plain data ({type(error).__name__}: {error!s:.200})"
        ) from None
    if not isinstance(refs, list):
        raise CorpusError(
            f"{path}: expected a list of refs, found {type(refs).__name__}; use a refs(...).p of REFER"
        )
    return refs


class _PlainUnpickler(pickle._Unpickler):
    """Builds lists, dicts, texts and numbers; a pickle that names a function or class is refused unexecuted.

    The Python implementation, because the C one sizes its memo by an index in the file: a forged
    file of six bytes could ask for 64 GB. And without byte arrays and buffers: one of twelve bytes could ask
    for as much.
    """

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in {*pickle.BYTEARRAY8, *pickle.NEXT_BUFFER, *pickle.READONLY_BUFFER}
    }

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in a corpus may run")


def _mask(ref: "_Ref", image: CocoImage, instances: dict[str, list[Any]]) -> Rle:
    instance = parse(_Instance, only(instances, ref.ann_id, "instance", "segmentation"))
    if str(instance.image_id) != str(ref.image_id):
        raise Refusal(
            "record", f"the ref is of image {ref.image_id!r}, its instance of image {instance.image_id!r}"
        )
    return mask(instance.segmentation, image)


class _Instance(Entry):
    image_id: Id
    segmentation: Segmentation


class _Sentence(Entry):
    sent: Text


class _Ref(Entry):
    ref_id: Id
    ann_id: Id
    image_id: Id
    split: Text
    sentences: tuple[_Sentence, ...] = Field(min_length=1)
