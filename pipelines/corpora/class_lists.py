"""The class list that a corpus of index maps names, and the rule that it gives for its segments."""

from pydantic import ValidationError

from pipelines.corpora.files import below_root
from pipelines.corpora.rows import CorpusError
from pipelines.labels import Kind, SegmentRule
from schemas.jobs import CorpusConfig
from schemas.taxonomy import SHIPPED, Category, ClassFile, Taxonomy, class_file, shipped_file


def class_list(corpus: CorpusConfig, default: str = "") -> ClassFile:
    """The shipped list, or the file below the root, that `classes` names. Raises `CorpusError`."""
    name = corpus.classes or default
    try:
        if name in SHIPPED:
            return shipped_file(name)
        if name.endswith((".yaml", ".yml")):
            return class_file(below_root(corpus, name))
    except ValueError as error:
        raise CorpusError(str(error)) from None
    raise CorpusError(
        f"corpus {corpus.name!r} ({corpus.format}): set `classes` to one of {sorted(SHIPPED)}, or to a YAML "
        f"file below its root; it is {name!r}"
    )


def semantic(corpus: CorpusConfig, classes: ClassFile) -> tuple[Taxonomy, SegmentRule]:
    """Class list -> taxonomy and rule of maps that do not part instances: every class is stuff.

    A region of "person" that holds three people is no thing; MaskFormer's semantic data sets do the same.
    """
    full = classes.taxonomy(corpus.name)
    kept = tuple(Category(name=c.name, isthing=False, seen=c.seen) for c in full.categories)
    kinds = {i: Kind(name=name, isthing=False) for i, name in (classes.things | classes.stuff).items()}
    return _taxonomy(corpus, kept), _rule(corpus, classes, kinds)


def instances(corpus: CorpusConfig, classes: ClassFile, *, crowds: bool) -> tuple[Taxonomy, SegmentRule]:
    """Class list -> taxonomy and rule of maps that number the instances of things."""
    kinds = {i: Kind(name=name, isthing=True) for i, name in classes.things.items()}
    kinds |= {i: Kind(name=name, isthing=False) for i, name in classes.stuff.items()}
    full = classes.taxonomy(corpus.name).categories
    rule = _rule(corpus, classes, kinds).model_copy(update={"divisor": classes.divisor, "crowds": crowds})
    return _taxonomy(corpus, full), rule


def _taxonomy(corpus: CorpusConfig, categories: tuple[Category, ...]) -> Taxonomy:
    try:
        plain = tuple(category.model_copy(update={"seen": True}) for category in categories)
        return Taxonomy(name=corpus.name, categories=plain)
    except ValidationError as error:
        raise CorpusError(f"classes of corpus {corpus.name!r}: {error.errors()[0]['msg']}") from None


def _rule(corpus: CorpusConfig, classes: ClassFile, kinds: dict[int, Kind]) -> SegmentRule:
    hidden = {i for i, kind in kinds.items() if corpus.seen_only and kind.name in classes.unseen}
    return SegmentRule(
        kinds={i: kind for i, kind in sorted(kinds.items()) if i not in hidden}, void=classes.void | hidden
    )
