"""The table of formats. A format is a function from a corpus to rows and rejects; a new one is a new line."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from pipelines.corpora import captions_tsv, coco_captions, coco_panoptic, refcoco, vqa_v2
from pipelines.corpora.rows import CorpusError, Row
from schemas.jobs import CorpusConfig, Format
from schemas.records import Reject
from schemas.taxonomy import Taxonomy

Reader = Callable[[CorpusConfig], Iterator[Row | Reject]]

READERS: dict[Format, Reader] = {
    "coco_panoptic": coco_panoptic.read,
    "refcoco": refcoco.read,
    "captions_tsv": captions_tsv.read,
    "coco_captions": coco_captions.read,
    "vqa_v2": vqa_v2.read,
}


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """Read the annotation files of a corpus, one row an image, at most `corpus.limit` rows (0 is all).

    Raises `CorpusError` where a file is missing, cannot be parsed, has another layout, or holds no record.
    """
    num_rows = num_rejects = 0
    for item in READERS[corpus.format](corpus):
        if isinstance(item, Reject):
            num_rejects += 1
        elif corpus.limit and num_rows == corpus.limit:
            break
        else:
            num_rows += 1
            item = replace(item, image_number=_number(corpus, item))
        yield item
    if not num_rows + num_rejects:
        raise CorpusError(
            f"corpus {corpus.name!r} ({corpus.format}, {corpus.split}) is empty: no record in "
            f"{corpus.annotations!r} under {corpus.root!r}; check its paths and its split"
        )


def _number(corpus: CorpusConfig, row: Row) -> str:
    """`COCO_val2014_000000000042.jpg`, `000000000042.jpg` and 42 are one image of the list."""
    digits = re.findall(r"\d+", PurePosixPath(row.image_id).stem)
    return f"{corpus.image_ids} {int(digits[-1])}" if corpus.image_ids and digits else ""


def taxonomy(corpus: CorpusConfig) -> Taxonomy | None:
    """The classes that the corpus labels, in the order of its file; None where its format labels none.

    `seen` is true for all of them here: which classes have a mask in training only the build knows.
    """
    return coco_panoptic.taxonomy(corpus) if corpus.format == "coco_panoptic" else None
