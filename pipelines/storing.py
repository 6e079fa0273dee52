"""Planned shards to files, one task a shard; and what is known of those that are there already."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.atomic import write_atomically
from pipelines.facts import stamp
from pipelines.joining import ENTRY
from pipelines.parallel import WorkerError, each
from pipelines.planning import LightSamples, Plan
from pipelines.shards import Receipt, file_sha256, intact, receipt_of, receipt_path, shard_name, write
from pipelines.spool import gather, mapped
from schemas.jobs import BuildConfig
from schemas.records import MANIFEST, SAMPLES, Record, Split
from schemas.tasks import Stream

Stamps = Mapping[str, list[int | str] | None]


class StoreOrder(Record):
    """Samples `first` to `stop` of `plan.arrow` are the shard `name`."""

    name: str
    first: int
    stop: int
    work: str
    folder: str
    num_parts: int


class StoreReport(Record):
    """The shard and its receipt are in their folder."""

    name: str
    num_samples: int
    size_bytes: int
    written: bool


def store(order: StoreOrder) -> StoreReport:
    """Write one shard, or find it there and whole.

    Raises `ShardError` where a file changed since it was inspected, `OSError` where the disk refuses.
    """
    folder, work = Path(order.folder), Path(order.work)
    places = mapped(work / "plan.arrow").slice(order.first, order.stop - order.first)
    files = [work / f"entries-{part:04d}.arrow" for part in range(order.num_parts)]
    found = gather(files, places["part"].to_numpy(), places["row"].to_numpy(), ["key", "document"])
    there, written = intact(folder / order.name, found["key"].to_pylist()), False
    if there is None:
        entries = [ENTRY.validate_json(document) for document in found["document"].to_pylist()]
        there, written = write(order.name, entries, folder), True
    return StoreReport(
        name=order.name,
        num_samples=len(there.members),
        size_bytes=there.size_bytes,
        written=written,
    )


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A shard that is there: of which (split, stream), and whether this build wrote it."""

    kind: tuple[Split, Stream]
    receipt: Receipt
    written: bool


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The folder of a dataset's shards; `stamps` remembers when each was last hashed and whole."""

    folder: Path
    stamps: Path

    def store(
        self, samples: LightSamples, planned: Plan, work: Path, num_parts: int, config: BuildConfig
    ) -> list[Stored]:
        """Every planned shard, in the order of the plan. Those that nobody touched are not read again.

        Raises `WorkerError`.
        """
        starts = planned.starts.tolist()
        kinds = [samples.kinds[k] for k in samples.kind[planned.order[planned.starts[:-1]]].tolist()]
        names = [
            shard_name(split, stream, digest)
            for (split, stream), digest in zip(kinds, planned.digests, strict=True)
        ]
        shared: dict[str, Any] = {"work": str(work), "folder": str(self.folder), "num_parts": num_parts}
        known = _read(self.stamps)
        receipts = {name: self._untouched(name, known) for name in names}
        orders = [
            StoreOrder(name=name, first=first, stop=stop, **shared)
            for name, first, stop in zip(names, starts, starts[1:], strict=False)
            if receipts[name] is None
        ]
        written = set()
        for report in each(
            store,
            orders,
            StoreReport,
            config,
            what="stored samples",
            weigh=lambda report: report.num_samples,
            total=sum(order.stop - order.first for order in orders),
        ):
            receipts[report.name] = receipt_of(self.folder / report.name)
            if report.written:
                written.add(report.name)
        stored = []
        for name, kind in zip(names, kinds, strict=True):
            there = receipts[name]
            if there is None:
                raise WorkerError(f"shard {name} vanished while the build ran")
            stored.append(Stored(kind=kind, receipt=there, written=name in written))
        self._remember(names)
        return stored

    def files(self, stored: Sequence[Stored]) -> list[Path]:
        """What a version of these shards needs of the folder."""
        paths = [self.folder / shard.receipt.shard for shard in stored]
        return [*paths, *map(receipt_path, paths)]

    def _untouched(self, name: str, known: Stamps) -> Receipt | None:
        then = known.get(name)
        whole = then is not None and then == _stamp(self.folder / name)
        return receipt_of(self.folder / name) if whole else None

    def _remember(self, names: Sequence[str]) -> None:
        """These are whole now; all others are forgotten. Writes nothing where nothing changed."""
        now = {name: _stamp(self.folder / name) for name in sorted(names)}
        if now != _read(self.stamps):
            write_atomically(self.stamps, json.dumps(now).encode(), durable=False)


def manifest_table(stored: Sequence[Stored]) -> pa.Table:
    """manifest.parquet, by name."""
    rows = [
        {
            "shard": shard.receipt.shard,
            "split": shard.kind[0],
            "stream": shard.kind[1],
            "samples": len(shard.receipt.members),
            "size_bytes": shard.receipt.size_bytes,
            "sha256": shard.receipt.sha256,
        }
        for shard in sorted(stored, key=lambda shard: shard.receipt.shard)
    ]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def samples_table(samples: LightSamples, planned: Plan, stored: Sequence[Stored]) -> pa.Table:
    """samples.parquet, by key. Receipts list their members in key order, as the plan does."""
    members = [member for shard in stored for member in shard.receipt.members]
    counts = [len(shard.receipt.members) for shard in stored]

    def of_shards(values: list[str]) -> pa.Array:
        return pa.array(values).take(pa.array(np.repeat(np.arange(len(counts)), counts)))

    in_plan = {
        "split": of_shards([shard.kind[0] for shard in stored]),
        "stream": of_shards([shard.kind[1] for shard in stored]),
        "shard": of_shards([shard.receipt.shard for shard in stored]),
        "offset": pa.array([member.offset for member in members], pa.int64()),
        "size_bytes": pa.array([member.size_bytes for member in members], pa.int64()),
        "sha256": pa.array([member.sha256 for member in members], pa.string()),
    }
    order = pa.array(planned.order)
    columns = {"key": samples.key.take(order), **in_plan}
    columns |= {name: samples.told[name].take(order) for name in samples.told.column_names}
    assert columns["key"].to_pylist() == [member.key for member in members]
    table = pa.table([columns[name] for name in SAMPLES.names], schema=SAMPLES)
    return table.take(pa.array(np.argsort(samples.rank[planned.order]))).combine_chunks()


def _stamp(shard: Path) -> list[int | str] | None:
    """Of the shard its size and times, of its receipt, which the next version will repeat, every byte."""
    try:
        return [*stamp(str(shard)), file_sha256(receipt_path(shard))]
    except OSError:
        return None


def _read(path: Path) -> Stamps:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
