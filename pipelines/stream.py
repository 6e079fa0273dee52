"""Shards to samples and batches, with a position that any number of ranks can resume from.

A `webdataset.DataPipeline` whose source reads by the index (samples.parquet), because a plain tar stream
can neither seek nor notice a missing sample. Every byte range is hashed before it is decoded. What becomes
of the samples is `make_batch`'s business; augmentation is not done here.
"""

import hashlib
import io
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from pipelines.cache import LocalShards, Shards
from pipelines.catalog import DatasetVersion
from pipelines.order import Order, rank_slice, sample_seed
from pipelines.shards import ShardError, parse
from schemas.masks import Array
from schemas.records import Sample, Split
from schemas.tasks import STREAM_FIELDS, Stream

log = logging.getLogger(__name__)

T = TypeVar("T")
MakeBatch = Callable[[list[Sample], list[int]], T]
_OPEN_FILES = 32


class StreamError(RuntimeError):
    """Too many unreadable samples in a row: the message names the last of them."""


def training_stream(
    version: DatasetVersion,
    *,
    stream: Stream,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    position: int = 0,
    workers: int = 0,
    ahead: int = 0,
    shards: Shards | None = None,
    make_batch: MakeBatch[T],
    max_corrupt: int = 16,
) -> Iterator[tuple[T, int]]:
    """This rank's share of every global batch, for ever: (batch, position of the whole stream after it).

    stream        training samples with segments or phrases ("segmentation"), with captions or questions
                  ("image_text"); a sample may be in both
    position      samples taken by all ranks so far; the sequence from there on depends on nothing else
    workers       decoding processes; 0 decodes in this one. The batches are the same for any number
    ahead         batches that a thread prepares ahead where there are no workers; 0 prepares them when asked
    shards        where the files are; those of the version's own folder
    make_batch    samples and a seed for each, a pure function of (seed, epoch, sample), -> batch
    max_corrupt   consecutive unreadable samples that are skipped and logged; their batches are shorter. Every
                  rank draws the same number of batches: a global batch of which nothing is left is passed
                  over by all; a rank that alone has nothing left takes one sample of the others' twice

    Raises `ValueError` at the call where the stream would be empty or the batch does not divide among the
    ranks, `StreamError` from the iterator where more than `max_corrupt` samples in a row are unreadable.
    """
    index = _training_index(version, stream, shards or LocalShards(version.shards_root))
    plan = _Plan(
        index=index,
        order=Order(index.sizes, seed),
        global_batch=global_batch,
        share=rank_slice(global_batch, rank, world_size),
    )
    plan.draw(position, 1)  # an empty stream is refused here
    pipeline = wds.DataPipeline(
        partial(_requests, global_batch, position), partial(_fetch, plan), partial(_collate, make_batch)
    )
    batches: Iterable[_Drawn[T]] = pipeline
    if workers:
        # a loader without its own generator would draw its seed from the one that the training uses
        own = torch.Generator()
        batches = wds.WebLoader(pipeline, batch_size=None, num_workers=workers, generator=own)
    elif ahead:
        batches = _prepared(iter(pipeline), ahead)
    return _without_corrupt(batches, stream, max_corrupt)


def read_samples(
    version: DatasetVersion, *, split: Split, stream: Stream, limit: int = 0
) -> Iterator[Sample]:
    """The samples of a split that a stream admits, in key order, at most `limit` (0 is all).

    Raises `ValueError` where there are none, `StreamError` at the first unreadable one: a score over fewer
    samples than announced is wrong.
    """
    rows = _members(version, split, stream).sort_by("key")
    return _read_all(_Index(rows.slice(0, limit or None), LocalShards(version.shards_root)))


def decode(data: bytes) -> Sample:
    """The byte range of a sample in its shard -> the sample. Raises `ShardError`."""
    meta, files = parse(data)
    image = decode_image(files["jpg"] if "jpg" in files else files["png"])
    labels = _decode_labels(files["segments.png"]) if "segments.png" in files else None
    for pixels in (image, labels):
        if pixels is not None and pixels.shape[:2] != (meta.height, meta.width):
            raise ShardError(f"{meta.key}: {pixels.shape[:2]} pixels, described as {meta.height, meta.width}")
    return Sample(meta=meta, image=image, labels=labels)


