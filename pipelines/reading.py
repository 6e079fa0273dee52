"""A corpus to rows on disk: what its reader yields, in an order that does not depend on its files' order."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.atomic import write_atomically
from pipelines.captions import repeated
from pipelines.catalog import SourceCard
from pipelines.corpora import readers
from pipelines.corpora.rows import CorpusError, Row
from pipelines.labels import SegmentRule
from pipelines.screening import all_captions, screen
from pipelines.spool import RUN, save
from schemas.jobs import CorpusConfig, CurateConfig
from schemas.records import REJECTS, Record, Reject
from schemas.taxonomy import Taxonomy

log = logging.getLogger(__name__)
RUN_BYTES = 64 * 2**20  # chosen by us: what one process holds of a corpus beside its reader
ROW = TypeAdapter(Row)
T = TypeVar("T")


class HarvestOrder(Record):
    """Read a corpus, the `number`th of the build, into the folder `work`."""

    corpus: CorpusConfig
    curate: CurateConfig
    number: int
    work: str


class Harvest(Record):
    """What reading one corpus gave; its rows lie in `run-<number>-*.arrow`, its rejects beside them.

    num_said    annotations of its rows, as far as they are read and refused one by one
    """

    number: int
    num_rows: int
    num_said: int
    num_rejects: int
    taxonomies: tuple[Taxonomy, ...]
    source: SourceCard


def harvest(order: HarvestOrder) -> Harvest:
    """Read one corpus. Raises `CorpusError`, and `OSError` where nothing can be written."""
    try:
        return _harvest(order)
    except (CorpusError, OSError):
        raise
    except Exception as error:  # a record that no reader foresaw: the error says of which corpus
        corpus = order.corpus
        where = f"corpus {corpus.name!r} ({corpus.format}, {corpus.split})"
        log.exception("%s cannot be read", where)
        raise CorpusError(
            f"{where} under {corpus.root!r}: its reader failed ({type(error).__name__}: {error!s:.200}); the "
            "log says where. Report it, and until then leave out what it fails at"
        ) from error


def _harvest(order: HarvestOrder) -> Harvest:
    corpus, number, folder = order.corpus, order.number, Path(order.work)
    rejects: list[dict[str, Any]] = []
    run = _Run()
    rules: dict[str, int] = {}  # one serves all rows of a corpus: it is stored once
    num_rows = num_said = num_runs = 0
    most = order.curate.captions.max_repeats if corpus.split == "train" else 0
    often = repeated(all_captions(readers.read(corpus)), most) if most else frozenset()
    for item in screen(readers.read(corpus), order.curate, often):
        if isinstance(item, Reject):
            rejects.append(item.model_dump())
            continue
        rule = rules.setdefault(item.rule.model_dump_json(), len(rules)) if item.rule else -1
        run.add(in_order(item), rule)
        num_rows += 1
        num_said += max(len(item.source.ids), _num_texts(item))
        if run.size_bytes >= RUN_BYTES:
            run.save(folder / f"run-{number:04d}-{num_runs:04d}.arrow", number)
            run, num_runs = _Run(), num_runs + 1
    run.save(folder / f"run-{number:04d}-{num_runs:04d}.arrow", number)
    write_atomically(folder / f"rules-{number:04d}.json", json.dumps(list(rules)).encode(), durable=False)
    save(folder / f"unread-{number:04d}.arrow", pa.Table.from_pylist(rejects, schema=REJECTS))
    return Harvest(
        number=number,
        num_rows=num_rows,
        num_said=num_said,
        num_rejects=len(rejects),
        taxonomies=readers.taxonomies(corpus),
        source=SourceCard(
            corpus=corpus.name,
            format=corpus.format,
            split=corpus.split,
            licence=corpus.licence,
            files=readers.fingerprints(corpus),
        ),
    )


class Rows:
    """From documents back to rows, with the rules of the corpora that lie in `work`."""

    def __init__(self, work: Path) -> None:
        self._rules = {
            int(path.stem.removeprefix("rules-")): [SegmentRule.model_validate_json(r) for r in listed]
            for path in work.glob("rules-*.json")
            if (listed := json.loads(path.read_bytes()))
        }

    def row(self, corpus: int, rule: int, document: bytes) -> Row:
        row = ROW.validate_json(document)
        return row if rule < 0 else replace(row, rule=self._rules[corpus][rule])


def in_order(row: Row) -> Row:
    """The annotations of a row by their ids, or by what they say where they have none.

    So the order of the lines of an annotation file is not part of a version. What comes from a version has
    its order.
    """
    if row.origins:
        return row
    ids = row.source.ids
    said = {
        "referring": _sorted(row.referring, ids),
        "captions": _sorted(row.captions, ids),
        "questions": _sorted(row.questions, ids),
    }
    source = row.source.model_copy(update={"ids": _sorted(ids, ids)})
    return replace(row, source=source, **said)  # type: ignore[arg-type]


def _num_texts(row: Row) -> int:
    """What may be refused one by one: a question of ten answers is ten."""
    expressions = sum(len(one.sentences) for one in row.referring)
    return len(row.captions) + expressions + sum(len(one.answers) for one in row.questions)


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


class _Run:
    """Rows on their way to disk."""

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self.rules: list[int] = []
        self.documents: list[bytes] = []
        self.size_bytes = 0

    def add(self, row: Row, rule: int) -> None:
        self.hashes.append(place_hash(row.image_path))
        self.rules.append(rule)
        self.documents.append(ROW.dump_json(row, exclude={"rule"}))
        self.size_bytes += len(self.documents[-1])

    def save(self, path: Path, number: int) -> None:
        hashes = np.array(self.hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        table = pa.table(
            {
                "hash": hashes[order],
                "corpus": np.full(len(order), number, dtype=np.int32),
                "rule": np.array(self.rules, dtype=np.int32)[order],
                "document": pa.array([self.documents[i] for i in order], pa.binary()),
            },
            schema=RUN,
        )
        save(path, table)
