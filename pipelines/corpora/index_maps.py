"""Semantic corpora: a folder of images, and a folder of maps of one channel whose values are classes.

COCO-Stuff's pixel maps, ADE20K's 150 and 847 classes, and anything alike: `classes` names the list of values.
A map has the path of its image with .png or .tif. Instances are not told apart, so all classes are stuff.
Settings used: `images`, `labels`, `classes`, `seen_only`.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipelines.corpora.class_lists import class_list, semantic
from pipelines.corpora.files import IMAGES, data_file, data_folder, files_in
from pipelines.corpora.rows import Refusal, Row, refuse
from pipelines.labels import label_place
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source
from schemas.taxonomy import Taxonomy

MAPS = (".png", ".tif", ".tiff")


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row an image with a map, one reject an image or a map without the other. Raises `CorpusError`."""
    classes = class_list(corpus)
    _, rule = semantic(corpus, classes)
    maps = {_stem(name): name for name in files_in(data_folder(corpus, "labels"), MAPS)}
    for name in files_in(data_folder(corpus, "images"), IMAGES):
        try:
            path, file = data_file(corpus, corpus.images, name, "no-image")
            if _stem(name) not in maps:
                raise Refusal("no-labels", f"no map {_stem(name)}.png or .tif in {corpus.labels}")
            labels, labels_file = data_file(corpus, corpus.labels, maps.pop(_stem(name)), "no-labels")
            yield Row(
                corpus=corpus.name,
                split=corpus.split,
                image_id=_stem(name),
                image_path=path,
                height=None,
                width=None,
                taxonomy=corpus.name,
                labels_path=label_place(classes.encoding, labels),
                rule=rule,
                source=Source(corpus=corpus.name, files=(file, labels_file), licence=corpus.licence),
            )
        except Refusal as refusal:
            yield refuse(corpus, f"image {name:.200}", refusal)
    for name in maps.values():
        yield refuse(
            corpus, f"map {name:.200}", Refusal("no-image", f"no image in {corpus.images} of this name")
        )


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The classes of the list, all of them stuff. Raises `CorpusError`."""
    return semantic(corpus, class_list(corpus))[0]


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
