"""A dataset version of our own as a corpus, so that datasets compose: every annotation is carried over.

`root` is the version's folder, <store>/datasets/<name>/versions/<id>; its shards lie beside it. The samples
are those whose split is in `parts`, else the corpus's own split. Settings used: `parts`. A sample keeps its
image, label map, texts and sources; segments keep the taxonomies' names, so two versions that give one name
to different class lists cannot be joined. The bytes of each sample are compared with the hash that was
written, and what they say is distrusted as that of any other corpus.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines import places
from pipelines.corpora.files import label, load_json, text
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from pipelines.labels import label_place
from schemas.jobs import CorpusConfig
from schemas.records import SAMPLES, Question, Referring, Reject, SampleMeta, Source
from schemas.taxonomy import Taxonomy

_BLOCK = tarfile.BLOCKSIZE
_COLUMNS = ("key", "split", "shard", "offset", "size_bytes", "sha256")
MAX_META_BYTES = 2**26  # of one description; chosen by us

Kinds = dict[str | None, set[tuple[str, bool]]]  # by taxonomy, the classes and whether they are things


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row a sample in key order, one reject one that cannot be found or is not as it was written.

    Raises `CorpusError`.
    """
    root = Path(corpus.root).resolve()
    kinds: Kinds = {t.name: {(c.name, c.isthing) for c in t.categories} for t in taxonomies(corpus)}
    wanted = set(corpus.parts or (corpus.split,))
    for position, record in enumerate(_table(root, _COLUMNS)):
        # one without a split belongs to all of them: it is refused, and so it is counted
        if record["split"] is not None and record["split"] not in wanted:
            continue
        try:
            yield _row(corpus, root, record, kinds)
        except Refusal as refusal:
            yield refuse(corpus, label("sample", record, "key", position), refusal)


def taxonomies(corpus: CorpusConfig) -> tuple[Taxonomy, ...]:
    """The class lists of the version, all classes seen again: the build that reads them decides anew."""
    path = Path(corpus.root).resolve() / "dataset.json"
    try:
        found = [Taxonomy.model_validate(listed) for listed in load_json(path).get("taxonomies", {}).values()]
    except (ValidationError, AttributeError) as error:
        raise CorpusError(f"{path}: not the card of a dataset version: {error!s:.200}") from None
    return tuple(
        Taxonomy(name=t.name, categories=tuple(c.model_copy(update={"seen": True}) for c in t.categories))
        for t in found
    )


def shards(corpus: CorpusConfig) -> Iterator[Path]:
    """The shards that the version names, whether they are there or not. Raises `CorpusError`."""
    root = Path(corpus.root).resolve()
    for name in {record["shard"] for record in _table(root, ("shard",))}:
        try:
            yield _place(root, name)
        except Refusal:
            continue  # of which nothing is read


def _table(root: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    path = root / "samples.parquet"
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        for column in columns:
            if not schema.field(column).equals(SAMPLES.field(column)):
                raise ValueError(f"{column!r} is {schema.field(column).type}")
        for batch in file.iter_batches(columns=list(columns)):
            yield from batch.select(columns).to_pylist()
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise CorpusError(
            f"{path}: cannot be read ({error!s:.200}); `root` is the folder of a version, "
            "<store>/datasets/<name>/versions/<id>"
        ) from None


def _row(corpus: CorpusConfig, root: Path, record: dict[str, Any], kinds: Kinds) -> Row:
    if missing := [column for column, value in record.items() if value is None]:
        raise Refusal("record", f"samples.parquet does not say its {', '.join(missing)}")
    shard, offset = _place(root, record["shard"]), record["offset"]
    if not os.path.isfile(shard):  # pathlib's would raise where the name is too long
        raise Refusal("no-image", f"no shard {shard}; run: python -m jobs datasets verify")
    data = _written(shard, offset, record["size_bytes"], record["sha256"])
    members = _members(f"{shard.name} at byte {offset}", data)
    if "json" not in members:
        raise Refusal("record", "it has no description")
    meta = _meta(data[members.pop("json")], kinds)
    images = [suffix for suffix in ("jpg", "png") if suffix in members]
    if len(images) != 1 or (meta.segments is not None) != ("segments.png" in members):
        raise Refusal("record", f"its members are {sorted(members)}")
    at = {
        suffix: places.member(str(shard), offset + span.start, span.stop - span.start)
        for suffix, span in members.items()
    }
    labels = at.get("segments.png")
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=meta.key,
        image_path=at[images[0]],
        height=meta.height,
        width=meta.width,
        taxonomy=meta.taxonomy,
        labels_path=None if labels is None else label_place("index", labels),
        segments=meta.segments,
        referring=meta.referring,
        captions=meta.captions,
        questions=meta.questions,
        source=Source(corpus=corpus.name, files=(record["shard"],), ids=(meta.key,), licence=corpus.licence),
        origins=meta.sources,
    )


