"""What a corpus states of an image's licence, as one text: name, address, or both with a space between."""

from collections.abc import Mapping
from typing import Any

from pipelines.corpora.files import text
from schemas.jobs import CorpusConfig

COLUMNS = ("licence", "license")  # of tables, and keys of the JSON beside an image


def of_image(corpus: CorpusConfig, stated: Any) -> str:
    """The licence that the corpus's settings name, else the one stated of the image; empty where none is.

    Raises `Refusal` where that is no readable text.
    """
    if corpus.licence or not isinstance(stated, str) or not stated.strip():
        return corpus.licence
    return text(stated)


def stated(record: Mapping[str, Any]) -> Any:
    """What a record says of it."""
    return next((record[column] for column in COLUMNS if record.get(column)), None)


def forms(licence: str) -> tuple[str, ...]:
    """What a pattern may match of it: the name, the address."""
    name, _, address = licence.rpartition(" ")
    return (name, address) if name and "://" in address else (licence,)
