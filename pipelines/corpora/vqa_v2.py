"""VQA v2: a questions JSON and an annotations JSON that meet in `question_id`, ten answers a question.

Settings used: `images`, `annotations`, `questions`. An image is found by its number:
`COCO_<data_subtype>_<12 digits>.jpg` as in COCO 2014, or `<12 digits>.jpg` as in COCO 2017. Format: https://visualqa.org/vqa_v1_download.html.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from pipelines.corpora.files import (
    Entry,
    Id,
    Text,
    annotation_file,
    data_file,
    id_of,
    index,
    label,
    load_json,
    only,
    parse,
    section,
    text,
    texts,
    without_id,
)
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Question, Reject, Source


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, in order of appearance, after the rejected questions and answers.

    Raises `CorpusError`.
    """
    questions_path = annotation_file(corpus, "questions")
    asked = load_json(questions_path)
    subset = asked.get("data_subtype")
    if not isinstance(subset, str):
        raise CorpusError(
            f"{questions_path}: no `data_subtype` (e.g. train2014), which names the image files"
        )
    answered_path = annotation_file(corpus, "annotations")
    answered = section(load_json(answered_path), "annotations", answered_path)
    answers = index(answered, "question_id")
    by_image: dict[int, list[tuple[str, Question]]] = {}
    done: set[str | None] = set()
    for position, record in enumerate(section(asked, "questions", questions_path)):
        try:
            entry = parse(_Asked, record)
            if str(entry.question_id) in done:
                raise Refusal("duplicate-id", "a question with this id was read already")
            found, question = _answered(entry, answers), text(entry.question)
            said, unusable = texts(answer.answer for answer in found.answers)
            yield from (refuse(corpus, f"question {entry.question_id!s:.80}", why) for why in unusable)
            if said:
                whole = Question(question=question, answers=tuple(said.values()), kind=found.question_type)
                by_image.setdefault(entry.image_id, []).append((str(entry.question_id), whole))
        except Refusal as refusal:
            yield refuse(corpus, label("question", record, "question_id", position), refusal)
        done.add(id_of(record, "question_id"))
    for unasked in [i for i in answers if i not in done]:
        yield refuse(corpus, f"question {unasked:.80}", Refusal("record", "an answer without a question"))
    for position, why in without_id(answered, "question_id"):
        yield refuse(corpus, f"answer at position {position}", why)
    for image_id, questions in by_image.items():
        try:
            yield _row(corpus, subset, image_id, questions)
        except Refusal as refusal:
            yield refuse(corpus, f"image {image_id}", refusal)


def _answered(asked: "_Asked", answers: dict[str, list[Any]]) -> "_Answered":
    answered = parse(_Answered, only(answers, asked.question_id, "annotation", "record"))
    if answered.image_id != asked.image_id:
        raise Refusal("record", f"asked of image {asked.image_id}, answered of image {answered.image_id}")
    return answered


def _row(corpus: CorpusConfig, subset: str, image_id: int, questions: list[tuple[str, Question]]) -> Row:
    path, file = _image(corpus, subset, image_id)
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=str(image_id),
        image_path=path,
        height=None,
        width=None,
        questions=tuple(question for _, question in questions),
        source=Source(
            corpus=corpus.name,
            files=(file,),
            ids=tuple(question_id for question_id, _ in questions),
            licence=corpus.licence,
        ),
    )


def _image(corpus: CorpusConfig, subset: str, image_id: int) -> tuple[str, str]:
    try:
        return data_file(corpus, corpus.images, f"{image_id:012d}.jpg", "no-image")
    except Refusal:
        return data_file(corpus, corpus.images, f"COCO_{subset}_{image_id:012d}.jpg", "no-image")


class _Asked(Entry):
    question_id: Id
    image_id: int = Field(ge=0, lt=10**12)
    question: Text


class _Answer(Entry):
    answer: Text


class _Answered(Entry):
    image_id: int
    question_type: Text
    answers: tuple[_Answer, ...] = Field(min_length=1)
