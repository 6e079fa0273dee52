"""Shards to samples and batches, with a position that any number of ranks can resume from.

A `webdataset.DataPipeline` whose source reads by the index (samples.parquet), because a plain tar stream
can neither seek nor notice a missing sample. Every byte range is hashed before it is decoded. What becomes
of the samples is `make_batch`'s business; augmentation is not done here.
"""

import hashlib
import io
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from pipelines.cache import Shards
from pipelines.catalog import DatasetVersion
from pipelines.order import Mixture, Order, dataset_seed, rank_slice, sample_seed
from pipelines.pixels import PHOTOGRAPHS, PixelsError, upright
from pipelines.remote import RemoteError
from pipelines.shards import ShardError, parse
from schemas.masks import Array
from schemas.pictures import to_rgb
from schemas.records import Sample, Split
from schemas.tasks import STREAM_FIELDS, Stream

log = logging.getLogger(__name__)

T = TypeVar("T")
MakeBatch = Callable[[list[Sample], list[int]], T]


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A dataset of several that a stream draws from.

    weight    in any unit, beside those of the others
    shards    where its files are; those of the version's own folder
    """

    version: DatasetVersion
    weight: float = 1.0
    shards: Shards | None = None


class StreamError(RuntimeError):
    """Too many unreadable samples in a row: the message names the last of them."""


def training_stream(
    datasets: DatasetVersion | Sequence[Weighted],
    *,
    stream: Stream,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    position: int = 0,
    workers: int = 0,
    threads: int = 0,
    make_batch: MakeBatch[T],
    max_corrupt: int = 16,
    on_skip: Callable[[], None] = lambda: None,
) -> Iterator[tuple[T, int]]:
    """This rank's share of every global batch, for ever: (batch, position of the whole stream after it).

    datasets      one, or several that take turns by weight, each going on through epochs of its own
    stream        training samples with segments or phrases ("segmentation"), with captions or questions
                  ("image_text"); a sample may be in both
    position      samples taken by all ranks so far; the sequence from there on depends on nothing else
    workers       processes that prepare batches, or
    threads       threads of this process that do: nothing is copied between processes, and decoding lets
                  Python's lock go. With neither, a batch is prepared when it is asked for. Each prepares two
                  ahead; the batches are the same for any number
    make_batch    samples and a seed for each, a pure function of (seed, epoch, sample), -> batch
    max_corrupt   consecutive unreadable samples that are skipped and logged; their batches are shorter. Every
                  rank draws the same number of batches: a global batch of which nothing is left is passed
                  over by all; a rank that alone has nothing left takes one sample of the others' twice
    on_skip       called for each unreadable sample of this rank's share when its batch is drawn

    Raises `ValueError` at the call where the stream would be empty or the batch does not divide among the
    ranks, `StreamError` from the iterator where more than `max_corrupt` samples in a row are unreadable.
    """
    mixed = [Weighted(version=datasets)] if isinstance(datasets, DatasetVersion) else datasets
    indices = tuple(_training_index(one, stream) for one in mixed)
    orders = [Order(index.sizes, dataset_seed(seed, number)) for number, index in enumerate(indices)]
    plan = _Plan(
        indices=indices,
        mixture=Mixture(orders, [one.weight for one in mixed], seed),
        global_batch=global_batch,
        share=rank_slice(global_batch, rank, world_size),
    )
    plan.draw(position, 1)  # an empty stream and an impossible position are refused here
    draw = partial(_draw, plan, make_batch)
    pipeline = wds.DataPipeline(partial(_starts, global_batch, position), partial(map, draw))
    batches: Iterable[_Drawn[T]] = pipeline
    if workers:
        # a loader without its own generator would draw its seed from the one that the training uses
        own = torch.Generator()
        batches = wds.WebLoader(pipeline, batch_size=None, num_workers=workers, generator=own)
    elif threads:
        batches = _in_threads(draw, _starts(global_batch, position), threads)
    return _without_corrupt(batches, stream, max_corrupt, on_skip)


def read_samples(
    version: DatasetVersion, *, split: Split, stream: Stream, limit: int = 0
) -> Iterator[Sample]:
    """The samples of a split that a stream admits, in key order, at most `limit` (0 is all).

    Raises `ValueError` where there are none, `StreamError` at the first unreadable one: a score over fewer
    samples than announced is wrong.
    """
    rows = members(version, split, stream).sort_by("key")
    return _read_all(_Index(rows.slice(0, limit or None), version.shards()))


def decode(data: bytes) -> Sample:
    """The byte range of a sample in its shard -> the sample. Raises `ShardError`."""
    meta, files = parse(data)
    image = decode_image(files["jpg"] if "jpg" in files else files["png"])
    labels = decode_labels(files["segments.png"]) if "segments.png" in files else None
    for pixels in (image, labels):
        if pixels is not None and pixels.shape[:2] != (meta.height, meta.width):
            raise ShardError(f"{meta.key}: {pixels.shape[:2]} pixels, described as {meta.height, meta.width}")
    return Sample(meta=meta, image=image, labels=labels)


def decode_image(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """JPEG or PNG of any colour mode -> uint8[H, W, 3] RGB, upright as its EXIF orientation says.

    Drops alpha, and the low byte of 16-bit grey. Raises `ShardError`.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            # the same libjpeg-turbo and the same pixels as PIL's, without its detour over four channels
            pixels = decode_jpeg(_bytes(data), ImageReadMode.RGB, apply_exif_orientation=True)
            return np.asarray(pixels.permute(1, 2, 0))
        except RuntimeError:
            log.debug("torchvision refuses a JPEG; PIL reads more kinds, and says what is wrong")
    try:
        image = upright(_open(data, PHOTOGRAPHS))
    except PixelsError as error:
        raise ShardError(f"cannot be decoded: {error.detail}") from None
    return to_rgb(image)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One sample of the sequence; None where it was unreadable, and `fault` says why."""

    sample: Sample | None
    seed: int
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class _Drawn(Generic[T]):
    """`batch` is None where no sample was readable; `readable` tells of each sample, in order."""

    batch: T | None
    readable: list[bool]
    faults: list[str]
    position: int


class _Index:
    """Where samples lie, and reading them. Small enough for loader processes.

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

    def sample(self, index: int) -> Sample:
        """Raises `ShardError` that names the sample and its place, where its bytes are not those written, and
        `RemoteError`.
        """
        shard, offset = self.shards[self.shard_of[index]], int(self.offsets[index])
        try:
            try:
                data = self._read(index)
            except ShardError:
                if not self.files.mend(shard):
                    raise
                data = self._read(index)
            return decode(data)
        except RemoteError:  # a network that is away must not cost samples
            raise
        except (OSError, ShardError) as error:
            where = f"sample {self.keys[index].as_py()} at byte {offset} of {self.files}/{shard}"
            raise ShardError(f"{where}: {error}") from None

    def _read(self, index: int) -> bytes:
        length = int(self.lengths[index])
        data = self.files.read(self.shards[self.shard_of[index]], int(self.offsets[index]), length)
        if hashlib.sha256(data).hexdigest() != self.hashes[index].as_py():
            raise ShardError(f"{len(data)} of {length} bytes, and not those that were written")
        return data


