"""Where the bytes of an image or a label map lie: in a file of their own, or inside a container.

A place is a string, so that it travels in Arrow tables and names what an error is about:

    /data/1.jpg                      a file
    bytes:1536:20480:/data/0.tar     20480 bytes from byte 1536 of a file: a member of a tar
    cell:17:image.bytes:/data/0.parquet
                                     row 17 of a column of a Parquet or Arrow file; a dot leads into a struct

Containers are read where they are and never unpacked. Paths are absolute; nothing here asks whether they may
be read: that is decided where a place is made (corpora/files.py).
"""

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

# of one image or label map; chosen by us: five times the raw bytes of the largest image that a build reads by
# default, so that a file that claims more than it should cannot fill a memory
MAX_BYTES = 2**31
# of one column in one row group of a Parquet file, which can only be decoded as a whole; chosen by us
MAX_GROUP_BYTES = 2**33


class PlaceError(OSError):
    """Bytes that are not where a place says: the message names the place."""


def member(path: str, offset: int, size_bytes: int) -> str:
    """The place of a byte range of a file."""
    return f"bytes:{offset}:{size_bytes}:{path}"


def cell(path: str, row: int, column: str) -> str:
    """The place of a cell of a Parquet or Arrow file."""
    return f"cell:{row}:{quote(column, safe='.')}:{path}"


def holder(place: str) -> str:
    """The absolute path of the file that holds a place."""
    return place if place.startswith("/") else place.split(":", 3)[3]


def read(place: str) -> bytes:
    """The bytes at a place. Raises `OSError`: no such file, beyond its end, no such cell, too large."""
    if place.startswith("/"):
        return _range(place, place, 0, os.stat(place).st_size)
    kind, first, second, path = place.split(":", 3)
    if kind == "bytes":
        return _range(place, path, int(first), int(second))
    return _cell(place, path, int(first), unquote(second))


def open_arrow(path: str) -> pa.Table:
    """An Arrow IPC file or stream, mapped into memory, not loaded. Raises `PlaceError` where it is neither.

    Its offsets are checked, because Arrow follows forged ones out of the file.
    """
    try:
        source = pa.memory_map(path)
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PlaceError(f"{path}: not a whole Arrow file: {error!s:.200}") from None
    return table


def open_parquet(path: str) -> pq.ParquetFile:
    """Raises `PlaceError` where the file is no Parquet file."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PlaceError(f"{path}: not a whole Parquet file: {error!s:.200}") from None


def _range(place: str, path: str, offset: int, size_bytes: int) -> bytes:
    if size_bytes > MAX_BYTES:
        raise PlaceError(f"{place}: {size_bytes} bytes, at most {MAX_BYTES} are read")
    with Path(path).open("rb") as file:
        file.seek(offset)
        data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise PlaceError(f"{place}: the file ends after {len(data)} of {size_bytes} bytes")
    return data


def _cell(place: str, path: str, row: int, column: str) -> bytes:
    mtime_ns = os.stat(path).st_mtime_ns
    if path.endswith(".parquet"):
        group, first = _row_group(path, mtime_ns, row)
        values, row = _group_column(path, mtime_ns, group, column), row - first
    else:
        values = column_of(_arrow(path, mtime_ns), column)
    value = values[row].as_py() if values is not None and 0 <= row < len(values) else None
    if not isinstance(value, bytes):
        raise PlaceError(f"{place}: there are no bytes in this cell")
    if len(value) > MAX_BYTES:
        raise PlaceError(f"{place}: {len(value)} bytes, at most {MAX_BYTES} are read")
    return value


@lru_cache(maxsize=8)
def _arrow(path: str, mtime_ns: int) -> pa.Table:
    return open_arrow(path)


@lru_cache(maxsize=8)
def _parquet(path: str, mtime_ns: int) -> pq.ParquetFile:
    return open_parquet(path)


def _row_group(path: str, mtime_ns: int, row: int) -> tuple[int, int]:
    """The row group that holds a row, and its first row."""
    metadata, first = _parquet(path, mtime_ns).metadata, 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if row < first + size:
            return group, first
        first += size
    raise PlaceError(f"{path}: it has {first} rows, row {row} was asked for")


@lru_cache(maxsize=2)  # neighbours share a row group; more would hold several of them in memory
def _group_column(path: str, mtime_ns: int, group: int, column: str) -> pa.ChunkedArray | None:
    try:
        file = _parquet(path, mtime_ns)
        row_group = file.metadata.row_group(group)
        chunks = [row_group.column(i) for i in range(row_group.num_columns)]
        wanted = [
            c for c in chunks if c.path_in_schema == column or c.path_in_schema.startswith(f"{column}.")
        ]
        if sum(c.total_uncompressed_size for c in wanted) > MAX_GROUP_BYTES:
            raise PlaceError(
                f"{path}: row group {group} of {column!r} is larger than {MAX_GROUP_BYTES} bytes"
            )
        return column_of(file.read_row_group(group, columns=[column]), column)
    except PlaceError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise PlaceError(f"{path}: row group {group} cannot be read: {error!s:.200}") from None


def column_of(table: pa.Table, column: str) -> pa.ChunkedArray | None:
    """A column, or a field of a struct column ("image.bytes"); None where there is none."""
    if column in table.column_names:
        return table[column]
    name, _, inner = column.partition(".")
    if name not in table.column_names or not pa.types.is_struct(table.schema.field(name).type):
        return None
    flat = table.select([name]).flatten()
    return column_of(flat.rename_columns([c.removeprefix(f"{name}.") for c in flat.column_names]), inner)
