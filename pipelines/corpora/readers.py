"""The table of formats. A format is a function from a corpus to rows and rejects; a new one is a new line."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pipelines.corpora import (
    captions_table,
    cityscapes,
    coco_captions,
    coco_instances,
    coco_panoptic,
    dataset,
    grounding,
    index_maps,
    karpathy,
    refcoco,
    visual_genome,
    voc,
    vqa_v2,
    webdataset,
)
from pipelines.corpora.files import CONTAINERS, IMAGES, matching
from pipelines.corpora.rows import CorpusError, Row
from pipelines.shards import file_sha256, is_shard
from schemas.jobs import CorpusConfig, Format
from schemas.records import Reject
from schemas.taxonomy import SHIPPED, Taxonomy

Reader = Callable[[CorpusConfig], Iterator[Row | Reject]]

READERS: dict[Format, Reader] = {
    "coco_panoptic": coco_panoptic.read,
    "coco_instances": coco_instances.read,
    "index_maps": index_maps.read,
    "cityscapes": cityscapes.read,
    "voc": voc.read,
    "refcoco": refcoco.read,
    "grounding": grounding.read,
    "visual_genome": visual_genome.read,
    "coco_captions": coco_captions.read,
    "karpathy": karpathy.read,
    "captions_table": captions_table.read,
    "webdataset": webdataset.read,
    "vqa_v2": vqa_v2.read,
    "dataset": dataset.read,
}

# Formats with segments: the one class list that their rows name.
TAXONOMIES: dict[Format, Callable[[CorpusConfig], Taxonomy]] = {
    "coco_panoptic": coco_panoptic.taxonomy,
    "coco_instances": coco_instances.taxonomy,
    "index_maps": index_maps.taxonomy,
    "cityscapes": cityscapes.taxonomy,
    "voc": voc.taxonomy,
}

_COCO_NUMBER = re.compile("(?:COCO_[a-z]+20[0-9]{2}_)?0*([0-9]+)")  # of an id or a file name of COCO


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
    """`COCO_val2014_000000000042.jpg`, `000000000042.jpg` and 42 are one image of the list; any other id, as
    2007_000032, is taken whole.
    """
    own = _own_id(row) if corpus.image_ids else ""
    name = own.rpartition("/")[2].removesuffix(cityscapes.IMAGE)
    stem = name.rpartition(".")[0] if name.lower().endswith(IMAGES) else name
    number = _COCO_NUMBER.fullmatch(stem)
    return stem and f"{corpus.image_ids} {number[1] if number else stem}"


def _own_id(row: Row) -> str:
    """What the image is called by whoever published it; empty where that is not known.

    Of a sample that was built before, what the first of its sources says that is no version.
    """
    if row.origins:
        first = [s for s in row.origins if s.files and not is_shard(s.files[0])]
        known = [s.ids if s.files[0].endswith(CONTAINERS) else s.files for s in first]
        return next((found[0] for found in known if found), "")
    if not row.image_id.startswith(f"{row.source.files[0]}#"):
        return row.image_id
    return row.source.ids[0] if row.source.ids else ""


def taxonomies(corpus: CorpusConfig) -> tuple[Taxonomy, ...]:
    """The class lists that the rows' `taxonomy` names, in the order of their files; none of texts alone.

    `seen` is true for all of them here: which classes have a mask in training only the build knows.
    """
    if corpus.format == "dataset":
        return dataset.taxonomies(corpus)
    return (TAXONOMIES[corpus.format](corpus),) if corpus.format in TAXONOMIES else ()


def fingerprints(corpus: CorpusConfig) -> dict[str, str]:
    """What the card of a version says of each annotation file: its sha256, or "N bytes" of one with images.

    Names are relative to the root. Raises `CorpusError`, and `OSError` where a file cannot be read.
    """
    found = {}
    named = [corpus.annotations, corpus.instances, corpus.questions, corpus.classes]
    if corpus.format == "dataset":
        named.append("dataset.json")
    root = Path(corpus.root).resolve()
    for name in (name for name in named if name and name not in SHIPPED and not (root / name).is_dir()):
        for path in matching(corpus, name):
            relative = path.relative_to(root).as_posix()
            whole = path.suffix not in CONTAINERS  # reading terabytes only to hash them would take hours
            found[relative] = file_sha256(path) if whole else f"{path.stat().st_size} bytes"
    return found
