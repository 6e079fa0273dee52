"""Rows that are one image, joined: the samples of one part of a build, as they will be written."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from pipelines.catalog import Counts
from pipelines.checking import facts_in
from pipelines.curate import entry
from pipelines.reading import Rows
from pipelines.shards import Entry
from pipelines.spool import ENTRIES, gather, hash64, mapped, save
from schemas.records import Record, SampleMeta

ENTRY = TypeAdapter(Entry)


class JoinOrder(Record):
    """Members `first` to `stop` of `members.arrow`: the samples of one part."""

    part: int
    first: int
    stop: int
    work: str
    num_parts: int


class JoinReport(Record):
    """`entries-<part>.arrow` is written. What it adds to the dataset's card.

    masked     by taxonomy, the categories that have a training mask
    answers    of the training questions, how often each was given
    """

    part: int
    counts: dict[str, Counts]
    masked: dict[str, tuple[str, ...]]
    answers: dict[str, int]


def join(order: JoinOrder) -> JoinReport:
    """Make and save the samples of one part. Raises `OSError` where they cannot be written."""
    work = Path(order.work)
    entries = list(_entries(order, work))
    save(
        work / f"entries-{order.part:04d}.arrow",
        pa.Table.from_pylist([_row(e) | {"copy_of": copy_of} for copy_of, e in entries], schema=ENTRIES),
    )
    metas = [e.meta for _, e in entries]
    trained = [meta for meta in metas if meta.split == "train"]
    masked: dict[str, set[str]] = {}
    for meta in trained:
        if meta.taxonomy is not None:
            masked.setdefault(meta.taxonomy, set()).update(s.category for s in meta.segments or ())
    return JoinReport(
        part=order.part,
        counts={split: _counts([m for m in metas if m.split == split]) for split in ("train", "val")},
        masked={name: tuple(sorted(found)) for name, found in masked.items()},
        answers=dict(Counter(a for m in trained for q in m.questions for a in q.answers)),
    )


def _entries(order: JoinOrder, work: Path) -> Iterator[tuple[str, Entry]]:
    """The samples, each behind the key of the one that it is a copy of."""
    members = mapped(work / "members.arrow").slice(order.first, order.stop - order.first)
    if not len(members):
        return
    files = [work / f"checked-{part:04d}.arrow" for part in range(order.num_parts)]
    places = members["part"].to_numpy(), members["row"].to_numpy()
    found = gather(files, *places, ["corpus", "rule", "document", "facts", "index_map"]).to_pylist()
    keys = zip(members["key"].to_pylist(), members["copy_of"].to_pylist(), strict=True)
    named = zip(members["sample"].to_pylist(), keys, found, strict=True)
    rows = Rows(work)
    for (_, (key, copy_of)), group in groupby(named, key=lambda member: member[:2]):
        one = [row for *_, row in group]
        of_files = {file: facts for row in one for file, facts in facts_in(row.pop("facts")).items()}
        index_map = "".join(row.pop("index_map") for row in one)  # at most one row has a label map
        yield copy_of, entry(key, [rows.row(**row) for row in one], of_files, index_map)


def _row(sample: Entry) -> dict[str, Any]:
    meta = sample.meta
    return {
        "key": meta.key,
        "bits": hash64(meta.key.encode()),
        "split": meta.split,
        "stream": sample.stream,
        "source_bytes": sample.size_bytes,
        "digest": bytes.fromhex(sample.digest),
        "segments": len(meta.segments or ()),
        "referring": len(meta.referring),
        "captions": len(meta.captions),
        "questions": len(meta.questions),
        **_part_hashes(sample),
        "document": ENTRY.dump_json(sample),
    }


def _part_hashes(sample: Entry) -> dict[str, int]:
    said = sample.meta.model_dump(mode="json")
    parts = {
        "split": said["split"],
        "pixels": said["sha256"],
        "labels": [said["taxonomy"], said["segments"], sample.labels_sha256],
        "referring": said["referring"],
        "captions": said["captions"],
        "questions": said["questions"],
        "sources": said["sources"],
    }
    return {f"{part}_hash": hash64(json.dumps(what).encode()) for part, what in parts.items()}


def _counts(metas: list[SampleMeta]) -> Counts:
    return Counts(
        samples=len(metas),
        segments=sum(len(m.segments or ()) for m in metas),
        referring=sum(len(r.sentences) for m in metas for r in m.referring),
        captions=sum(len(m.captions) for m in metas),
        questions=sum(len(m.questions) for m in metas),
    )
