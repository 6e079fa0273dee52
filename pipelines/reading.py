"""A corpus to rows on disk: what its reader yields, in an order that does not depend on its files' order."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.catalog import SourceCard
from pipelines.corpora import readers
from pipelines.corpora.rows import Row
from pipelines.shards import file_sha256
from pipelines.spool import RUN, save
from schemas.jobs import CorpusConfig
from schemas.records import REJECTS, Record, Reject
from schemas.taxonomy import Taxonomy

RUN_BYTES = 64 * 2**20  # chosen by us: what one process holds of a corpus beside its reader
ROW = TypeAdapter(Row)
T = TypeVar("T")


class HarvestOrder(Record):
    """Read a corpus, the `number`th of the build, into the folder `work`."""

    corpus: CorpusConfig
    number: int
    work: str


class Harvest(Record):
    """What reading one corpus gave; its rows lie in `run-<number>-*.arrow`, its rejects beside them."""

    number: int
    num_rows: int
    num_rejects: int
    taxonomy: Taxonomy | None
    source: SourceCard


def harvest(order: HarvestOrder) -> Harvest:
    """Read one corpus. Raises `CorpusError`, and `OSError` where nothing can be written."""
    corpus, number, folder = order.corpus, order.number, Path(order.work)
    rejects: list[dict[str, Any]] = []
    documents: list[bytes] = []
    hashes: list[int] = []
    num_rows = num_runs = size_bytes = 0
    for item in readers.read(corpus):
        if isinstance(item, Reject):
            rejects.append(item.model_dump())
            continue
        documents.append(ROW.dump_json(in_order(item)))
        hashes.append(place_hash(item.image_path))
        num_rows += 1
        size_bytes += len(documents[-1])
        if size_bytes >= RUN_BYTES:
            _save_run(folder / f"run-{number:04d}-{num_runs:04d}.arrow", number, hashes, documents)
            documents, hashes, size_bytes, num_runs = [], [], 0, num_runs + 1
    _save_run(folder / f"run-{number:04d}-{num_runs:04d}.arrow", number, hashes, documents)
    save(folder / f"unread-{number:04d}.arrow", pa.Table.from_pylist(rejects, schema=REJECTS))
    return Harvest(
        number=number,
        num_rows=num_rows,
        num_rejects=len(rejects),
        taxonomy=readers.taxonomy(corpus),
        source=_source(corpus),
    )


def in_order(row: Row) -> Row:
    """The annotations of a row by their ids, or by what they say where they have none.

    So the order of the lines of an annotation file is not part of a version.
    """
    ids = row.source.ids
    said = {
        "referring": _sorted(row.referring, ids),
        "captions": _sorted(row.captions, ids),
        "questions": _sorted(row.questions, ids),
    }
    source = row.source.model_copy(update={"ids": _sorted(ids, ids)})
    return replace(row, source=source, **said)  # type: ignore[arg-type]


def place_hash(place: str) -> int:
    """64 bits that decide which part of the build looks after an image."""
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest())


def _sorted(items: Sequence[T], ids: Sequence[str]) -> tuple[T, ...]:
    if len(items) < 2:
        return tuple(items)
    if len(ids) == len(items):
        pairs = sorted(zip(ids, items, strict=True), key=lambda pair: (len(pair[0]), pair[0]))
        return tuple(item for _, item in pairs)
    return tuple(sorted(items, key=str))


def _save_run(path: Path, number: int, hashes: list[int], documents: list[bytes]) -> None:
    by_hash = np.array(hashes, dtype=np.uint64)
    order = np.argsort(by_hash, kind="stable")
    table = pa.table(
        {
            "hash": by_hash[order],
            "corpus": np.full(len(order), number, dtype=np.int32),
            "document": pa.array([documents[i] for i in order], pa.binary()),
        },
        schema=RUN,
    )
    save(path, table)


def _source(corpus: CorpusConfig) -> SourceCard:
    names = [name for name in (corpus.annotations, corpus.instances, corpus.questions) if name]
    return SourceCard(
        corpus=corpus.name,
        format=corpus.format,
        split=corpus.split,
        licence=corpus.licence,
        files={name: file_sha256(Path(corpus.root) / name) for name in names},
    )
