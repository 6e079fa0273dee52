"""Pascal VOC segmentation: a list of names, photographs, and palette PNGs of classes and of objects.

Settings used: `annotations` (ImageSets/Segmentation/train.txt), `images` (JPEGImages), `labels`
(SegmentationClass), `instances` (SegmentationObject; without it no instances are told apart and all classes
are stuff, as for SegmentationClassAug), `background`, `seen_only`. The border (255) is void, and so is the
background unless asked for. Format: the development kit of VOC 2012, section 4.
"""

from collections.abc import Iterator

from pipelines.corpora.class_lists import class_list, instances, semantic
from pipelines.corpora.files import annotation_file, data_file
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from pipelines.labels import CLASS_FACTOR, SegmentRule, label_place
from schemas.jobs import CorpusConfig
from schemas.records import Reject, Source
from schemas.taxonomy import ClassFile, Taxonomy

_BACKGROUND = 1  # its value in SegmentationClass, plus one


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row a name of the list, one reject one that is unusable. Raises `CorpusError`."""
    path = annotation_file(corpus, "annotations")
    _, rule = _classes(corpus)
    try:
        names = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not a text of names: {error}") from None
    done: set[str] = set()
    for number, name in enumerate((name.strip() for name in names), 1):
        if not name:
            continue
        try:
            if name in done:
                raise Refusal("duplicate-id", "the name stands twice in the list")
            done.add(name)
            yield _row(corpus, name, rule)
        except Refusal as refusal:
            yield refuse(corpus, f"line {number}", refusal)


def taxonomy(corpus: CorpusConfig) -> Taxonomy:
    """The 20 classes, behind the background where it is asked for."""
    return _classes(corpus)[0]


def _classes(corpus: CorpusConfig) -> tuple[Taxonomy, SegmentRule]:
    listed = class_list(corpus, "voc")
    if corpus.background:
        changed = {"stuff": listed.stuff | {_BACKGROUND: "background"}, "void": listed.void - {_BACKGROUND}}
        listed = ClassFile.model_validate(listed.model_dump() | changed)
    if not corpus.instances:
        return semantic(corpus, listed)
    return instances(corpus, listed.model_copy(update={"divisor": CLASS_FACTOR}), crowds=False)


def _row(corpus: CorpusConfig, name: str, rule: SegmentRule) -> Row:
    path, file = data_file(corpus, corpus.images, f"{name}.jpg", "no-image")
    labels, labels_file = data_file(corpus, corpus.labels, f"{name}.png", "no-labels")
    place, files = label_place("index_from_0", labels), [file, labels_file]
    if corpus.instances:
        objects, objects_file = data_file(corpus, corpus.instances, f"{name}.png", "no-labels")
        place, files = label_place("class_object", labels, objects), [*files, objects_file]
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=name,
        image_path=path,
        height=None,
        width=None,
        taxonomy=corpus.name,
        labels_path=place,
        rule=rule,
        source=Source(corpus=corpus.name, files=tuple(files), licence=corpus.licence),
    )
