"""Cityscapes as distributed: `leftImg8bit/train/<city>/*.png` and `gtFine/train/<city>/*_instanceIds.png`.

Instance ids are label id x 1000 + number; a thing without a number is a group of them, a crowd here as in
cityscapesScripts' createPanopticImgs.py. Settings used: `images`, `labels` (the folders of one split).
"""

from collections.abc import Iterator

from pipelines.corpora.class_lists import class_list, instances
from pipelines.corpora.files import data_file, data_folder, files_in
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from pipelines.labels import label_place
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source
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
    for name in files_in(data_folder(corpus, "images"), (IMAGE.lower(),)):
        frame = name.removesuffix(IMAGE)
        try:
            path, file = data_file(corpus, corpus.images, name, "no-image")
            if frame not in maps:
                raise Refusal("no-labels", f"no {frame}{IDS[0]} in {corpus.labels}")
            labels, labels_file = data_file(corpus, corpus.labels, maps.pop(frame), "no-labels")
            yield Row(
                corpus=corpus.name,
                split=corpus.split,
                image_id=frame.rpartition("/")[2],
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
        yield refuse(corpus, f"map {name:.200}", Refusal("no-image", f"no image of it in {corpus.images}"))


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The 19 classes that are evaluated."""
    return instances(corpus, class_list(corpus, "cityscapes"), crowds=True)[0]