def decode_image(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """JPEG or PNG of any colour mode -> uint8[H, W, 3] RGB. Drops alpha, and the low byte of 16-bit grey.

    Raises `ShardError`.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            # the same libjpeg-turbo and the same pixels as PIL's, without its detour over four channels
            return np.asarray(decode_jpeg(_bytes(data), ImageReadMode.RGB).permute(1, 2, 0))
        except RuntimeError:
            log.debug("torchvision refuses a JPEG; PIL reads more kinds, and says what is wrong")
    image = _open(data, ("JPEG", "PNG"))
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One sample of the sequence; None where it was unreadable, and `fault` says why."""

    sample: Sample | None
    seed: int
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class _Fetched:
    """A rank's share of a global batch; `stand_in` where nothing of the share is readable, but of others' is.

    position    of the whole stream after the batch
    """

    share: list[_Read]
    stand_in: _Read | None
    position: int


@dataclass(frozen=True, kw_only=True)
class _Drawn(Generic[T]):
    """`batch` is None where no sample was readable; `readable` tells of each sample, in order."""

    batch: T | None
    readable: list[bool]
    faults: list[str]
    position: int


class _Index:
    """Where samples lie, and reading them. Small enough for loader processes, which open files themselves.

    sizes     samples of each shard; a sample's index counts through them
    """

    def __init__(self, rows: pa.Table, files: Shards) -> None:
        self.files = files
        # Arrow, not lists: touching a million Python strings would copy them into every forked process
        self.keys, self.hashes = rows["key"].combine_chunks(), rows["sha256"].combine_chunks()
        shards = rows["shard"].combine_chunks().dictionary_encode()
        self.shards: list[str] = shards.dictionary.to_pylist()
        self.shard_of = shards.indices.to_numpy()
        self.offsets, self.lengths = rows["offset"].to_numpy(), rows["size_bytes"].to_numpy()
        self.sizes: tuple[int, ...] = tuple(np.bincount(self.shard_of, minlength=len(self.shards)).tolist())
        self._open: OrderedDict[int, int] = OrderedDict()

    def sample(self, index: int) -> Sample:
        """Raises `ShardError` that names the sample and its place, where its bytes are not those written."""
        shard, offset = int(self.shard_of[index]), int(self.offsets[index])
        try:
            try:
                data = self._read(index)
            except ShardError:
                if not self.files.mend(self.shards[shard]):
                    raise
                os.close(self._open.pop(shard))
                data = self._read(index)
            return decode(data)
        except (OSError, ShardError) as error:
            where = f"sample {self.keys[index].as_py()} at byte {offset} of {self.files}/{self.shards[shard]}"
            raise ShardError(f"{where}: {error}") from None

    def _read(self, index: int) -> bytes:
        length = int(self.lengths[index])
        data = os.pread(self._descriptor(int(self.shard_of[index])), length, int(self.offsets[index]))
        if hashlib.sha256(data).hexdigest() != self.hashes[index].as_py():
            raise ShardError(f"{len(data)} of {length} bytes, and not those that were written")
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            while len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self.files.open(self.shards[shard])
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _members(version: DatasetVersion, split: Split, stream: Stream) -> pa.Table:
    """Rows of samples.parquet. Raises `ValueError` where there are none."""
    fields = STREAM_FIELDS[stream]
    admitted = pc.greater(pc.add(*(version.samples[field] for field in fields)), 0)
    rows = version.samples.filter(pc.and_(pc.equal(version.samples["split"], split), admitted))
    if not len(rows):
        raise ValueError(
            f"dataset {version.card.dataset!r} {version.id} has no {split} sample with "
            f"{' or '.join(fields)}, which stream {stream!r} needs; it holds {_holdings(version)}; "
            "add a corpus that has some and rebuild"
        )
    return rows


def _holdings(version: DatasetVersion) -> str:
    return "; ".join(f"{split}: {counts}" for split, counts in version.card.counts.items())


def _training_index(version: DatasetVersion, stream: Stream, files: Shards) -> _Index:
    rows = _members(version, "train", stream)
    return _Index(rows.sort_by([("shard", "ascending"), ("offset", "ascending")]), files)


def _read_all(index: _Index) -> Iterator[Sample]:
    for i in range(len(index.keys)):
        try:
            yield index.sample(i)
        except ShardError as error:
            raise StreamError(f"{error}; run: python -m jobs datasets verify") from None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a rank draws: its share of every `global_batch` samples of the order."""

    index: _Index
    order: Order
    global_batch: int
    share: slice

    def draw(self, start: int, count: int) -> list[tuple[int, int]]:
        """Index and seed of the samples at `start` .. `start + count - 1` of the whole stream."""
        epochs, indices = self.order.positions(start, count)
        seed = self.order.seed
        return [(i, sample_seed(seed, e, i)) for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]

    def read(self, start: int, count: int) -> Iterator[_Read]:
        for index, seed in self.draw(start, count):
            try:
                yield _Read(sample=self.index.sample(index), seed=seed)
            except ShardError as error:
                yield _Read(sample=None, seed=seed, fault=str(error))

    def fetch(self, start: int) -> _Fetched:
        """This rank's share of the global batch that begins at `start`.

        Where nothing of it is readable, all ranks look at the same global batch, so without a word between
        them they agree whether it is passed over.
        """
        share = list(self.read(start + self.share.start, self.share.stop - self.share.start))
        stand_in = None
        if all(read.sample is None for read in share):
            others = self.read(start, self.global_batch)
            stand_in = next((read for read in others if read.sample is not None), None)
        return _Fetched(share=share, stand_in=stand_in, position=start + self.global_batch)


def _requests(global_batch: int, position: int) -> Iterator[int]:
    """Where global batches begin; in loader process w of n: w, w + n ..., so that turns restore the order."""
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    for batch in count(first, step):
        yield position + batch * global_batch


def _fetch(plan: _Plan, starts: Iterator[int]) -> Iterator[_Fetched]:
    for start in starts:
        yield plan.fetch(start)


def _collate(make_batch: MakeBatch[T], fetched: Iterator[_Fetched]) -> Iterator[_Drawn[T]]:
    for one in fetched:
        reads = [one.stand_in] if one.stand_in else one.share
        readable = [(read.sample, read.seed) for read in reads if read.sample is not None]
        batch = make_batch([s for s, _ in readable], [seed for _, seed in readable]) if readable else None
        yield _Drawn(
            batch=batch,
            readable=[read.sample is not None for read in one.share],
            faults=[read.fault for read in one.share if read.fault],
            position=one.position,
        )


def _prepared(batches: Iterator[T], ahead: int) -> Iterator[T]:
    """The same batches in the same order, of which a thread prepares up to `ahead` beforehand."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
    try:
        waiting = deque(pool.submit(next, batches) for _ in range(ahead))
        while True:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(next, batches))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_corrupt(drawn: Iterable[_Drawn[T]], stream: Stream, max_corrupt: int) -> Iterator[tuple[T, int]]:
    """Here, and not in the loader processes, because only here all samples pass in order."""
    skipped = in_a_row = 0
    for one in drawn:
        for fault in one.faults:
            skipped += 1
            log.warning("stream %s skips a sample, number %d so far: %s", stream, skipped, fault)
        for readable in one.readable:
            in_a_row = 0 if readable else in_a_row + 1
            if in_a_row > max_corrupt:
                raise StreamError(
                    f"stream {stream}: {in_a_row} unreadable samples in a row, the last batch with "
                    f"{one.faults[-1]}; run: python -m jobs datasets verify"
                )
        if one.batch is not None:
            yield one.batch, one.position


def _decode_labels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint16]]:
    try:
        pixels: Array = np.asarray(decode_png(_bytes(data)))
    except RuntimeError as error:
        raise ShardError(f"cannot be decoded: {error}") from None
    if len(pixels) != 1:
        raise ShardError(f"a label map has one channel, this has {len(pixels)}")
    return pixels[0].astype(np.uint16)


def _bytes(data: bytes) -> torch.Tensor:
    """uint8[n]. A copy, which torch may write to."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        image.load()
    except Exception as error:  # what a decoder raises on broken bytes is anything
        raise ShardError(f"cannot be decoded: {type(error).__name__}: {error}") from None
    return image
