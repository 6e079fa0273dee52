"""What all COCO annotation files share: the sections `images`, `licenses`, `categories`, and rows of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AliasChoices, Field, ValidationError

from pipelines.corpora import licences
from pipelines.corpora.files import (
    Entry,
    Id,
    Pixels,
    Text,
    annotation_file,
    data_file,
    index,
    load_json,
    only,
    parse,
    section,
    without_id,
)
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source
from schemas.taxonomy import Category, Taxonomy

AnyEntry = TypeVar("AnyEntry", bound=Entry)


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """An entry of `images` whose file exists. `file` is `path` below the corpus root; sizes in pixels."""

    id: str
    path: str
    file: str
    height: int
    width: int
    licence: str


class CocoImages:
    """Images of one annotation file by id."""

    def __init__(self, corpus: CorpusConfig, document: dict[str, Any], path: Path) -> None:
        """Raises `CorpusError` where the file has no list `images`."""
        self._corpus = corpus
        records = section(document, "images", path)
        self._images = index(records)
        self._without_id = list(without_id(records))
        described = document.get("licenses")
        self._licences = index(described if isinstance(described, list) else [])

    def __getitem__(self, image_id: Id) -> CocoImage:
        """Raises `Refusal`: unknown or ambiguous id, wrong types, no file, a path that leaves the root."""
        entry = parse(_Image, only(self._images, image_id, "image", "no-image"))
        path, file = data_file(self._corpus, self._corpus.images, entry.file, "no-image")
        return CocoImage(
            id=str(entry.id),
            path=path,
            file=file,
            height=entry.height,
            width=entry.width,
            licence=licences.of_image(self._corpus, self._licence(entry.license)),
        )

    def ids(self) -> list[str]:
        """In the order of the file, each once."""
        return list(self._images)

    def unusable(self) -> Iterator[Reject]:
        """One reject a record that no annotation can mean: it has no id, or repeats another one."""
        for position, refusal in self._without_id:
            yield refuse(self._corpus, f"image at position {position}", refusal)
        for image_id, records in self._images.items():
            if all(record == records[0] for record in records):  # else the image itself is refused
                for _ in records[1:]:
                    refusal = Refusal(
                        "duplicate-id", "an image with this id stands before, and says the same"
                    )
                    yield refuse(self._corpus, f"image {image_id}", refusal)

    def _licence(self, licence_id: Id | None) -> str:
        if licence_id is None:
            return ""
        try:
            described = parse(_Licence, only(self._licences, licence_id, "licence", "record"))
        except Refusal:
            described = _Licence()
        # the file may name one that it does not describe
        return " ".join(filter(None, (described.name, described.url))) or f"licence {licence_id}"


def row(
    corpus: CorpusConfig, image: CocoImage, ids: Iterable[str], *, files: tuple[str, ...] = (), **said: Any
) -> Row:
    """The row of an image: `ids` of its annotations, `files` beside its own, `said` are fields of `Row`."""
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=image.id,
        image_path=image.path,
        height=image.height,
        width=image.width,
        source=Source(corpus=corpus.name, files=(image.file, *files), ids=tuple(ids), licence=image.licence),
        **said,
    )


def class_list(
    corpus: CorpusConfig, entry: type[AnyEntry], category: Callable[[AnyEntry], Category]
) -> Taxonomy:
    """The `categories` in the order of the file, named after the corpus. Raises `CorpusError`."""
    path = annotation_file(corpus, "annotations")
    try:
        parsed = [parse(entry, record) for record in section(load_json(path), "categories", path)]
        return Taxonomy(name=corpus.name, categories=tuple(map(category, parsed)))
    except Refusal as refusal:
        raise CorpusError(f"{path}: a category is malformed: {refusal.detail}") from None
    except ValidationError as error:
        raise CorpusError(f"{path}: {error.errors()[0]['msg']}") from None


class _Image(Entry):
    id: Id
    # LVIS v1 has no name; its readers take folder and name from the end of the URL
    file_name: str = Field(min_length=1, validation_alias=AliasChoices("file_name", "coco_url"))
    height: Pixels
    width: Pixels
    license: Id | None = None

    @property
    def file(self) -> str:
        return "/".join(self.file_name.split("/")[-2:]) if "://" in self.file_name else self.file_name


class _Licence(Entry):
    name: Text | None = None
    url: Text | None = None
