"""Samples to tars that any WebDataset reader opens, byte-identical for equal samples; and back to members.

A shard is named after the digest of what it will hold, so equal plans share one file between dataset
versions. Image bytes are stored as found. Nothing here decides what a sample may be (curate.py), which ones
share a shard (planning.py), or decodes them for training (stream.py).
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines import labels, places
from pipelines.atomic import appearing, write_atomically
from pipelines.labels import LabelError
from schemas.records import Record, SampleMeta, Split
from schemas.tasks import STREAM_FIELDS, Stream

MAX_SEGMENTS = 65535  # a 16-bit index map
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**22  # bytes; chosen by us


class ShardError(ValueError):
    """A shard that cannot be written, or bytes that are not a sample: says which and why."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A sample to be written. `meta.segments` still hold the ids of `labels_path` (a label place).

    index_map    the place of its index map, where one was made already; else "", and `write` makes it
    """

    meta: SampleMeta
    image_path: str
    labels_path: str | None
    labels_sha256: str
    size_bytes: int
    index_map: str = ""

    @property
    def digest(self) -> str:
        """Changes whenever anything that the shard will hold of this sample changes."""
        return _sha256(meta_json(self.meta) + self.labels_sha256.encode())

    @property
    def stream(self) -> Stream:
        """The stream whose shards hold it; one that serves both lies with the segmentation samples."""
        segmentation = any(getattr(self.meta, field) for field in STREAM_FIELDS["segmentation"])
        return "segmentation" if segmentation else "image_text"


class Member(Record):
    """Where a sample lies in its shard: the byte range of its tar members, and the range's sha256."""

    key: str
    offset: int
    size_bytes: int
    sha256: str


class Receipt(Record):
    """What was written; stands beside the shard as `<shard>.json` and proves that it is whole."""

    shard: str
    size_bytes: int
    sha256: str
    members: tuple[Member, ...]


def shard_name(split: Split, stream: Stream, digest: str) -> str:
    return f"{split}-{stream}-{digest[:16]}.tar"


def is_shard(name: str) -> bool:
    """Whether `shard_name` may have given this name."""
    return re.fullmatch("(?:train|val)-[a-z_]+-[0-9a-f]{16}[.]tar", name) is not None


def write(name: str, entries: Sequence[Entry], folder: Path) -> Receipt:
    """Write one shard, and its receipt beside it, into `folder`.

    Raises `ShardError` where a file changed since it was inspected, `OSError` where the disk refuses.
    """
    members, whole, offset = [], hashlib.sha256(), 0
    with appearing(folder / name) as file:
        for entry in entries:
            data = b"".join(_tar_member(*member) for member in _members(entry))
            file.write(data)
            whole.update(data)
            members.append(
                Member(key=entry.meta.key, offset=offset, size_bytes=len(data), sha256=_sha256(data))
            )
            offset += len(data)
        end = bytes(2 * _BLOCK)
        file.write(end)
        whole.update(end)
    receipt = Receipt(
        shard=name, size_bytes=offset + len(end), sha256=whole.hexdigest(), members=tuple(members)
    )
    write_atomically(receipt_path(folder / name), receipt.model_dump_json().encode())
    return receipt


def parse(data: bytes) -> tuple[SampleMeta, dict[str, bytes]]:
    """The byte range of one sample -> its description and its other members by suffix.

    Raises `ShardError` where members are missing, foreign or malformed.
    """
    try:
        files = dict(_tar_members(data))
        (described,) = (name for name in files if name.endswith(".json"))
        meta = SampleMeta.model_validate_json(files.pop(described))
    except (tarfile.TarError, ValueError) as error:
        raise ShardError(f"not a sample: {type(error).__name__}: {error}") from None
    found = {name.removeprefix(f"{meta.key}."): content for name, content in files.items()}
    needed = {"segments.png"} if meta.segments is not None else set()
    if len(found) != 1 + len(needed) or not needed <= found.keys() or not {"jpg", "png"} & found.keys():
        raise ShardError(f"sample {meta.key}: its members are {sorted(files)}")
    return meta, found


