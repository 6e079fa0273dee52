"""Pictures and words -> answers as pictures and JSON. The command line and the pyfunc model both ask here."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from schemas.jobs import ZeroShotConfig
from schemas.tasks import TASKS
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference.generate import Search
from xdecoder.inference.predictor import Picture, Predictor
from xdecoder.inference.zeroshot import ZeroShot

KINDS = {"thing": True, "stuff": False}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked. `texts` are phrases, questions or texts to rank by; `classes` as in `parse_classes`;
    `beams` are those of captioning, 1 is greedy; `zeroshot` tells the semantic task's classes that had no
    mask in training.
    """

    images: tuple[Picture, ...]
    task: str
    texts: tuple[str, ...] = ()
    classes: str = ""
    beams: int = 1
    zeroshot: ZeroShotConfig = ZeroShotConfig()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer: what it is about, its JSON document and, where there is something to see, its picture."""

    name: str
    document: dict[str, Any]
    picture: Image.Image | None


def predict(predictor: Predictor, request: Request) -> list[Answer]:
    """Answer a request.

    Raises `ValueError` for an unknown task or class, a missing text, an unreadable picture.
    """
    if request.task not in TASKS:
        near = _nearest(request.task, TASKS)
        raise ValueError(f"unknown task {request.task!r}{near}; the tasks are {list(TASKS)}")
    if request.zeroshot != ZeroShotConfig() and request.task != "semantic":
        raise ValueError(f"zeroshot settings are of the task 'semantic', not of {request.task!r}")
    return ASK[request.task](predictor, request)


def write(answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Write `<name>.json` and, where there is a picture, `<name>.png`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for answer in answers:
        path = folder / f"{answer.name}.json"
        path.write_text(json.dumps(answer.document), encoding="utf-8")
        paths.append(path)
        if answer.picture is not None:
            paths.append(path.with_suffix(".png"))
            answer.picture.save(paths[-1])
    return paths


def parse_classes(text: str, known: Taxonomy) -> Taxonomy | None:
    """ "red circle, lava:stuff" -> a taxonomy; None where the text is empty.

    With a semicolon anywhere, classes stand between semicolons and a class's synonyms between commas, as in
    taxonomies: "painting, picture; zebra, striped horse:thing" and "painting, picture;" are two and one.

    A class that the model was not trained with needs to say whether it is a `:thing` (counted one by one) or
    `:stuff` (one region): nothing else could tell. Raises `ValueError` where it does not.
    """
    names = [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]
    if not names:
        return None
    categories = {category.name: category for category in (_category(name, known) for name in names)}
    return Taxonomy(name="prediction", categories=tuple(categories.values()))


def _category(text: str, known: Taxonomy) -> Category:
    name, _, kind = (part.strip() for part in text.partition(":"))
    if kind in KINDS:
        return Category(name=name, isthing=KINDS[kind])
    found = next((category for category in known.categories if category.name == text), None)
    if found is None:
        wider = next((n for n in known.names if "," in n and text in map(str.strip, n.split(","))), "")
        hint = f"; it is one of several names: write '{wider};'" if wider else _nearest(text, known.names)
        raise ValueError(
            f"class {text!r} is not one that the model was trained with{hint}; "
            f"if you mean it, write '{name}:thing' or '{name}:stuff'"
        )
    return found


def _segment(method: Callable[..., Sequence[Any]], predictor: Predictor, request: Request) -> list[Answer]:
    classes = parse_classes(request.classes, predictor.vocabulary.taxonomy)
    return _each(request, method(predictor, request.images, classes))


def _semantic(predictor: Predictor, request: Request) -> list[Answer]:
    classes = parse_classes(request.classes, predictor.vocabulary.taxonomy)
    zeroshot = ZeroShot.of(request.zeroshot, predictor.model, predictor.card.image_text_size)
    return _each(request, predictor.semantic(request.images, classes, zeroshot=zeroshot))


def _caption(predictor: Predictor, request: Request) -> list[Answer]:
    return _each(request, predictor.caption(request.images, search=Search(beams=request.beams)))


def _refer(predictor: Predictor, request: Request) -> list[Answer]:
    phrases = _texts(request, "a phrase")
    return _each(request, [predictor.refer(image, phrases) for image in request.images])


def _answer(predictor: Predictor, request: Request) -> list[Answer]:
    questions = _texts(request, "a question")
    answers = [predictor.answer(image, questions) for image in request.images]
    return [
        Answer(name=f"{name}-{i}", document=result.to_json(), picture=result.draw())
        for name, results in zip(_names(request), answers, strict=True)
        for i, result in enumerate(results, start=1)
    ]


def _retrieve(predictor: Predictor, request: Request) -> list[Answer]:
    ranked = predictor.retrieve(request.images, _texts(request, "a text to rank by"))
    images = [str(i) if isinstance(i, str | Path) else f"image {n}" for n, i in enumerate(request.images)]
    document = {"images": images, **ranked.to_json()}
    return [Answer(name="retrieval", document=document, picture=None)]


ASK: dict[str, Callable[[Predictor, Request], list[Answer]]] = {
    "semantic": _semantic,
    "instance": partial(_segment, Predictor.instance),
    "panoptic": partial(_segment, Predictor.panoptic),
    "referring": _refer,
    "retrieval": _retrieve,
    "captioning": _caption,
    "vqa": _answer,
}


def _each(request: Request, results: Sequence[Any]) -> list[Answer]:
    return [
        Answer(name=name, document=result.to_json(), picture=result.draw())
        for name, result in zip(_names(request), results, strict=True)
    ]


def _names(request: Request) -> list[str]:
    """A file name for each picture: its own and the task's, with a number where two would be equal."""
    stems = [Path(i).stem if isinstance(i, str | Path) else "image" for i in request.images]
    again = [stems[:i].count(stem) for i, stem in enumerate(stems)]
    return [f"{s}-{request.task}" + (f"-{n + 1}" if n else "") for s, n in zip(stems, again, strict=True)]


def _texts(request: Request, what: str) -> tuple[str, ...]:
    if not request.texts or not all(text.strip() for text in request.texts):
        raise ValueError(f"task {request.task!r} needs {what}: give it with --text")
    return request.texts


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
