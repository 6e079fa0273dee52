"""Tables on disk between the steps of a build: Arrow files that every process maps and none needs to load.

They lie in the dataset's `work` folder while a build runs, and go with it. A step's memory is what it looks
at, so that it does not grow with the corpora.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.atomic import appearing
from schemas.masks import Array
from schemas.records import PARTS

# What the reader of a corpus yielded, in runs that are sorted by `hash` (of the image's place). `corpus` is
# the position in the list of corpora, `document` the Row as JSON less its rule, `rule` the number of that
# among the corpus's, or -1.
RUN = pa.schema({"hash": pa.uint64(), "corpus": pa.int32(), "rule": pa.int32(), "document": pa.binary()})

# Rows whose files are good, with what is decided by. `image` is 128 bits of the image's sha256, `number` 64
# of its number's or 0, `tie` 64 of what the row says. `worth` is 0 of rows with segments, 1 with expressions,
# else 2; `look` and `thumbnail` are the image's of duplicates.py; `facts` is what else inspection found, and
# `index_map` the place of the index map that was made of a label map, "" where none was decoded.
CHECKED = pa.schema(
    {
        "corpus": pa.int32(),
        "rule": pa.int32(),
        "held_out": pa.bool_(),
        "image_high": pa.uint64(),
        "image_low": pa.uint64(),
        "number": pa.uint64(),
        "look": pa.uint64(),
        "worth": pa.int8(),
        "pixels": pa.int64(),
        "tie": pa.uint64(),
        "labelled": pa.bool_(),
        "key": pa.string(),
        "thumbnail": pa.binary(),
        "document": pa.binary(),
        "facts": pa.binary(),
        "index_map": pa.string(),
    }
)

# Samples to be written: what is planned by, what `samples.parquet` says, and the Entry as JSON. `bits` are
# the first 64 of the key's sha256, `digest` changes with anything that the shard holds of the sample.
ENTRIES = pa.schema(
    {
        "key": pa.string(),
        "bits": pa.uint64(),
        "split": pa.string(),
        "stream": pa.string(),
        "source_bytes": pa.int64(),
        "digest": pa.binary(32),
        "segments": pa.int32(),
        "referring": pa.int32(),
        "captions": pa.int32(),
        "questions": pa.int32(),
        "copy_of": pa.string(),
        **{f"{part}_hash": pa.uint64() for part in PARTS},
        "document": pa.binary(),
    }
)


def hash64(data: bytes) -> int:
    """The first 64 bits of the sha256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8])


def save(path: Path, table: pa.Table) -> None:
    """Write one batch, so that rows can be taken from it by their number."""
    with (
        appearing(path, durable=False) as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table.combine_chunks())


def mapped(path: Path) -> pa.Table:
    """A table whose columns stay on disk until they are looked at. Raises `OSError`, `pa.ArrowInvalid`."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def gather(files: Sequence[Path], parts: Array, rows: Array, columns: Sequence[str]) -> pa.Table:
    """Rows from many files, in the order asked for: row `rows[i]` of `files[parts[i]]`."""
    order = np.argsort(parts, kind="stable")
    wanted, starts = np.unique(parts[order], return_index=True)
    taken = [
        mapped(files[part]).select(columns).take(pa.array(rows[chosen]))
        for part, chosen in zip(wanted.tolist(), np.split(order, starts[1:]), strict=True)
    ]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_tables(taken).combine_chunks().take(pa.array(back))


def prefixes(num_rows: int, rows_a_part: int) -> tuple[str, ...]:
    """Names of 4 to 4096 parts of about so many rows: the leading bits of the hashes they hold.

    Powers of two, so that parts of another number of rows are halves or doubles of these.
    """
    bits = int(np.clip(np.ceil(np.log2(max(1, num_rows) / rows_a_part)), 2, 12))
    return tuple(f"{i:0{bits}b}" for i in range(2**bits))


def within(prefix: str, hashes: Array) -> slice:
    """Where the hashes of a part lie among sorted uint64 hashes."""
    free = 64 - len(prefix)
    first = int(prefix, 2) << free
    last = first | ((1 << free) - 1)
    edges = np.array([first, last], dtype=np.uint64)
    return slice(
        int(np.searchsorted(hashes, edges[0], side="left")),
        int(np.searchsorted(hashes, edges[1], side="right")),
    )
