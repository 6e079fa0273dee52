"""Laws of the stream: exactly once, resumable anywhere, independent of workers, and honest about damage."""

import io
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from pipelines.cache import CachedShards, Shards
from pipelines.catalog import DatasetVersion
from pipelines.shards import ShardError
from pipelines.stream import (
    StreamError,
    Weighted,
    decode,
    decode_image,
    read_samples,
    training_stream,
)
from schemas.masks import rgb_to_ids
from schemas.records import Sample
from schemas.tasks import Stream

Drawn = tuple[list[tuple[str, int]], int]


def keys_and_seeds(samples: list[Sample], seeds: list[int]) -> list[tuple[str, int]]:
    assert samples, "a batch is never empty"
    return [(sample.key, seed) for sample, seed in zip(samples, seeds, strict=True)]


def streamed(
    version: DatasetVersion,
    stream: Stream = "segmentation",
    *,
    global_batch: int = 4,
    rank: int = 0,
    world_size: int = 1,
    position: int = 0,
    workers: int = 0,
    threads: int = 0,
    shards: Shards | None = None,
    max_corrupt: int = 16,
    on_skip: Callable[[], None] = lambda: None,
) -> Iterator[Drawn]:
    return training_stream(
        [Weighted(version=version, shards=shards)],
        stream=stream,
        seed=11,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        position=position,
        workers=workers,
        threads=threads,
        make_batch=keys_and_seeds,
        max_corrupt=max_corrupt,
        on_skip=on_skip,
    )


def train_keys(version: DatasetVersion) -> list[str]:
    rows = version.samples.to_pylist()
    return [row["key"] for row in rows if row["split"] == "train" and row["segments"] + row["referring"]]


@pytest.fixture
def damaged(demo_dataset: DatasetVersion, tmp_path: Path) -> DatasetVersion:
    """A version whose shards may be broken."""
    shutil.copytree(demo_dataset.shards_root, tmp_path / "shards")
    return replace(demo_dataset, shards_root=tmp_path / "shards")


def flip_byte(version: DatasetVersion, key: str) -> None:
    """Change one byte of the image of a sample: the JPEG may still decode."""
    (row,) = (row for row in version.samples.to_pylist() if row["key"] == key)
    path = version.shards_root / row["shard"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + 512 + 700] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1), (4, 0)])
def test_two_epochs_deliver_every_sample_exactly_twice(
    demo_dataset: DatasetVersion, world_size: int, workers: int
) -> None:
    keys = train_keys(demo_dataset)
    steps, rest = divmod(2 * len(keys), 4)
    assert not rest
    seen = []
    for rank in range(world_size):
        drawn = streamed(demo_dataset, rank=rank, world_size=world_size, workers=workers)
        seen += [key for batch, _ in islice(drawn, steps) for key, _ in batch]
    assert sorted(seen) == sorted(keys * 2)


def test_the_batches_do_not_depend_on_the_number_of_workers(demo_dataset: DatasetVersion) -> None:
    alone, one, two = (list(islice(streamed(demo_dataset, workers=n), 20)) for n in (0, 1, 2))
    assert alone == one == two


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 13])
def test_resumed_equals_uninterrupted(demo_dataset: DatasetVersion, stop: int) -> None:
    whole = list(islice(streamed(demo_dataset), 20))
    position = whole[stop - 1][1]
    assert list(islice(streamed(demo_dataset, position=position), 20 - stop)) == whole[stop:]


def test_resumed_on_other_ranks_the_global_batches_are_the_same(demo_dataset: DatasetVersion) -> None:
    whole = list(islice(streamed(demo_dataset), 12))
    resumed = [
        islice(streamed(demo_dataset, rank=r, world_size=2, position=whole[4][1]), 7) for r in range(2)
    ]
    joined = [(a + b, position) for (a, position), (b, _) in zip(*resumed, strict=True)]
    assert joined == whole[5:]


def test_a_position_counts_the_samples_of_all_ranks(demo_dataset: DatasetVersion) -> None:
    drawn = streamed(demo_dataset, rank=1, world_size=2, position=6)
    assert [position for _, position in islice(drawn, 3)] == [10, 14, 18]


