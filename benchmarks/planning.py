"""How much memory do reading and the decisions of a build take, and a whole build of a larger corpus?

    python -m benchmarks.planning read [--rows 1000000 10000000]
    python -m benchmarks.planning decide [--rows 1000000 10000000]
    python -m benchmarks.planning build [--samples 2000 8000 32000] [--workers 2]

`read` brings a table with a path and a caption a line to rows on disk, and looks for none of the pictures.
`decide` groups and plans rows that are made up. Each number has a process of its own: goal 4 GB for ten
million. `build` builds corpora of 1, 4 and 16 times as many small pictures, and prints the most that the
driver and any one worker of Ray held.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.rebuild import session, write_corpus
from pipelines.build import build
from pipelines.catalog import Catalog
from pipelines.corpora import captions_table
from pipelines.duplicates import THUMBNAIL_BYTES
from pipelines.grouping import LightRows, group
from pipelines.planning import plan
from pipelines.reading import HarvestOrder, harvest
from schemas.jobs import BuildConfig, CorpusConfig, CurateConfig
from schemas.masks import Array

MB = 2**20
SHARED = 4  # every fourth image is also in the second corpus


def made_up(num_rows: int) -> LightRows:
    """Rows of three corpora over fewer images; every hundredth image is one of an evaluation split."""
    chance = np.random.default_rng(0)
    image = np.arange(num_rows, dtype=np.int64)
    image[1::SHARED] = image[:-1:SHARED][: len(image[1::SHARED])]
    numbers = pc.utf8_lpad(pa.array(np.arange(num_rows)).cast(pa.string()), width=12, padding="0")
    return LightRows(
        part=(np.arange(num_rows) // 2500).astype(np.int32),
        row=(np.arange(num_rows) % 2500).astype(np.int32),
        corpus=(np.arange(num_rows) % 3).astype(np.int32),
        held_out=np.arange(num_rows) % 100 == 0,
        image_high=chance.permutation(num_rows).astype(np.uint64)[image] << np.uint64(40),
        image_low=image.astype(np.uint64),
        number=np.zeros(num_rows, dtype=np.uint64),
        look=chance.integers(1, 2**63, num_rows, dtype=np.uint64)[image],
        worth=np.zeros(num_rows, dtype=np.int8),
        pixels=np.full(num_rows, 640 * 480),
        tie=chance.integers(0, 2**63, num_rows, dtype=np.uint64),
        labelled=np.arange(num_rows) % 5 == 0,
        key=pc.binary_join_element_wise("corpus", numbers, "-"),
    )


def read(num_rows: int, folder: Path) -> str:
    """Harvest a TSV of 100 bytes a line; a line of what it took."""
    with (folder / "captions.tsv").open("w") as file:
        file.write("image\tcaption\n")
        for i in range(num_rows):
            file.write(
                f"images/{i // 1000:05}/{i:09}.jpg\ta photograph of thing number {i} that stands in a field\n"
            )
    captions_table.data_file = lambda corpus, images, name, missing: (f"{corpus.root}/{name}", name)
    corpus = CorpusConfig(
        name="many", format="captions_table", split="train", root=str(folder), annotations="captions.tsv"
    )
    before, started = _peak_mb(), time.process_time()
    report = harvest(HarvestOrder(corpus=corpus, curate=CurateConfig(), number=0, work=str(folder)))
    cpu = time.process_time() - started
    return f"{report.num_rows} rows read: CPU {cpu:.1f} s; peak {_peak_mb():.0f} MB, {before:.0f} MB before"


class _Noise:
    """Thumbnails of nothing: every row has another one."""

    def __getitem__(self, rows: Array) -> Array:
        return np.random.default_rng(rows).integers(0, 256, (len(rows), THUMBNAIL_BYTES), dtype=np.uint8)


def decide(num_rows: int) -> str:
    """Group and plan; a line of what it took."""
    rows = made_up(num_rows)
    before = _peak_mb()
    started = time.process_time()
    groups = group(rows, _Noise(), near_duplicates="keep")
    grouped = time.process_time()
    num_samples, chance = len(groups.home), np.random.default_rng(1)
    planned = plan(
        kind=np.zeros(num_samples, dtype=np.int8),
        bits=chance.integers(0, 2**64, num_samples, dtype=np.uint64),
        rank=pc.rank(groups.key, tiebreaker="first").to_numpy().astype(np.int64),
        source_bytes=chance.integers(10_000, 300_000, num_samples),
        digest=chance.integers(0, 256, (num_samples, 32), dtype=np.uint8),
        max_samples=500,
        max_bytes=256 * MB,
    )
    cpu = f"CPU {grouped - started:.1f} s to group, {time.process_time() - grouped:.1f} s to plan"
    made = f"{num_samples} samples in {len(planned.digests)} shards, {len(groups.refused)} refused"
    return f"{num_rows} rows: {made}; {cpu}; peak {_peak_mb():.0f} MB, {before:.0f} MB of it the rows"


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Watch(threading.Thread):
    """The most that this process and any one of its descendants held of its own, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver = self.worker = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        here = psutil.Process()
        while not self.over.wait(0.2):
            self.driver = max(self.driver, _own_mb(here))
            for child in here.children(recursive=True):
                try:
                    if "ray::" in child.name() or "ray::" in " ".join(child.cmdline()[:1]):
                        self.worker = max(self.worker, _own_mb(child))
                except psutil.Error:
                    continue  # it ended meanwhile


def _own_mb(process: psutil.Process) -> float:
    memory = process.memory_info()
    return (memory.rss - memory.shared) / MB


def whole(num_samples: int, workers: int, folder: Path) -> str:
    """Build a corpus of this size; a line of what it took."""
    corpus = write_corpus(folder / f"corpus-{num_samples}", num_samples)
    config = BuildConfig(num_workers=workers)
    watch = _Watch()
    watch.start()
    report = build([corpus], config, Catalog(folder / f"store-{num_samples}", "many"))
    watch.over.set()
    watch.join()
    most = f"driver {watch.driver:.0f} MB, any one worker {watch.worker:.0f} MB"
    return f"{report.num_samples} samples in {report.seconds:.0f} s; at most: {most}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("read", "decide", "build"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1_000_000, 10_000_000))
    parser.add_argument("--samples", type=int, nargs="+", default=(2_000, 8_000, 32_000))
    parser.add_argument("--workers", type=int, default=2, help="1 builds in this process, without Ray")
    options = parser.parse_args(arguments)
    if options.what != "build" and len(options.rows) > 1:
        for num_rows in options.rows:
            command = [sys.executable, "-m", "benchmarks.planning", options.what, "--rows", str(num_rows)]
            subprocess.run(command, check=True)
    elif options.what == "decide":
        print(decide(options.rows[0]), flush=True)
    elif options.what == "read":
        with tempfile.TemporaryDirectory() as folder:
            print(read(options.rows[0], Path(folder)), flush=True)
    else:
        ray = session() if options.workers > 1 else nullcontext()
        with tempfile.TemporaryDirectory() as folder, ray:
            for num_samples in options.samples:
                print(whole(num_samples, options.workers, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
