"""A dataset version of our own as a corpus, so that datasets compose: every annotation is carried over.

`root` is the version's folder, <store>/datasets/<name>/versions/<id>; its shards lie beside it. The samples
are those whose split is in `parts`, else the corpus's own split. Settings used: `parts`. A sample keeps its
image, label map, texts and sources; segments keep the taxonomies' names, so two versions that give one name
to different class lists cannot be joined.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines import places
from pipelines.corpora.files import load_json
from pipelines.corpora.rows import CorpusError, Refusal, Row, refuse
from pipelines.labels import label_place
from schemas.jobs import CorpusConfig
from schemas.records import Reject, SampleMeta, Source
from schemas.taxonomy import Taxonomy

_BLOCK = tarfile.BLOCKSIZE
MAX_META_BYTES = 2**26  # of one description; chosen by us


def read(corpus: CorpusConfig) -> Iterator[Row | Reject]:
    """One row a sample in key order, one reject one that cannot be found. Raises `CorpusError`."""
    root = Path(corpus.root).resolve()
    names = {taxonomy.name for taxonomy in taxonomies(corpus)}
    wanted = set(corpus.parts or (corpus.split,))
    for record in _table(root / "samples.parquet"):
        if record["split"] not in wanted:
            continue
        try:
            yield _row(corpus, root, record, names)
        except Refusal as refusal:
            yield refuse(corpus, f"sample {record['key']:.200}", refusal)


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


def _table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        columns = ["key", "split", "shard", "offset", "size_bytes"]
        for batch in pq.ParquetFile(path).iter_batches(columns=columns):
            yield from batch.select(columns).to_pylist()
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise CorpusError(
            f"{path}: cannot be read ({error!s:.200}); `root` is the folder of a version, "
            "<store>/datasets/<name>/versions/<id>"
        ) from None


def _row(corpus: CorpusConfig, root: Path, record: dict[str, Any], taxonomy_names: set[str]) -> Row:
    shard = _shard(root, record["shard"])
    members = _members(shard, record["offset"], record["size_bytes"])
    meta = _meta(members.pop("json", ""))
    images = [suffix for suffix in ("jpg", "png") if suffix in members]
    if len(images) != 1 or (meta.segments is not None) != ("segments.png" in members):
        raise Refusal("record", f"its members are {sorted(members)}")
    if meta.taxonomy is not None and meta.taxonomy not in taxonomy_names:
        raise Refusal("category", f"the version has no class list {meta.taxonomy!r:.80}")
    labels = members.get("segments.png")
    return Row(
        corpus=corpus.name,
        split=corpus.split,
        image_id=meta.key,
        image_path=members[images[0]],
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


def _shard(root: Path, name: str) -> Path:
    shards = root.parent.parent / "shards"
    path = shards / name
    if path.resolve().parent != shards.resolve():
        raise Refusal("path", f"shard {name!r:.200} does not lie in {shards}")
    if not path.is_file():
        raise Refusal("no-image", f"no shard {path}; run: python -m jobs datasets verify")
    return path


def _members(shard: Path, offset: int, size_bytes: int) -> dict[str, str]:
    """The members of a sample's byte range: their places by suffix."""
    found, at, end = {}, offset, offset + size_bytes
    try:
        with shard.open("rb") as file:
            while at < end:
                file.seek(at)
                info = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
                place = places.member(str(shard), at + _BLOCK, info.size)
                found[info.name.partition(".")[2]] = place
                at += _BLOCK + -(-info.size // _BLOCK) * _BLOCK
    except (tarfile.TarError, OSError, ValueError) as error:
        raise Refusal("record", f"{shard.name} at byte {at}: {error}") from None
    if at != end:
        raise Refusal("record", f"{shard.name}: members end at byte {at}, the sample at {end}")
    return found


def _meta(place: str) -> SampleMeta:
    if not place:
        raise Refusal("record", "it has no description")
    if int(place.split(":")[2]) > MAX_META_BYTES:
        raise Refusal("record", f"its description is larger than {MAX_META_BYTES} bytes")
    try:
        return SampleMeta.model_validate_json(places.read(place))
    except (ValidationError, OSError) as error:
        raise Refusal("record", f"its description is malformed: {error!s:.200}") from None
