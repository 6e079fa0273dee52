"""Tars of others (pictures with a caption each, as img2dataset writes them), streamed without an index.

A plain tar stream can neither seek nor notice a missing sample, so none of the laws of `stream.py` hold here
but one: every rank draws the same number of batches. Who wants the others builds a dataset version of them.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import webdataset as wds

from pipelines.order import rank_slice
from pipelines.shards import ShardError
from pipelines.stream import MakeBatch, StreamError, decode_image
from schemas.records import Sample, SampleMeta

log = logging.getLogger(__name__)

T = TypeVar("T")


def foreign_stream(
    tars: Sequence[Path],
    *,
    seed: int,
    global_batch: int,
    rank: int,
    world_size: int,
    position: int = 0,
    make_batch: MakeBatch[T],
    max_corrupt: int = 16,
    on_skip: Callable[[], None] = lambda: None,
) -> Iterator[tuple[T, int]]:
    """Batches of `<key>.jpg` or `.png` with `<key>.txt`, for ever: (batch, position after it).

    Each rank permutes the tars for itself in every pass. A position only counts: from it on a stream starts
    with another permutation, and knows nothing of what was seen. `on_skip` as for `training_stream`.

    Raises `ValueError` where there are no tars, `StreamError` from the iterator where more than `max_corrupt`
    samples in a row, or all of a pass, are unusable.
    """
    share = rank_slice(global_batch, rank, world_size)
    missing = [str(path) for path in tars if not path.is_file()]
    if missing or not tars:
        raise ValueError(f"no tars to read: {', '.join(missing) or 'the list is empty'}")
    log.warning(
        "%d tars of others are streamed without an index: samples may be missing, come twice or never, and a "
        "resumed training does not go on where it was; build a dataset of them to have these guarantees",
        len(tars),
    )
    samples = _usable(tars, (seed, rank, position), max_corrupt, on_skip)
    return _batches(samples, seed, position, global_batch, share.stop - share.start, make_batch)


def _batches(
    samples: Iterator[Sample],
    seed: int,
    position: int,
    global_batch: int,
    length: int,
    make_batch: MakeBatch[T],
) -> Iterator[tuple[T, int]]:
    rng = np.random.default_rng((seed, position, 1))
    while True:
        batch = [next(samples) for _ in range(length)]
        position += global_batch
        yield make_batch(batch, rng.integers(2**63, size=length).tolist()), position


def _usable(
    tars: Sequence[Path], seed: tuple[int, ...], max_corrupt: int, on_skip: Callable[[], None]
) -> Iterator[Sample]:
    rng = np.random.default_rng(seed)
    while True:
        # paths that exist, never the user's text: webdataset would run "pipe:" in a shell
        urls = [{"url": str(tars[i].absolute())} for i in rng.permutation(len(tars))]
        usable = in_a_row = 0
        for found in wds.tariterators.tarfile_samples(urls, handler=wds.warn_and_continue):
            try:
                sample = _sample(found)
            except ShardError as error:
                in_a_row += 1
                on_skip()
                log.warning("%s of %s is skipped: %s", found["__key__"], found["__url__"], error)
                if in_a_row > max_corrupt:
                    raise StreamError(f"{in_a_row} unusable samples in a row, the last: {error}") from None
                continue
            usable, in_a_row = usable + 1, 0
            yield sample
        if not usable:
            raise StreamError(f"none of {len(tars)} tars holds a picture with a caption: {tars[0]} ..")


def _sample(found: dict[str, Any]) -> Sample:
    """Raises `ShardError`."""
    data = next((found[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in found), None)
    if data is None or "txt" not in found:
        raise ShardError(f"no picture with a caption, but {sorted(k for k in found if k[0] != '_')}")
    image = decode_image(data)
    try:
        caption = found["txt"].decode().strip()
    except UnicodeDecodeError as error:
        raise ShardError(f"its caption is no text: {error}") from None
    meta = SampleMeta(
        key=found["__key__"],
        split="train",
        height=image.shape[0],
        width=image.shape[1],
        sha256=hashlib.sha256(data).hexdigest(),
        captions=(caption,),
    )
    return Sample(meta=meta, image=image, labels=None)
