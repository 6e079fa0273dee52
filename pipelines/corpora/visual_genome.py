"""Visual Genome: region descriptions, and questions with one answer each.

A region is a box with a phrase, and a box is not a mask. So by default its phrase is a caption of the whole
image, as the captioning literature takes it; with `regions: referring` the box stands for the mask, which
teaches a model to draw boxes: a choice for whoever has nothing better. Settings used: `images`, `annotations`
(region_descriptions.json), `questions` (question_answers.json), `regions`; one of the two files is enough. An
image is `<id>.jpg` below `images`, in VG_100K, VG_100K_2 or itself.
Format: https://homes.cs.washington.edu/~ranjay/visualgenome/api_readme.html.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, Field

from pipelines.corpora.files import Entry, Id, Text, annotation_file, data_file, id_of, parse, text
from pipelines.corpora.gathering import Gathered
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.masks import area_of, box_rle
from schemas.records import Question, Referring, Reject, Source

FOLDERS = ("VG_100K", "VG_100K_2", ".")
REGION, QUESTION = "r", "q"  # before the JSON of one that is gathered
CHUNK = 2**22  # characters of a file read at a time; chosen by us


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after one reject an unusable region or question.

    Raises `CorpusError`.
    """
    if not corpus.annotations and not corpus.questions:
        raise CorpusError(f"corpus {corpus.name!r} (visual_genome): set `annotations` or `questions`")
    said = Gathered()
    if corpus.annotations:
        yield from _regions(corpus, said)
    if corpus.questions:
        yield from _questions(corpus, said)
    for image_id, found in said:
        try:
            regions = [_kind(corpus).model_validate_json(r[1:]) for r in found if r[0] == REGION]
            questions = [_Asked.model_validate_json(q[1:]) for q in found if q[0] == QUESTION]
            yield from _row(corpus, image_id, regions, questions)
        except Refusal as refusal:
            yield refuse(corpus, f"image {image_id}", refusal)


def _regions(corpus: CorpusConfig, said: Gathered) -> Iterator[Reject]:
    done: set[str] = set()
    for image_id, record in _records(annotation_file(corpus, "annotations"), "regions"):
        try:
            region = parse(_kind(corpus), record)
            if str(region.region_id) in done:
                raise Refusal("duplicate-id", "a region with this id was read already")
            done.add(str(region.region_id))
            region = region.model_copy(update={"phrase": text(region.phrase)})
            said.add(_known(image_id), REGION + region.model_dump_json())
        except Refusal as refusal:
            yield refuse(corpus, f"region {id_of(record, 'region_id')} of image {image_id}", refusal)


def _questions(corpus: CorpusConfig, said: Gathered) -> Iterator[Reject]:
    done: set[str] = set()
    for image_id, record in _records(annotation_file(corpus, "questions"), "qas"):
        try:
            asked = parse(_Asked, record)
            if str(asked.qa_id) in done:
                raise Refusal("duplicate-id", "a question with this id was read already")
            done.add(str(asked.qa_id))
            clean = {"question": text(asked.question), "answer": text(asked.answer)}
            said.add(_known(image_id), QUESTION + asked.model_copy(update=clean).model_dump_json())
        except Refusal as refusal:
            yield refuse(corpus, f"question {id_of(record, 'qa_id')} of image {image_id}", refusal)


def _records(path: Path, name: str) -> Iterator[tuple[str | None, Any]]:
    """The records of a list of images, each with the image's id. Raises `CorpusError`."""
    found = False
    try:
        for image in _elements(path):
            records = image.get(name) if isinstance(image, dict) else None
            found |= isinstance(image, dict) and name in image
            image_id = id_of(image, "image_id") or id_of(image)  # version 1.0 says image_id, 1.2 says id
            for record in records if isinstance(records, list) else [image]:
                yield image_id, record
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(
            f"{path}: cannot be read as a JSON list ({error}); is it whole, and the right kind of file?"
        ) from None
    if not found:
        raise CorpusError(f"{path}: expected a list of images with {name!r}; is it the right kind of file?")


