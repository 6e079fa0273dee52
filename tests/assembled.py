"""Rows to samples as the build makes them, without its workers: inspect, check, group, store, decode."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from pipelines import curate
from pipelines.checking import decided_by
from pipelines.corpora.rows import Row
from pipelines.curate import files_of, judge
from pipelines.facts import Files
from pipelines.grouping import REASONS, StoredThumbnails, group, light_rows
from pipelines.inspection import inspect
from pipelines.reading import ROW
from pipelines.shards import Entry, write
from pipelines.spool import CHECKED, save
from pipelines.stream import decode
from schemas.records import Reject, Sample


@dataclass(frozen=True, kw_only=True)
class Curated:
    """Samples in key order, rejects, and how many rows went into the samples."""

    entries: tuple[Entry, ...]
    rejects: tuple[Reject, ...]
    num_kept: int


def assemble(rows: Sequence[Row], max_pixels: int) -> Curated:
    wanted = {file for row in rows for file in files_of(row)}
    return curated(rows, {(kind, place): inspect(kind, place, max_pixels)[0] for kind, place in wanted})


def curated(
    rows: Sequence[Row], files: Files, near_duplicates: Literal["keep", "reject"] = "keep"
) -> Curated:
    """Rows of one corpus, as far as grouping is concerned."""
    judged = [judge(row, files) for row in rows]
    rejects = [verdict for verdict in judged if isinstance(verdict, Reject)]
    checked = [row for row, verdict in zip(rows, judged, strict=True) if not isinstance(verdict, Reject)]
    documents = [decided_by(0, -1, row, ROW.dump_json(row), files) for row in checked]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checked-0000.arrow"
        save(path, pa.Table.from_pylist(documents, schema=CHECKED))
        light = light_rows([path])
        groups = group(light, StoredThumbnails(light, [path]), near_duplicates=near_duplicates)
    keys, entries = groups.key.to_pylist(), []
    for sample in range(len(groups.home)):
        members = light.row[groups.members[np.flatnonzero(groups.sample == sample)]].tolist()
        entries.append(curate.entry(keys[sample], [checked[i] for i in members], files))
    for one, other, why in zip(groups.refused, groups.because, groups.why.tolist(), strict=True):
        reason, detail = REASONS[why]
        said = detail.format(curate.name(checked[light.row[other]]))
        rejects.append(curate.reject(checked[light.row[one]], reason, said))
    return Curated(
        entries=tuple(sorted(entries, key=lambda entry: entry.meta.key)),
        rejects=tuple(rejects),
        num_kept=len(groups.members),
    )


def stored(entries: Sequence[Entry], folder: Path) -> list[Sample]:
    """The samples as a reader of their shard decodes them."""
    receipt = write("x.tar", entries, folder)
    data = (folder / "x.tar").read_bytes()
    return [decode(data[m.offset : m.offset + m.size_bytes]) for m in receipt.members]
