"""Our stream beside plain webdataset, LitData and MosaicML streaming, over the same photographs.

    python -m benchmarks.loader [--rounds 5] [--samples 1024] [--batches 24] [--folder DIR] [--ways ours ...]

480 x 640 JPEGs of about 100 KB with panoptic labels, batches of 32, two loaders on two cores.
Every round gives each way its turn, in a process of its own that is timed after a warm-up; ratios are medians
over the rounds. `/s` is by the clock; `/CPU s` divides by the processor time of the way's whole process tree,
which depends less on what else the machine does.

What is delivered differs in one point that is ours to choose: others read the RGB panoptic PNG as COCO has
it ("panoptic"), we the index map that our shards hold; "index map" is the same comparison with our index
maps given to all. Ours checks the hash of every sample, shuffles, and could resume anywhere; the others
neither shuffle nor check here. Our loaders are threads ("ours") or processes ("processes"), theirs are
processes; they decode with Pillow and are given torch's own collation into shared memory. LitData and
MosaicML pin older libraries, so they live in an environment that is made in the folder.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH, DISTINCT = 480, 640, 128
SHARD = 128  # samples of one of our shards
CONTENTS = ("panoptic", "index map", "jpeg")
# what stands beside the JPEG in each comparison, for those who read what they are given
COMPANION = {"panoptic": "png", "index map": "map", "jpeg": None}
PEERS = ("litdata==0.2.76", "mosaicml-streaming==0.13.0")
WARM_UP = 6  # batches: two a worker are prepared ahead


# ------------------------------------------------------------------------------------------ the photographs


def photo(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise with 18 ellipses: uint8[H, W, 3], and which of them each pixel shows, uint8[H, W]."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image, labels = np.asarray(smooth).astype(np.int16), np.zeros((HEIGHT, WIDTH), np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for segment in range(1, 19):
        (cy, cx), (a, b) = rng.integers(0, (HEIGHT, WIDTH)), rng.integers(20, 120, 2)
        inside = ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1
        labels[inside] = segment
        image[inside] = image[inside] // 2 + rng.integers(0, 128, 3)
    image += rng.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.int16)
    return image.clip(0, 255).astype(np.uint8), labels


def encoded(pixels: np.ndarray, file_format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, file_format, **options)
    return sink.getvalue()


def write_files(folder: Path) -> None:
    """The distinct photographs as `<i>.jpg`, `<i>.png` (COCO's RGB ids) and `<i>.map` (an index PNG)."""
    for number in range(DISTINCT):
        image, labels = photo(number)
        ids = np.random.default_rng(number).integers(1, 256, (19, 3), dtype=np.uint8)
        ids[0] = 0
        ids[:, 0] = np.arange(19)  # distinct
        (folder / f"{number}.jpg").write_bytes(encoded(image, "JPEG", quality=94))
        (folder / f"{number}.png").write_bytes(encoded(ids[labels], "PNG"))
        (folder / f"{number}.map").write_bytes(encoded(labels, "PNG"))


def records(folder: Path, samples: int) -> Iterator[dict[str, bytes]]:
    for number in range(samples):
        stem = folder / "files" / str(number % DISTINCT)
        yield {suffix: stem.with_suffix(f".{suffix}").read_bytes() for suffix in ("jpg", "png", "map")}


# --------------------------------------------------------------------------------- each way, written and read


def write_ours(folder: Path, samples: int) -> None:
    """Two datasets of our shards: with label maps, and with captions alone."""
    import pyarrow.parquet as pq

    from pipelines.shards import Entry, write
    from schemas.masks import area_and_bbox, rgb_to_ids
    from schemas.records import SampleMeta, Segment

    for content in ("panoptic", "jpeg"):
        target = folder / f"ours-{content}"
        target.mkdir()
        entries = []
        for number in range(samples):
            stem = folder / "files" / str(number % DISTINCT)
            segments = None
            if content == "panoptic":
                ids = rgb_to_ids(np.asarray(Image.open(stem.with_suffix(".png"))))
                found = [(int(i), *area_and_bbox(ids == i)) for i in np.unique(ids) if i]
                segments = tuple(
                    Segment(id=i, category=f"class {n}", isthing=True, area=area, bbox=bbox)
                    for n, (i, area, bbox) in enumerate(found)
                )
            image = stem.with_suffix(".jpg")
            meta = SampleMeta(
                key=f"{number:06}",
                split="train",
                height=HEIGHT,
                width=WIDTH,
                sha256=sha256(image.read_bytes()),
                taxonomy="photos",
                segments=segments,
                captions=() if segments else ("a photograph",),
            )
            labels = str(stem.with_suffix(".png")) if segments else None
            entries.append(
                Entry(meta=meta, image_path=str(image), labels_path=labels, labels_sha256="", size_bytes=0)
            )
        rows = []
        for first in range(0, samples, SHARD):
            held = entries[first : first + SHARD]
            receipt = write(f"train-{first:06}.tar", held, target)
            rows += [
                (receipt.shard, entry, member) for entry, member in zip(held, receipt.members, strict=True)
            ]
        pq.write_table(table(rows), target / "samples.parquet")


def table(rows: list[Any]) -> Any:
    """samples.parquet of what was written."""
    import pyarrow as pa

    from schemas.records import SAMPLES

    told = [
        {
            "key": member.key,
            "split": "train",
            "stream": entry.stream,
            "shard": shard,
            "offset": member.offset,
            "size_bytes": member.size_bytes,
            "sha256": member.sha256,
            "segments": len(entry.meta.segments or ()),
            "referring": 0,
            "captions": len(entry.meta.captions),
            "questions": 0,
        }
        for shard, entry, member in rows
    ]
    return pa.Table.from_pylist(told, schema=SAMPLES)


def ours(folder: Path, content: str, batch: int, loaders: int, kind: str = "threads") -> Iterable[Any]:
    import pyarrow.parquet as pq

    from pipelines.catalog import Counts, DatasetCard, DatasetVersion
    from pipelines.stream import training_stream
    from schemas.records import MANIFEST, REJECTS

    root = folder / ("ours-jpeg" if content == "jpeg" else "ours-panoptic")
    counts = Counts(samples=0, segments=0, referring=0, captions=0, questions=0)
    card = DatasetCard(
        dataset="photos",
        version="0",
        schema_version=1,
        code_version="",
        sources=(),
        num_read=0,
        num_kept=0,
        rejects={},
        counts={"train": counts},
        taxonomies={},
        answers=(),
    )
    version = DatasetVersion(
        id="0",
        card=card,
        manifest=MANIFEST.empty_table(),
        samples=pq.read_table(root / "samples.parquet"),
        rejects=REJECTS.empty_table(),
        shards_root=root,
        folder=root,
    )
    return training_stream(
        version,
        stream="image_text" if content == "jpeg" else "segmentation",
        seed=0,
        global_batch=batch,
        rank=0,
        world_size=1,
        make_batch=stacked,
        **{kind: loaders},
    )


def ours_processes(folder: Path, content: str, batch: int, workers: int) -> Iterable[Any]:
    return ours(folder, content, batch, workers, "workers")


def stacked(samples: list[Any], seeds: list[int]) -> list[Any]:
    import torch
    from torch.utils.data import default_collate

    pixels = [[torch.from_numpy(s.image)] for s in samples]
    for sample, row in zip(samples, pixels, strict=True):
        if sample.labels is not None:
            row.append(torch.from_numpy(sample.labels))
    return default_collate(pixels)


def decoded(sample: dict[str, Any], content: str) -> list[Any]:
    """What every peer makes of the bytes of a sample."""
    import torch

    companion = COMPANION[content]
    members = [sample["jpg"], *([sample[companion]] if companion else [])]
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(data)))) for data in members]