def admitted(version: DatasetVersion, split: Split, stream: Stream) -> pa.Table:
    """Rows of the samples of a split that a stream admits, in the table's order."""
    annotated = pc.greater(pc.add(*(version.samples[field] for field in STREAM_FIELDS[stream])), 0)
    return version.samples.filter(pc.and_(pc.equal(version.samples["split"], split), annotated))


def members(version: DatasetVersion, split: Split, stream: Stream) -> pa.Table:
    """The same. Raises `ValueError` where there are none."""
    rows = admitted(version, split, stream)
    if not len(rows):
        raise ValueError(
            f"dataset {version.card.dataset!r} {version.id} has no {split} sample with "
            f"{' or '.join(STREAM_FIELDS[stream])}, which stream {stream!r} needs; it holds "
            f"{_holdings(version)}; add a corpus that has some and rebuild"
        )
    return rows


def _holdings(version: DatasetVersion) -> str:
    return "; ".join(f"{split}: {counts}" for split, counts in version.card.counts.items())


def _training_index(one: Weighted, stream: Stream) -> _Index:
    rows = members(one.version, "train", stream)
    files = one.shards or one.version.shards()
    return _Index(rows.sort_by([("shard", "ascending"), ("offset", "ascending")]), files)


def _read_all(index: _Index) -> Iterator[Sample]:
    for i in range(len(index.keys)):
        try:
            yield index.sample(i)
        except ShardError as error:
            raise StreamError(f"{error}; run: python -m jobs datasets verify") from None


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a rank draws: its share of every `global_batch` samples of the mixture."""

    indices: tuple[_Index, ...]
    mixture: Mixture
    global_batch: int
    share: slice

    def draw(self, start: int, count: int) -> list[tuple[_Index, int, int]]:
        """Dataset, index and seed of the samples at `start` .. `start + count - 1` of the whole stream."""
        drawn = (column.tolist() for column in self.mixture.positions(start, count))
        return [
            (self.indices[number], i, sample_seed(self.mixture.orders[number].seed, epoch, i))
            for number, epoch, i in zip(*drawn, strict=True)
        ]

    def read(self, start: int, count: int) -> Iterator[_Read]:
        for dataset, index, seed in self.draw(start, count):
            try:
                yield _Read(sample=dataset.sample(index), seed=seed)
            except ShardError as error:
                yield _Read(sample=None, seed=seed, fault=str(error))


def _starts(global_batch: int, position: int) -> Iterator[int]:
    """Where global batches begin; in loader process w of n: w, w + n ..., so that turns restore the order."""
    worker = get_worker_info()
    first, step = (worker.id, worker.num_workers) if worker else (0, 1)
    for batch in count(first, step):
        yield position + batch * global_batch


def _draw(plan: _Plan, make_batch: MakeBatch[T], start: int) -> _Drawn[T]:
    """This rank's share of the global batch that begins at `start`.

    Where nothing of it is readable, all ranks look at the same global batch, so without a word between them
    they agree whether it is passed over.
    """
    share = list(plan.read(start + plan.share.start, plan.share.stop - plan.share.start))
    readable = [(read.sample, read.seed) for read in share if read.sample is not None]
    if not readable:
        everything = plan.read(start, plan.global_batch)
        found = ((read.sample, read.seed) for read in everything if read.sample is not None)
        readable = list(islice(found, 1))
    return _Drawn(
        batch=make_batch([s for s, _ in readable], [seed for _, seed in readable]) if readable else None,
        readable=[read.sample is not None for read in share],
        faults=[read.fault for read in share if read.fault],
        position=start + plan.global_batch,
    )


def _in_threads(draw: Callable[[int], _Drawn[T]], starts: Iterator[int], threads: int) -> Iterator[_Drawn[T]]:
    """The same batches in the same order."""
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="stream")
    try:
        waiting = deque(pool.submit(draw, start) for start in islice(starts, 2 * threads))
        for start in starts:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(draw, start))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_corrupt(
    drawn: Iterable[_Drawn[T]], stream: Stream, max_corrupt: int, on_skip: Callable[[], None]
) -> Iterator[tuple[T, int]]:
    """Here, and not in the loader processes, because only here all samples pass in order."""
    skipped = in_a_row = 0
    for one in drawn:
        for fault in one.faults:
            skipped += 1
            on_skip()
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


def decode_labels(data: bytes) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """A label map of a shard -> uint16[H, W], segments from 1, 0 void. Raises `ShardError`."""
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
