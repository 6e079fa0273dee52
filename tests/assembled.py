"""Rows to samples as the build makes them, without its workers: inspect, curate, store and decode again."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.corpora.rows import Row
from pipelines.curate import Curated, curate
from pipelines.inspection import inspect
from pipelines.shards import Entry, write
from pipelines.stream import decode
from schemas.records import Sample


def assemble(rows: Sequence[Row], max_pixels: int) -> Curated:
    files = {("image", row.image_path): inspect("image", row.image_path, max_pixels) for row in rows}
    maps = [row.labels_path for row in rows if row.labels_path is not None]
    return curate(rows, files | {("labels", place): inspect("labels", place, max_pixels) for place in maps})


def stored(entries: Sequence[Entry], folder: Path) -> list[Sample]:
    """The samples as a reader of their shard decodes them."""
    receipt, _ = write("x.tar", entries, folder)
    data = (folder / "x.tar").read_bytes()
    return [decode(data[m.offset : m.offset + m.size_bytes]) for m in receipt.members]
