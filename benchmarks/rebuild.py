"""What does a rebuild cost? A corpus of many small pictures, built, left alone, and changed by one sample.

    python -m benchmarks.rebuild [--samples 100000] [--workers 2]

Goals: with nothing changed nothing is written, in less than 10 s; one changed, one added or one removed
sample rewrites one shard (or the two that it splits into, or that join again).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import numpy as np
from PIL import Image

from pipelines.build import build
from pipelines.catalog import Catalog
from schemas.jobs import BuildConfig, CorpusConfig

FOLDERS = 100


def write_corpus(root: Path, num_samples: int) -> CorpusConfig:
    """Pictures of 4 x 4 random colours, enlarged, each with a caption."""
    chance = np.random.default_rng(0)
    for folder in range(FOLDERS):
        (root / "images" / f"{folder:02d}").mkdir(parents=True)
    lines = ["image\tcaption"]
    for i in range(num_samples):
        name = f"{i % FOLDERS:02d}/{i:08d}.jpg"
        colours = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        colours.resize((32, 32), Image.Resampling.NEAREST).save(root / "images" / name)
        lines.append(f"{name}\tpicture number {i}")
    (root / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return CorpusConfig(
        name="many",
        format="captions_table",
        split="train",
        root=str(root),
        images="images",
        annotations="pairs.tsv",
    )


def leave(root: Path) -> None:
    """Change nothing."""


def change(root: Path) -> None:
    """Another caption for one picture."""
    _edit(root, lambda lines: [*lines[:500], lines[500] + " again", *lines[501:]])


def add(root: Path) -> None:
    Image.new("RGB", (32, 32), (10, 200, 30)).save(root / "images" / "00" / "new.jpg")
    _edit(root, lambda lines: [*lines[:300], "00/new.jpg\ta new picture", *lines[300:]])


def remove(root: Path) -> None:
    _edit(root, lambda lines: [*lines[:700], *lines[701:]])


def _edit(root: Path, edit: Callable[[list[str]], list[str]]) -> None:
    path = root / "pairs.tsv"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")


@contextmanager
def session() -> Iterator[None]:
    import ray

    if not ray.is_initialized():
        ray.init("local", include_dashboard=False, log_to_driver=False)
    yield


def run(num_samples: int, config: BuildConfig, folder: Path) -> dict[str, int]:
    """Print a line a build; returns how many shards each wrote."""
    started = time.monotonic()
    corpus = write_corpus(folder / "corpus", num_samples)
    print(f"{num_samples} pictures written in {time.monotonic() - started:.1f} s", flush=True)
    catalog = Catalog(folder / "store", "many")
    steps = {"first": leave, "nothing changed": leave}
    steps |= {"one caption changed": change, "one added": add, "one removed": remove}
    written = {}
    for what, edit in steps.items():
        edit(Path(corpus.root))
        cpu = time.process_time()
        report = build([corpus], config, catalog, session=session)
        cpu = time.process_time() - cpu
        written[what] = report.shards_written
        shards = f"{report.shards_written} of {report.num_shards} shards written"
        took = f"{report.seconds:7.1f} s, {cpu:6.1f} s of the driver's CPU"
        print(f"{what:20} {took}; {report.inspected} files decoded, {shards}", flush=True)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run(options.samples, BuildConfig(num_workers=options.workers), Path(folder))


if __name__ == "__main__":
    main()