def file_sha256(path: Path) -> str:
    """Hash a file without holding it. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def misplaced(chunks: Iterable[bytes], digest: str, members: Sequence[Member]) -> str:
    """What is wrong with the bytes of a shard that should have this SHA-256 and hold these, or nothing."""
    edges = sorted({edge for m in members for edge in (m.offset, m.offset + m.size_bytes) if edge > 0})
    whole, part, at = hashlib.sha256(), hashlib.sha256(), 0
    found, first, left = {}, 0, iter(edges)
    edge = next(left, None)
    for chunk in chunks:
        whole.update(chunk)
        data = memoryview(chunk)
        while edge is not None and edge <= at + len(data):
            part.update(data[: edge - at])
            found[first, edge] = part.hexdigest()
            data, at, first, part = data[edge - at :], edge, edge, hashlib.sha256()
            edge = next(left, None)
        part.update(data)
        at += len(data)
    if whole.hexdigest() != digest:
        return "its bytes changed"
    for m in members:
        if found.get((m.offset, m.offset + m.size_bytes)) != m.sha256:
            return f"sample {m.key} is not the {m.size_bytes} bytes from byte {m.offset}"
    return ""


def meta_json(meta: SampleMeta) -> bytes:
    """The one way a description is written: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        meta.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()


def _members(entry: Entry) -> list[tuple[str, bytes]]:
    """Names and contents, in the order of the names."""
    image = places.read(entry.image_path)
    if _sha256(image) != entry.meta.sha256:
        raise ShardError(
            f"{entry.image_path} changed during the build; run it again when the corpus is at rest"
        )
    suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
    meta, members = entry.meta, [(f"{entry.meta.key}.{suffix}", image)]
    if entry.labels_path is not None and meta.segments is not None:
        members.append((f"{meta.key}.segments.png", _index_map(entry)))
        numbered = (s.model_copy(update={"id": i}) for i, s in enumerate(meta.segments, 1))
        meta = meta.model_copy(update={"segments": tuple(numbered)})
    members.append((f"{meta.key}.json", meta_json(meta)))
    return sorted(members)


def _index_map(entry: Entry) -> bytes:
    """Of 1..n in the order of the segments."""
    if entry.index_map:
        return places.read(entry.index_map)
    meta, segments = entry.meta, entry.meta.segments or ()
    try:
        runs = labels.read(str(entry.labels_path), meta.height * meta.width).runs
    except LabelError as error:
        raise ShardError(f"{entry.labels_path:.200}: {error.detail}") from None
    found = labels.regions_of(runs)
    if any(s.id not in found or found[s.id].area != s.area for s in segments):
        raise ShardError(
            f"{entry.labels_path:.200} changed during the build; run it again when the corpus is at rest"
        )
    return labels.index_map(runs, [segment.id for segment in segments])


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, owner 0, time 0
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)


def _tar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The reverse, of several: plain files alone, as they are written above. Raises `tarfile.TarError`."""
    start = 0
    while start < len(data):
        info = tarfile.TarInfo.frombuf(data[start : start + _BLOCK], "utf-8", "strict")
        start += _BLOCK
        content = data[start : start + info.size]
        if not info.isreg() or len(content) < info.size:
            raise tarfile.ReadError(f"{info.name} breaks off, or is no plain file")
        yield info.name, content
        start += -(-info.size // _BLOCK) * _BLOCK


def receipt_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.json")


def receipt_of(shard: Path) -> Receipt | None:
    """What was written beside a shard; None where it cannot be read. `intact` tells whether it is true."""
    try:
        return Receipt.model_validate_json(receipt_path(shard).read_bytes())
    except (OSError, ValidationError):
        return None


def intact(shard: Path, keys: Sequence[str]) -> Receipt | None:
    """The receipt of a shard that holds these samples, each at its place; None where it must be written."""
    found = receipt_of(shard)
    if found is None or found.shard != shard.name or [member.key for member in found.members] != keys:
        return None
    try:
        with shard.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            wrong = misplaced(iter(lambda: file.read(_CHUNK), b""), found.sha256, found.members)
    except OSError:
        return None
    return None if wrong or size_bytes != found.size_bytes else found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