def test_epochs_come_in_another_order_with_other_seeds(demo_dataset: DatasetVersion) -> None:
    steps = len(train_keys(demo_dataset)) // 4
    drawn = [item for batch, _ in islice(streamed(demo_dataset), 2 * steps) for item in batch]
    first, second = drawn[: 4 * steps], drawn[4 * steps :]
    assert [key for key, _ in first] != [key for key, _ in second]
    assert not {seed for _, seed in first} & {seed for _, seed in second}


def test_a_stream_admits_what_its_tasks_need_and_nothing_of_the_validation_split(
    demo_dataset: DatasetVersion,
) -> None:
    for stream in ("segmentation", "image_text"):
        samples = []
        drawn = training_stream(
            demo_dataset,
            stream=stream,
            seed=0,
            global_batch=8,
            rank=0,
            world_size=1,
            make_batch=lambda batch, seeds: batch,
        )
        for batch, _ in islice(drawn, 4):
            samples += batch
        assert {s.meta.split for s in samples} == {"train"}
        for sample in samples:
            fields = {"segmentation": sample.meta.segments or sample.meta.referring}
            assert fields.get(stream, sample.meta.captions or sample.meta.questions), sample.key


def test_loader_processes_leave_the_random_state_of_the_training_alone(demo_dataset: DatasetVersion) -> None:
    before = torch.get_rng_state()
    next(streamed(demo_dataset, workers=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_is_skipped_and_named(
    damaged: DatasetVersion, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    keys = train_keys(damaged)
    flip_byte(damaged, keys[3])
    drawn = list(islice(streamed(damaged, workers=workers), len(keys) // 4))
    assert sorted(key for batch, _ in drawn for key, _ in batch) == sorted(set(keys) - {keys[3]})
    assert sorted(len(batch) for batch, _ in drawn) == [3] + [4] * (len(drawn) - 1)
    (message,) = (record.getMessage() for record in caplog.records)
    assert keys[3] in message and ".tar" in message


def test_a_batch_of_which_nothing_is_left_is_passed_over(damaged: DatasetVersion) -> None:
    whole = list(islice(streamed(damaged), 3))
    for key, _ in whole[1][0]:
        flip_byte(damaged, key)
    assert list(islice(streamed(damaged), 2)) == [whole[0], whole[2]]


def test_every_rank_draws_the_same_number_of_batches_whatever_is_corrupt(
    damaged: DatasetVersion, caplog: pytest.LogCaptureFixture
) -> None:
    """Of batch 1 nothing is left on rank 0, of batch 2 nothing at all."""
    whole, skipped = list(islice(streamed(damaged), 5)), Counter[int]()
    lost = [key for key, _ in whole[1][0][:2] + whole[2][0]]
    for key in lost:
        flip_byte(damaged, key)
    tellers = [partial(skipped.update, [rank]) for rank in range(2)]
    streams = [streamed(damaged, rank=rank, world_size=2, on_skip=tell) for rank, tell in enumerate(tellers)]
    ranks = [list(islice(stream, 4)) for stream in streams]
    assert skipped == {0: 4, 1: 2}, "each by the rank whose share it is in, and once"
    for rank in ranks:
        assert [position for _, position in rank] == [4, 8, 16, 20]
    assert ranks[0][1][0] == whole[1][0][2:3], "the first readable sample of the global batch stands in"
    seen = {key for rank in ranks for batch, _ in rank for key, _ in batch}
    assert seen == {key for batch, _ in whole for key, _ in batch} - set(lost)
    resumed = list(islice(streamed(damaged, rank=0, world_size=2, position=4), 3))
    assert resumed == ranks[0][1:]
    told = " ".join(record.getMessage() for record in caplog.records)
    assert all(key in told for key in lost)


def test_threads_that_prepare_batches_change_nothing_and_end(damaged: DatasetVersion) -> None:
    alone = list(islice(streamed(damaged), 12))
    ahead = streamed(damaged, threads=3)
    assert list(islice(ahead, 12)) == alone
    ahead.close()  # type: ignore[attr-defined]
    for key, _ in alone[1][0]:
        flip_byte(damaged, key)
    assert list(islice(streamed(damaged, threads=2), 2)) == [alone[0], alone[2]]
    with pytest.raises(StreamError, match="1 unreadable samples in a row"):
        list(islice(streamed(damaged, threads=2, max_corrupt=0), 2))
    while any(thread.name.startswith("stream") for thread in threading.enumerate()):
        time.sleep(0.01)


def test_datasets_are_mixed_by_weight_and_each_keeps_its_epochs(demo_dataset: DatasetVersion) -> None:
    """The same shards as two datasets of a third and two thirds: told apart by which samples they hold."""
    train, rows = train_keys(demo_dataset), demo_dataset.samples
    halves = [
        replace(demo_dataset, samples=rows.filter(pc.is_in(rows["key"], pa.array(keys))))
        for keys in (train[:8], train[8:])
    ]

    def mixed(**settings: int) -> Iterator[Drawn]:
        return training_stream(
            [Weighted(version=halves[0], weight=1), Weighted(version=halves[1], weight=2)],
            stream="segmentation",
            seed=3,
            global_batch=6,
            make_batch=keys_and_seeds,
            **({"rank": 0, "world_size": 1} | settings),
        )

    whole = list(islice(mixed(threads=2), 200))
    drawn = [key for batch, _ in whole for key, _ in batch]
    for keys in (train[:8], train[8:]):
        own = [key for key in drawn if key in keys]
        for first in range(0, len(own) - len(keys), len(keys)):
            assert sorted(own[first : first + len(keys)]) == sorted(keys)
    assert abs(sum(key in train[:8] for key in drawn) / len(drawn) - 1 / 3) < 0.05
    ranks = [list(islice(mixed(rank=r, world_size=3, position=whole[9][1]), 4)) for r in range(3)]
    joined = [(sum((b for b, _ in parts), []), parts[0][1]) for parts in zip(*ranks, strict=True)]
    assert joined == whole[10:14]
    with pytest.raises(ValueError, match="the least must be"):
        training_stream(
            [Weighted(version=halves[0], weight=0), Weighted(version=halves[1])],
            stream="segmentation",
            seed=3,
            global_batch=6,
            rank=0,
            world_size=1,
            make_batch=keys_and_seeds,
        )


def test_shards_come_by_way_of_a_cache_that_mends_itself(damaged: DatasetVersion, tmp_path: Path) -> None:
    largest = max(damaged.manifest["size_bytes"].to_pylist())
    cached = CachedShards(damaged.source(), tmp_path / "cache", 2 * largest, damaged.manifest)
    whole = list(islice(streamed(damaged), 12))
    assert list(islice(streamed(damaged, shards=cached, workers=2), 12)) == whole
    assert list(islice(streamed(damaged, shards=cached), 6)) == whole[:6]
    assert list(islice(streamed(damaged, shards=cached, threads=3), 12)) == whole
    for path in (tmp_path / "cache").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert list(islice(streamed(damaged, shards=cached), 12)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_samples_in_a_row_stop_the_run(damaged: DatasetVersion, workers: int) -> None:
    order = [key for batch, _ in islice(streamed(damaged), 3) for key, _ in batch]
    for key in order[2:8]:
        flip_byte(damaged, key)
    assert len(list(islice(streamed(damaged, workers=workers, max_corrupt=6), 2))) == 2
    with pytest.raises(StreamError, match="6 unreadable samples in a row"):
        list(islice(streamed(damaged, workers=workers, max_corrupt=5), 2))


def test_a_missing_or_cut_shard_is_noticed(damaged: DatasetVersion) -> None:
    """Where a plain tar reader ends early without a word."""
    row = damaged.samples.filter(
        pa.compute.equal(damaged.samples["key"], train_keys(damaged)[0])
    ).to_pylist()[0]
    path = damaged.shards_root / row["shard"]
    path.write_bytes(path.read_bytes()[: row["offset"]])
    with pytest.raises(StreamError):
        list(islice(streamed(damaged, max_corrupt=0), 10))
    path.unlink()
    with pytest.raises(StreamError, match="No such file"):
        list(islice(streamed(damaged, max_corrupt=0), 10))


def test_an_evaluation_refuses_to_leave_samples_out(damaged: DatasetVersion) -> None:
    keys = [s.key for s in read_samples(damaged, split="val", stream="segmentation")]
    flip_byte(damaged, keys[1])
    with pytest.raises(StreamError, match=keys[1]):
        list(read_samples(damaged, split="val", stream="segmentation"))


def test_samples_are_read_in_key_order_up_to_a_limit(demo_dataset: DatasetVersion) -> None:
    keys = [s.key for s in read_samples(demo_dataset, split="val", stream="image_text")]
    assert keys == sorted(keys) and len(keys) == demo_dataset.card.counts["val"].samples // 2
    limited = read_samples(demo_dataset, split="val", stream="image_text", limit=3)
    assert [s.key for s in limited] == keys[:3]


def test_an_empty_stream_says_which_dataset_and_what_is_missing(demo_dataset: DatasetVersion) -> None:
    none = replace(demo_dataset, samples=demo_dataset.samples.slice(0, 0))
    with pytest.raises(ValueError, match="'demo'.*no train sample with segments or referring"):
        streamed(none)
    with pytest.raises(ValueError, match="no val sample with captions or questions"):
        read_samples(none, split="val", stream="image_text")


def test_a_batch_that_does_not_divide_is_refused_at_the_call(demo_dataset: DatasetVersion) -> None:
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        streamed(demo_dataset, world_size=3)


def test_a_sample_is_what_the_corpus_holds(demo_dataset: DatasetVersion, demo_corpora: tuple) -> None:
    (corpus,) = (c for c in demo_corpora if c.format == "coco_panoptic" and c.split == "val")
    for sample in islice(read_samples(demo_dataset, split="val", stream="segmentation"), 4):
        files = [f for s in sample.meta.sources if s.corpus == corpus.name for f in s.files]
        image, labels = (np.asarray(Image.open(Path(corpus.root) / file)) for file in files)
        assert sample.image.dtype == np.uint8 and (sample.image == image).all()
        assert sample.labels is not None and sample.labels.dtype == np.uint16
        ids = rgb_to_ids(labels)
        assert ((sample.labels == 0) == (ids == 0)).all()
        for segment in sample.meta.segments or ():
            assert len(np.unique(ids[sample.labels == segment.id])) == 1
            assert (sample.labels == segment.id).sum() == segment.area
        assert {s.id for s in sample.meta.segments or ()} == set(np.unique(sample.labels)) - {0}


def encoded(image: Image.Image, file_format: str) -> bytes:
    sink = io.BytesIO()
    image.save(sink, file_format)
    return sink.getvalue()


RED = Image.new("RGB", (5, 3), (200, 0, 0))


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(RED, "PNG"), (200, 0, 0)),
        (encoded(RED.convert("RGBA"), "PNG"), (200, 0, 0)),
        (encoded(RED.quantize(4), "PNG"), (200, 0, 0)),
        (encoded(RED.convert("CMYK"), "JPEG"), (200, 0, 0)),
        (encoded(Image.new("L", (5, 3), 90), "PNG"), (90, 90, 90)),
        (encoded(Image.new("LA", (5, 3), (90, 7)), "PNG"), (90, 90, 90)),
        (encoded(Image.new("1", (5, 3), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((3, 5), 0x5A17, np.uint16)), "PNG"), (0x5A,) * 3),
    ],
    ids=["rgb", "rgba", "palette", "cmyk", "grey", "grey-alpha", "bits", "grey-16"],
)
def test_every_colour_mode_becomes_rgb(data: bytes, pixel: tuple[int, int, int]) -> None:
    image = decode_image(data)
    assert image.shape == (3, 5, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - pixel).max() <= 3


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True, "quality": 20}),
        ("RGB", {"subsampling": 0}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_jpeg_has_the_pixels_that_pillow_gives(mode: str, options: dict[str, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(sink, "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(sink.getvalue())).convert("RGB"))
    assert (decode_image(sink.getvalue()) == expected).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        encoded(RED, "PNG")[:50],
        encoded(RED, "JPEG")[:-40],
        encoded(RED, "BMP"),
    ],
    ids=["empty", "page", "cut-png", "cut-jpeg", "other-format"],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError):
        decode_image(data)


def test_a_sample_without_one_of_its_members_is_refused(demo_dataset: DatasetVersion) -> None:
    row = next(r for r in demo_dataset.samples.to_pylist() if r["segments"])
    shard = (demo_dataset.shards_root / row["shard"]).read_bytes()
    data = shard[row["offset"] : row["offset"] + row["size_bytes"]]
    assert decode(data).key == row["key"]
    first = 512 + -(-int(data[124:135], 8) // 512) * 512
    for part in (b"", data[:first], data[first:]):
        with pytest.raises(ShardError):
            decode(part)
