"""Images in one folder, label maps in another: what belongs together, and what is left over."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from pipelines.corpora.files import data_file, data_folder, linked_folders
from pipelines.corpora.rows import Refusal, Row, refuse
from pipelines.labels import SegmentRule, label_place
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source
from schemas.taxonomy import ClassFile


def paired(
    corpus: CorpusConfig,
    images: Iterable[tuple[str, str]],
    maps: Mapping[str, str],
    endings: str,
    classes: ClassFile,
    rule: SegmentRule,
    *,
    image_id: Callable[[str], str] = str,
) -> Iterator[Row | Reject]:
    """One row an image with a map, one reject an image or a map without the other, or a link to a folder.

    images, maps    what an image and its map share, and the file below the folder `images` or `labels`
    endings         what a map adds to what is shared, for the message where it is missing
    image_id        of what is shared
    """
    left = dict(maps)
    for shared, name in images:
        try:
            path, file = data_file(corpus, corpus.images, name, "no-image")
            if shared not in left:
                raise Refusal("no-labels", f"no {shared}{endings} in {corpus.labels}")
            labels, labels_file = data_file(corpus, corpus.labels, left.pop(shared), "no-labels")
            yield Row(
                corpus=corpus.name,
                split=corpus.split,
                image_id=image_id(shared),
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
    for name in left.values():
        yield refuse(corpus, f"map {name:.200}", Refusal("no-image", f"no image of it in {corpus.images}"))
    for what, folder in (("images", data_folder(corpus, "images")), ("maps", data_folder(corpus, "labels"))):
        for name in linked_folders(folder):
            detail = (
                "a link to a folder is not followed; move the folder here, or make it a corpus of its own"
            )
            yield refuse(corpus, f"{what} in {name:.200}", Refusal("path", detail))