def _elements(path: Path) -> Iterator[Any]:
    """The elements of a JSON list, of which one at a time is held. Raises `ValueError`, `OSError`."""
    decoder, before, passed, at = json.JSONDecoder(), re.compile(r"\s*\[\s*"), 0, 0
    with path.open(encoding="utf-8-sig", errors="surrogatepass") as file:
        text = file.read(CHUNK)
        while True:
            try:
                found = before.match(text, at)
                element, end = decoder.raw_decode(text, found.end() if found else len(text))
                if not re.compile(r"\s*[,\]]").match(text, end):  # a number may go on
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            except json.JSONDecodeError as error:
                if more := file.read(max(CHUNK, len(text))):
                    text, passed, at = text[at:] + more, passed + at, 0
                    continue
                if re.fullmatch(r"\s*\]\s*" if passed + at else r"\s*\[\s*\]\s*", text[at:]):
                    return
                raise ValueError(f"{error.msg}: character {passed + error.pos}") from None
            yield element
            at, before = end, re.compile(r"\s*,\s*")


def _known(image_id: str | None) -> str:
    if image_id is None or not image_id.isdecimal():
        raise Refusal("record", f"the image has no number: {image_id!r:.80}")
    return image_id


def _row(
    corpus: CorpusConfig, image_id: str, regions: list["_Region"], questions: list["_Asked"]
) -> Iterator[Row | Reject]:
    path, file = _image(corpus, image_id)
    captions: tuple[str, ...] = ()
    referring: list[Referring] = []
    ids = [f"question {asked.qa_id}" for asked in questions]
    if corpus.regions == "captions":
        captions = tuple(region.phrase for region in regions)
        ids += [f"region {region.region_id}" for region in regions]
    else:
        size = _size(path) if regions else (0, 0)
        for region in regions:
            try:
                referring.append(_boxed(region, size))
                ids.append(f"region {region.region_id}")
            except Refusal as refusal:
                yield refuse(corpus, f"region {region.region_id} of image {image_id}", refusal)
    yield Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=image_id,
        image_path=path,
        height=None,
        width=None,
        captions=captions,
        referring=tuple(referring),
        questions=tuple(map(_question, questions)),
        source=Source(corpus=corpus.name, files=(file,), ids=tuple(ids), licence=corpus.licence),
    )


def _question(asked: "_Asked") -> Question:
    kind = asked.question.split()[0].lower()  # Visual Genome asks what, where, when, who, why and how
    return Question(question=asked.question, answers=(asked.answer,), kind=kind)


def _boxed(region: "_Region", size: tuple[int, int]) -> Referring:
    assert isinstance(region, _Box)
    box = (round(region.x), round(region.y), round(region.width), round(region.height))
    mask = box_rle(box, *size)
    if not area_of(mask):
        raise Refusal("segmentation", f"the box {box} holds no pixel of the image of height, width {size}")
    return Referring(sentences=(region.phrase,), mask=mask)


def _size(path: str) -> tuple[int, int]:
    """Height and width from the header: the regions' file does not state them."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except Exception as error:  # what a decoder raises on hostile bytes is anything
        raise Refusal("no-image", f"{path}: {type(error).__name__}: {error}") from None


def _image(corpus: CorpusConfig, image_id: str) -> tuple[str, str]:
    for folder in FOLDERS:
        try:
            return data_file(corpus, corpus.images, f"{folder}/{image_id}.jpg", "no-image")
        except Refusal as refusal:
            last = refusal
    raise last


Coordinate = Annotated[float, Field(gt=-(2**31), lt=2**31)]
Length = Annotated[float, Field(gt=0, lt=2**31)]


class _Region(Entry):
    region_id: Id = Field(validation_alias=AliasChoices("region_id", "id"))
    phrase: Text


class _Box(_Region):
    x: Coordinate
    y: Coordinate
    width: Length
    height: Length


def _kind(corpus: CorpusConfig) -> type[_Region]:
    """Boxes are looked at where they are used alone."""
    return _Region if corpus.regions == "captions" else _Box


class _Asked(Entry):
    qa_id: Id
    question: Text
    answer: Text
