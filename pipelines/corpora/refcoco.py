"""RefCOCO, RefCOCO+, RefCOCOg: a pickle of expressions that point into an instances JSON.

Settings used: `images`, `annotations` (the pickle `refs(...).p`), `instances`, `ref_split`.
Layout: https://github.com/lichengunc/refer. The pickle is read as data only; nothing in it can run.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipelines.corpora.coco_images import CocoImage, CocoImages
from pipelines.corpora.files import (
    Entry,
    Id,
    Text,
    annotation_file,
    index,
    label,
    load_json,
    only,
    parse,
    section,
    text,
)
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.masks import annotation_rle, decode_rle
from schemas.records import Referring, Reject, Rle, Source

MAX_PIXELS = 2**28  # of an image whose masks are decoded here; chosen by us, above any photograph


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after one reject an unusable ref. Raises `CorpusError`."""
    refs_path, instances_path = annotation_file(corpus, "annotations"), annotation_file(corpus, "instances")
    document = load_json(instances_path)
    images = CocoImages(corpus, document, instances_path)
    instances = index(section(document, "annotations", instances_path))
    by_image: dict[str, list[tuple[str, Referring]]] = {}
    done: set[str] = set()
    for position, record in enumerate(_of_split(load_refs(refs_path), corpus, refs_path)):
        try:
            ref = parse(_Ref, record)
            if str(ref.ref_id) in done:
                raise Refusal("duplicate-id", "a ref with this id was read already")
            done.add(str(ref.ref_id))
            referring = _referring(ref, images[ref.image_id], instances)
            by_image.setdefault(str(ref.image_id), []).append((str(ref.ref_id), referring))
        except Refusal as refusal:
            yield refuse(corpus, label("ref", record, "ref_id", position), refusal)
    for image_id, found in by_image.items():
        yield _row(corpus, images[image_id], found)


def load_refs(path: Path) -> list[Any]:
    """The list inside a `refs(...).p`. Raises `CorpusError` where it is anything but plain data."""
    try:
        with path.open("rb") as file:
            # Python 2 wrote the published files; what is not UTF-8 becomes a surrogate, which `parse` refuses
            refs = _PlainUnpickler(file, encoding="utf-8", errors="surrogateescape").load()
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
    file of six bytes could ask for 64 GB.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in a corpus may run")


def _of_split(refs: list[Any], corpus: CorpusConfig, path: Path) -> list[Any]:
    wanted = corpus.ref_split or corpus.split
    # a record without a readable split belongs to all of them: it is refused, and so it is counted
    splits = [ref.get("split") if isinstance(ref, dict) else None for ref in refs]
    chosen = [
        ref for ref, split in zip(refs, splits, strict=True) if split == wanted or not isinstance(split, str)
    ]
    if wanted not in splits:
        there = sorted({split for split in splits if isinstance(split, str)})
        raise CorpusError(
            f"{path}: no ref of split {wanted!r}; there are {there}: choose one with `ref_split`"
        )
    return chosen


def _referring(ref: "_Ref", image: CocoImage, instances: dict[str, list[Any]]) -> Referring:
    instance = parse(_Instance, only(instances, ref.ann_id, "instance", "segmentation"))
    if str(instance.image_id) != str(ref.image_id):
        raise Refusal(
            "record", f"the ref is of image {ref.image_id!r}, its instance of image {instance.image_id!r}"
        )
    return Referring(
        sentences=tuple(text(sentence.sent) for sentence in ref.sentences),
        mask=_mask(instance.segmentation, image),
    )


def _mask(segmentation: "list[list[float]] | _Runs", image: CocoImage) -> Rle:
    if image.height * image.width > MAX_PIXELS:
        raise Refusal("segmentation", f"the image claims {image.height} x {image.width} pixels")
    outlines = segmentation if isinstance(segmentation, list) else []
    far = 4 * max(image.height, image.width)  # pycocotools allocates by the length of an outline
    if any(abs(number) > far for outline in outlines for number in outline):
        raise Refusal("segmentation", "a polygon lies far outside the image")
    try:
        plain = segmentation.model_dump() if isinstance(segmentation, _Runs) else segmentation
        rle = annotation_rle(plain, image.height, image.width)
        covered = decode_rle(rle).any()
    except ValueError as error:
        raise Refusal("segmentation", str(error)) from None
    if not covered:
        raise Refusal("segmentation", "the mask is empty")
    return rle


def _row(corpus: CorpusConfig, image: CocoImage, found: list[tuple[str, Referring]]) -> Row:
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=image.id,
        image_path=image.path,
        height=image.height,
        width=image.width,
        referring=tuple(referring for _, referring in found),
        source=Source(
            corpus=corpus.name,
            files=(image.file,),
            ids=tuple(ref_id for ref_id, _ in found),
            licence=image.licence,
        ),
    )


Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Run = Annotated[int, Field(ge=0, lt=2**31)]


class _Runs(Entry):
    size: tuple[int, int]
    counts: Text | list[Run]


class _Instance(Entry):
    image_id: Id
    segmentation: list[list[Coordinate]] | _Runs


class _Sentence(Entry):
    sent: Text


class _Ref(Entry):
    ref_id: Id
    ann_id: Id
    image_id: Id
    split: Text
    sentences: tuple[_Sentence, ...] = Field(min_length=1)
