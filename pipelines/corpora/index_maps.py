"""Semantic corpora: a folder of images, and a folder of maps of one channel whose values are classes.

COCO-Stuff's pixel maps, ADE20K's 150 and 847 classes, and anything alike: `classes` names the list of values.
A map has the path of its image with .png or .tif. Instances are not told apart, so all classes are stuff.
Settings used: `images`, `labels`, `classes`, `seen_only`.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.corpora.class_lists import class_list, semantic
from pipelines.corpora.files import IMAGES, data_folder, files_in
from pipelines.corpora.paired import paired
from pipelines.corpora.rows import Row
from schemas.jobs import CorpusConfig
from schemas.records import Reject
from schemas.taxonomy import Taxonomy

MAPS = (".png", ".tif", ".tiff")


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image with a map, one reject an image or a map without the other. Raises `CorpusError`."""
    classes = class_list(corpus)
    _, rule = semantic(corpus, classes)
    maps = {_stem(name): name for name in files_in(data_folder(corpus, "labels"), MAPS)}
    images = ((_stem(name), name) for name in files_in(data_folder(corpus, "images"), IMAGES))
    yield from paired(corpus, images, maps, ".png or .tif", classes, rule)


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The classes of the list, all of them stuff. Raises `CorpusError`."""
    return semantic(corpus, class_list(corpus))[0]


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