def _place(root: Path, name: str | None) -> Path:
    """Where a shard of the version lies."""
    folder = root.parent.parent / "shards"
    path = folder / str(name)
    try:
        inside = path.resolve().parent == folder.resolve()
    except (OSError, ValueError):  # of a loop of links, or a name with a zero byte
        inside = False
    if not inside:
        raise Refusal("path", f"shard {name!r:.200} does not lie in {folder}")
    return path


def _written(shard: Path, offset: int, size_bytes: int, sha256: str) -> bytes:
    """A sample's byte range, as it was written."""
    try:
        data = places.read(places.member(str(shard), offset, size_bytes))
    except (OSError, ValueError) as error:
        raise Refusal("record", f"{shard.name} at byte {offset}: {error}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        changed = "its bytes are not those written; run: python -m jobs datasets verify"
        raise Refusal("record", f"{shard.name} at byte {offset}: {changed}")
    return data


def _members(where: str, data: bytes) -> dict[str, slice]:
    """The members of a sample's bytes: which of them, by suffix."""
    found, at = {}, 0
    try:
        while at < len(data):
            info = tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "strict")
            if not 0 <= info.size <= len(data):
                raise tarfile.ReadError(f"a member claims {info.size} bytes")
            found[info.name.partition(".")[2]] = slice(at + _BLOCK, at + _BLOCK + info.size)
            at += _BLOCK + -(-info.size // _BLOCK) * _BLOCK
    except (tarfile.TarError, ValueError) as error:
        raise Refusal("record", f"{where}: behind {at} bytes: {error}") from None
    if at != len(data):
        raise Refusal("record", f"{where}: members end behind {at} bytes, not the sample")
    return found


def _meta(data: bytes, kinds: Kinds) -> SampleMeta:
    """A description, with texts and classes as any reader lets them in; masks are checked with the pixels."""
    if len(data) > MAX_META_BYTES:
        raise Refusal("record", f"its description is larger than {MAX_META_BYTES} bytes")
    try:
        meta = SampleMeta.model_validate_json(data)
    except ValidationError as error:
        raise Refusal("record", f"its description is malformed: {error!s:.200}") from None
    if min(meta.height, meta.width) < 1:
        raise Refusal("record", f"its height, width are {(meta.height, meta.width)}")
    if meta.taxonomy is not None and meta.taxonomy not in kinds:
        raise Refusal("category", f"the version has no class list {meta.taxonomy!r:.80}")
    segments = meta.segments or ()
    if unknown := {(s.category, s.isthing) for s in segments} - kinds.get(meta.taxonomy, set()):
        raise Refusal("category", f"not in the class list {meta.taxonomy!r:.80}: {sorted(unknown)[:5]}")
    if [segment.id for segment in segments] != [*range(1, len(segments) + 1)]:
        raise Refusal("segmentation", "its segments are not numbered 1, 2 ...")
    if not all(r.sentences for r in meta.referring) or not all(q.answers for q in meta.questions):
        raise Refusal("record", "a mask without an expression, or a question without an answer")
    said = {
        "captions": tuple(map(text, meta.captions)),
        "referring": tuple(
            Referring(sentences=tuple(map(text, r.sentences)), mask=r.mask) for r in meta.referring
        ),
        "questions": tuple(
            Question(question=text(q.question), answers=tuple(map(text, q.answers)), kind=q.kind)
            for q in meta.questions
        ),
    }
    return meta.model_copy(update=said)
