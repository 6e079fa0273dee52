"""Cityscapes as distributed: `leftImg8bit/train/<city>/*.png` and `gtFine/train/<city>/*_instanceIds.png`.

Instance ids are label id x 1000 + number; a thing without a number is a group of them, a crowd here as in
cityscapesScripts' createPanopticImgs.py. Settings used: `images`, `labels` (the folders of one split).
"""

from collections.abc import Iterator

from pipelines.corpora.class_lists import class_list, instances
from pipelines.corpora.files import data_folder, files_in
from pipelines.corpora.paired import paired
from pipelines.corpora.rows import CorpusError, Row
from schemas.jobs import CorpusConfig
from schemas.records import Reject
from schemas.taxonomy import Taxonomy

IMAGE = "_leftImg8bit.png"
IDS = ("_gtFine_instanceIds.png", "_gtCoarse_instanceIds.png")


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image, one reject an image or a label map without the other. Raises `CorpusError`."""
    classes = class_list(corpus, "cityscapes")
    _, rule = instances(corpus, classes, crowds=True)
    folder = data_folder(corpus, "labels")
    maps = {name.removesuffix(end): name for end in IDS for name in files_in(folder, (end.lower(),))}
    if not maps:
        raise CorpusError(f"{folder}: no *{IDS[0]}; is it a folder such as gtFine/train?")
    names = files_in(data_folder(corpus, "images"), (IMAGE.lower(),))
    frames = ((name.removesuffix(IMAGE), name) for name in names)
    yield from paired(
        corpus, frames, maps, IDS[0], classes, rule, image_id=lambda frame: frame.rpartition("/")[2]
    )


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The 19 classes that are evaluated."""
    return instances(corpus, class_list(corpus, "cityscapes"), crowds=True)[0]