def write_webdataset(folder: Path, samples: int) -> None:
    import webdataset as wds

    (folder / "webdataset").mkdir()
    with wds.ShardWriter(f"{folder}/webdataset/%04d.tar", maxcount=128, verbose=0) as sink:
        for number, sample in enumerate(records(folder, samples)):
            sink.write({"__key__": f"{number:06}", **sample})


def webdataset(folder: Path, content: str, batch: int, workers: int) -> Iterable[Any]:
    import webdataset as wds
    from torch.utils.data import default_collate

    urls = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
    wanted = {"jpg", COMPANION[content]}
    dataset = (
        wds.WebDataset(urls, shardshuffle=False, select_files=lambda name: name.rpartition(".")[2] in wanted)
        .map(lambda sample: decoded(sample, content))
        .batched(batch, collation_fn=default_collate)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers)


def write_litdata(folder: Path, samples: int) -> None:
    from litdata.streaming.writer import BinaryWriter

    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="16MB")
    for number, sample in enumerate(records(folder, samples)):
        writer[number] = sample
    writer.done()
    writer.merge(1)


def litdata(folder: Path, content: str, batch: int, workers: int) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Photos(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return decoded(super().__getitem__(index), content)

    return StreamingDataLoader(Photos(str(folder / "litdata")), batch_size=batch, num_workers=workers)


def write_mosaicml(folder: Path, samples: int) -> None:
    from streaming import MDSWriter

    columns = {"jpg": "bytes", "png": "bytes", "map": "bytes"}
    with MDSWriter(out=str(folder / "mosaicml"), columns=columns, size_limit=2**24) as sink:
        for sample in records(folder, samples):
            sink.write(sample)


def mosaicml(folder: Path, content: str, batch: int, workers: int) -> Iterable[Any]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Photos(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return decoded(super().__getitem__(index), content)

    dataset = Photos(local=str(folder / "mosaicml"), shuffle=False, batch_size=batch)
    return DataLoader(dataset, batch_size=batch, num_workers=workers)


Read = Callable[[Path, str, int, int], Iterable[Any]]
WAYS: dict[str, tuple[Callable[[Path, int], None], Read]] = {
    "ours": (write_ours, ours),
    "processes": (write_ours, ours_processes),
    "webdataset": (write_webdataset, webdataset),
    "litdata": (write_litdata, litdata),
    "mosaicml": (write_mosaicml, mosaicml),
}
OWN_ENVIRONMENT = ("litdata", "mosaicml")


def sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------- measuring


def turn(folder: Path, way: str, content: str, batch: int, workers: int, batches: int) -> dict[str, float]:
    """Samples per second by the clock and by processor time, of `batches` batches after the warm-up."""
    import psutil

    drawn = iter(WAYS[way][1](folder, content, batch, workers))
    for _ in range(WARM_UP):
        next(drawn)

    def burnt() -> float:
        tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in tree)

    before, started = burnt(), time.perf_counter()
    seen = sum(len(first_tensor(b)) for b in itertools.islice(drawn, batches))
    took, cpu = time.perf_counter() - started, burnt() - before
    assert seen == batch * batches, f"{way} ended after {seen} samples; raise --samples"
    return {"clock": seen / took, "cpu": seen / cpu}


def first_tensor(batch: Any) -> Any:
    while isinstance(batch, (list, tuple)):
        batch = batch[0]
    return batch


def environment(folder: Path) -> Path | None:
    """A Python with the two peers, which otherwise sees what this one sees; None where it cannot be had."""
    home = folder / "peers"
    python = home / "bin" / "python"
    if not (home / "installed").is_file():
        venv.create(home, with_pip=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEERS]
        if subprocess.run(install, check=False).returncode:
            return None
        (home / "installed").touch()
    return python


def child(python: Path | str, *arguments: str) -> str:
    """This file in another interpreter. Raises `CalledProcessError`."""
    root = str(Path(__file__).resolve().parents[1])
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [str(python), "-W", "ignore", "-m", "benchmarks.loader", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=settings, cwd=root
    ).stdout


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    peers = environment(folder) if set(OWN_ENVIRONMENT) & set(arguments.ways) else None
    pythons = {way: peers if way in OWN_ENVIRONMENT else sys.executable for way in arguments.ways}
    for way in [way for way, python in pythons.items() if python is None]:
        print(f"{way}: could not be installed, and is left out")
        del pythons[way]
    if not (folder / "files").is_dir():
        (folder / "files").mkdir()
        write_files(folder / "files")
    size = ["--folder", str(folder), "--samples", str(arguments.samples)]
    for way, python in pythons.items():
        written = folder / f"{WAYS[way][0].__name__}.done"
        if not written.exists():
            child(python, "--write", way, *size)
            written.touch()
    for content in arguments.contents:
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in pythons}
        for _ in range(arguments.rounds):
            for way, python in pythons.items():
                timed = ["--turn", way, "--contents", content, "--batches", str(arguments.batches), *size]
                seen[way].append(json.loads(child(python, *timed).splitlines()[-1]))
        for way, turns in seen.items():
            clock, cpu = (statistics.median(t[k] for t in turns) for k in ("clock", "cpu"))
            ratios = [
                statistics.median(mine[k] / t[k] for mine, t in zip(seen["ours"], turns, strict=True))
                for k in ("clock", "cpu")
            ]
            print(
                f"{content:10} {way:11} {clock:6.0f} /s {cpu:6.0f} /CPU s; ours is {ratios[0]:.2f} x by the "
                f"clock, {ratios[1]:.2f} x by CPU"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=24, help="timed in each turn")
    parser.add_argument(
        "--folder", type=Path, help="keeps the data and the peers' environment; else temporary"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--contents", nargs="+", choices=CONTENTS, default=list(CONTENTS))
    parser.add_argument("--write", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--turn", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        WAYS[arguments.write][0](arguments.folder, arguments.samples)
    elif arguments.turn:
        (content,) = arguments.contents
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        print(json.dumps(turn(arguments.folder, arguments.turn, content, 32, 2, arguments.batches)))
    elif arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        compare(arguments.folder.absolute(), arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="loader-") as folder:
            compare(Path(folder), arguments)


if __name__ == "__main__":
    main()
