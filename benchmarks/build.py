"""How fast are builds, and label maps? Each beside its plain peer, in turns.

    python -m benchmarks.build [--samples 400] [--rounds 3] [--workers 1]

`build` against a plain reader-and-tarrer in one process, goal 0.9 of its speed a core: it decodes every
photograph to its last row, as a check, and every RGB label map; makes of the colours ids and of the ids an
index map, by a loop over the listed segments, as converters of this field do; and tars photograph, index map
and JSON, hashing what it writes. It skips what else a build does: it trusts the paths, checks no ids, areas
or boxes, looks for no copies, keeps no index, flushes nothing to disk. One worker is compared in seconds of
CPU; more, on a Ray that runs already, by the clock, for which the machine must be quiet, and with as many
plain loops side by side, each on its share: what the machine has to give. `index maps`: label
maps as the shards hold them against RGB codes, both to ids; goal 2.5 times the speed.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.paired import measure, table
from benchmarks.rebuild import session
from pipelines.build import build
from pipelines.catalog import Catalog
from pipelines.shards import parse
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.masks import area_and_bbox, ids_to_rgb, rgb_to_ids

HEIGHT, WIDTH, REGIONS = 480, 640, 12


def write_corpus(root: Path, num_samples: int) -> CorpusConfig:
    """Smooth noise of the size and the bytes of photographs, with rectangles as regions."""
    chance = np.random.default_rng(0)
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, num_samples + 1):
        small = Image.fromarray(chance.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        name = f"{i:012d}"
        small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(root / f"images/{name}.jpg", quality=94)
        ids = np.full((HEIGHT, WIDTH), 70_000 * REGIONS, dtype=np.int32)
        for region in range(1, REGIONS):
            y, x = chance.integers(0, HEIGHT - 120), chance.integers(0, WIDTH - 160)
            ids[y : y + chance.integers(20, 120), x : x + chance.integers(20, 160)] = 70_000 * region
        Image.fromarray(ids_to_rgb(ids)).save(root / f"panoptic/{name}.png")
        images.append({"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        segments = [_segment(ids == value, int(value)) for value in np.unique(ids)]
        annotations.append({"image_id": i, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": 1, "name": "thing", "isthing": 1}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(document))
    return CorpusConfig(
        name="photos",
        format="coco_panoptic",
        split="train",
        root=str(root),
        images="images",
        annotations="panoptic.json",
        labels="panoptic",
    )


def _segment(mask: np.ndarray, number: int) -> dict[str, object]:
    area, bbox = area_and_bbox(mask)
    return {"id": number, "category_id": 1, "iscrowd": 0, "area": area, "bbox": list(bbox)}


def plain(corpus: CorpusConfig, target: Path, part: int = 0, parts: int = 1) -> int:
    """Read, decode fully, renumber the label map, hash, tar: the loop that one writes by hand; how many."""
    root = Path(corpus.root)
    document = json.loads((root / corpus.annotations).read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    whole = hashlib.sha256()
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for annotation in document["annotations"][part::parts]:
            image = (root / "images" / names[annotation["image_id"]]).read_bytes()
            Image.open(io.BytesIO(image)).load()
            codes = (root / "panoptic" / annotation["file_name"]).read_bytes()
            ids = rgb_to_ids(np.asarray(Image.open(io.BytesIO(codes)).convert("RGB")))
            index = np.zeros(ids.shape, dtype=np.uint8)
            for place, segment in enumerate(annotation["segments_info"], 1):
                index[ids == segment["id"]] = place
            sink = io.BytesIO()
            Image.fromarray(index).save(sink, "PNG")
            key = f"{annotation['image_id']:012d}"
            members = {"jpg": image, "json": json.dumps(annotation).encode(), "segments.png": sink.getvalue()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                whole.update(data)
    return len(document["annotations"][part::parts])


def side_by_side(corpus: CorpusConfig, folder: Path, pool: Executor, parts: int) -> int:
    """The same in several processes that are there already."""
    share = partial(plain, corpus)
    targets = [folder / f"plain-{part}.tar" for part in range(parts)]
    return sum(pool.map(share, targets, range(parts), [parts] * parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    ray = session() if options.workers > 1 else nullcontext()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ray, ProcessPoolExecutor(options.workers, context) as pool:
        run(Path(folder), options.samples, options.rounds, options.workers, pool)


def run(folder: Path, num_samples: int, rounds: int, workers: int, pool: Executor) -> None:
    corpus = write_corpus(folder / "corpus", num_samples)
    stores = iter(folder / f"store-{i}" for i in range(rounds))
    config = BuildConfig(num_workers=workers)
    clock = time.process_time if workers == 1 else time.perf_counter
    ways = {
        "plain": lambda: plain(corpus, folder / "plain.tar"),
        "build": lambda: build([corpus], config, Catalog(next(stores), "photos")).num_samples,
    }
    if workers > 1:
        ways["side by side"] = lambda: side_by_side(corpus, folder, pool, workers)
        ways["side by side"]()  # its processes start
    print(f"{num_samples} photographs of {HEIGHT} x {WIDTH} with {REGIONS} regions at most")
    times = measure(ways, rounds, lambda counts: len(set(counts.values())) == 1, clock)
    print(table(times, "plain"))
    speed = statistics.median(p / b for p, b in zip(times["plain"], times["build"], strict=True))
    print(f"{workers} workers are {speed:.2f} x as fast as the plain loop, {speed / workers:.2f} a worker")
    if workers > 1:
        pairs = zip(times["plain"], times["side by side"], strict=True)
        most = statistics.median(one / several for one, several in pairs)
        print(
            f"{workers} plain loops side by side are {most:.2f} x as fast as one, {most / workers:.2f} each"
        )

    coded = [path.read_bytes() for path in sorted((folder / "corpus" / "panoptic").iterdir())]
    version = Catalog(folder / "store-0", "photos").open()
    indexed = []
    for row in version.samples.to_pylist():
        data = (version.shards_root / row["shard"]).read_bytes()
        indexed.append(parse(data[row["offset"] : row["offset"] + row["size_bytes"]])[1]["segments.png"])
    maps = {
        "RGB codes": lambda: sum(
            rgb_to_ids(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).size for data in coded
        ),
        "index maps": lambda: sum(np.array(Image.open(io.BytesIO(data))).size for data in indexed),
    }
    print(table(measure(maps, rounds, lambda sizes: len(set(sizes.values())) == 1), "RGB codes"))


if __name__ == "__main__":
    main()
