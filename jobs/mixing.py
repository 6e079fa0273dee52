"""What a training draws from: its dataset versions, pinned and joined, and the streams over them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from jobs.store import catalog_of
from pipelines.cache import CachedShards, Shards
from pipelines.catalog import DatasetVersion
from pipelines.foreign import foreign_stream
from pipelines.stream import MakeBatch, Weighted, training_stream
from schemas.jobs import PretrainJob
from schemas.tasks import Stream
from schemas.taxonomy import contradiction

T = TypeVar("T")


def pinned(job: PretrainJob, store: Path) -> PretrainJob:
    """The same job with version ids for "current", so that a resumed run draws what it drew before.

    Raises `CatalogError` where there is no such version.
    """
    ids = {
        stream: tuple(
            ref.model_copy(update={"version": catalog_of(store, ref.name).open(ref.version).id})
            for ref in refs
        )
        for stream, refs in job.datasets.items()
    }
    return job.model_copy(update={"datasets": ids})


def joined(job: PretrainJob, store: Path, data: DatasetVersion) -> DatasetVersion:
    """What all of them hold and know: `data` with the samples, classes and answers of the others.

    Raises `ValueError` where a class is a thing in one and stuff in another.
    """
    names = dict.fromkeys((ref.name, ref.version) for refs in job.datasets.values() for ref in refs)
    others = [catalog_of(store, name).open(version) for name, version in names]
    versions = [data, *(other for other in others if other.id != data.id)]
    taxonomies = {f"{v.card.dataset}@{v.id}/{n}": t for v in versions for n, t in v.card.taxonomies.items()}
    if conflict := contradiction((v.card.dataset, t) for v in versions for t in v.card.taxonomies.values()):
        name, one, other = conflict
        raise ValueError(
            f"{name!r} is a thing in one of the datasets {one!r}, {other!r} and stuff in the other: "
            "rename it in one and rebuild"
        )
    answers = dict.fromkeys(answer for version in versions for answer in version.card.answers)
    card = data.card.model_copy(update={"taxonomies": taxonomies, "answers": tuple(answers)})
    return replace(data, card=card, samples=pa.concat_tables(v.samples for v in versions))


def open_stream(
    job: PretrainJob,
    store: Path,
    data: DatasetVersion,
    stream: Stream,
    *,
    rank: int,
    world_size: int,
    position: int,
    make_batch: MakeBatch[T],
    on_skip: Callable[[], None] = lambda: None,
) -> Iterator[tuple[T, int]]:
    """What one rank draws of a stream, from `position` on. Raises as `training_stream` does."""
    train = job.train
    place = {"rank": rank, "world_size": world_size, "position": position, "seed": train.seed}
    place["global_batch"] = getattr(train.batch, stream) // train.accumulate
    if pattern := train.tars.get(stream):
        tars = sorted(Path(path) for path in glob(str(store / pattern)))
        return foreign_stream(tars, make_batch=make_batch, on_skip=on_skip, **place)
    return training_stream(
        sources(job, store, data, stream),
        stream=stream,
        workers=train.loader_workers,
        threads=train.loader_threads,
        make_batch=make_batch,
        on_skip=on_skip,
        **place,
    )


def sources(job: PretrainJob, store: Path, data: DatasetVersion, stream: Stream) -> list[Weighted]:
    """What one stream draws from, by weight; `data` where the job names nothing for it."""
    refs = job.datasets.get(stream)
    if not refs:
        return [Weighted(version=data, shards=_shards(job, data))]
    opened = [(catalog_of(store, ref.name).open(ref.version, split="train"), ref.weight) for ref in refs]
    return [Weighted(version=v, weight=weight, shards=_shards(job, v)) for v, weight in opened]


def _shards(job: PretrainJob, version: DatasetVersion) -> Shards | None:
    """By way of the cache, where the job names a folder for it."""
    if not job.train.cache:
        return None
    limit_bytes = int(job.train.cache_gb * 2**30)
    return CachedShards(version.source(), Path(job.train.cache), limit_bytes, version.manifest)
