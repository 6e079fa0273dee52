"""What survives a fault in a build? Kill it, fill its disk, take its rights away, at random moments.

    sudo python -m benchmarks.faults [--trials 50] [--seed 0] [--kinds driver denied ...]

In every trial a version is served, another is being built, and something happens. Afterwards the served
version must be whole, old or new; the next build must finish and give the version that an undisturbed build
gives; it must verify; and read = kept + rejected. Kinds of fault: `driver` (kill -9 of a build by one
worker), `cluster` (the same on a Ray of its own), `worker` (of a task of Ray), `raylet` (the process that
holds Ray's object store), `full` (the disk is full; mounts a
small one, which needs root), `denied` (a folder of the store becomes read-only).
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from pipelines import demo
from pipelines.build import build
from pipelines.catalog import Catalog
from schemas.jobs import BuildConfig, CorpusConfig, DemoConfig

KINDS = ("driver", "cluster", "worker", "raylet", "full", "denied")
CONFIG = BuildConfig(num_workers=1, shard_samples=8)
WORLD = DemoConfig(image_size=48, train_scenes=40, val_scenes=12, train_pairs=40, val_pairs=12)
# what makes a root obey permissions like anybody else
OBEDIENT = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
WAIT_S = 300.0
ENTRY = Path(__file__).resolve().parents[1]
BUILD = """
import os, sys
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
from contextlib import contextmanager
from pathlib import Path
from pipelines.build import build
from pipelines.catalog import Catalog
from schemas.jobs import BuildConfig, CorpusConfig
@contextmanager
def session():
    import ray
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
corpora = [CorpusConfig.model_validate_json(text) for text in sys.argv[3:]]
config = BuildConfig(num_workers=int(sys.argv[2]), shard_samples=8)
print("ready", flush=True)
build(corpora, config, Catalog(Path(sys.argv[1]), "demo"), session=session)
"""


def start(
    store: Path, corpora: Sequence[CorpusConfig], workers: int, errors: Path, *, obedient: bool = False
) -> subprocess.Popen[str]:
    """A build in a process of its own, past its imports; `errors` is the file for what it says."""
    command = [sys.executable, "-c", BUILD, str(store), str(workers), *(c.model_dump_json() for c in corpora)]
    with errors.open("wb") as said:
        process = subprocess.Popen(
            [*(OBEDIENT if obedient else ()), *command],
            cwd=ENTRY,
            env=os.environ | {"PYTHONPATH": str(ENTRY)},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    assert process.stdout is not None and process.stdout.readline() == "ready\n", "the build did not start"
    return process


def written(store: Path) -> int:
    """How far a build is: the files of the store."""
    return sum(len(files) for _, _, files in os.walk(store))


def wait_for(process: subprocess.Popen[str], store: Path, more: int) -> bool:
    """Until the build has made so many files, or has ended; whether it still runs."""
    before, deadline = written(store), time.monotonic() + WAIT_S
    while process.poll() is None and abs(written(store) - before) < more and time.monotonic() < deadline:
        time.sleep(0.001)
    return process.poll() is None


def end(process: subprocess.Popen[str]) -> int:
    """Wait for a build, and kill it where it hangs; its exit status."""
    try:
        return process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def children(process: subprocess.Popen[str], kind: str) -> list[psutil.Process]:
    """Of a build's own Ray: its tasks' processes, or the raylet, which holds the object store."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            is_task = " ".join(child.cmdline()[:1]).startswith("ray::")
            if (is_task and kind == "worker") or (child.name() == "raylet" and kind == "raylet"):
                found.append(child)
        except psutil.Error:
            continue
    return found


def strike(kind: str, process: subprocess.Popen[str], store: Path, chance: random.Random) -> str:
    """Do it; what was done."""
    if kind in ("driver", "cluster"):
        mine = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for child in mine:  # Ray's own watch over orphans would end them within seconds
            with_id = psutil.pid_exists(child.pid)
            if with_id and child.is_running():
                child.kill()
        return "killed"
    if kind == "denied":
        folder = chance.choice([p for p in (store / "datasets" / "demo").iterdir() if p.is_dir()])
        folder.chmod(0o555)
        return f"{folder.name} read-only"
    victims = children(process, kind)
    if not victims:
        return "no such process yet"
    chance.choice(victims).kill()
    return f"killed one of {len(victims)}"


@contextmanager
def disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A disk of its own, in memory."""
    folder.mkdir()
    size = f"size={int(megabytes * 2**20)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        # lazily: this process may still map a table of it
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def trial(
    kind: str,
    place: Path,
    served: Path,
    corpora: Sequence[CorpusConfig],
    expected: str,
    chance: random.Random,
) -> str:
    """One fault on a copy of the store `served`; what happened, in a line. Raises `AssertionError`."""
    store, errors = place / "store", place.with_name(f"{place.name}.log")  # not on a disk that is full
    shutil.copytree(served, store)
    before = Catalog(store, "demo").current()
    if kind == "full":
        free = chance.randrange(4096, 2**20, 4096)
        used = sum(-(-p.stat().st_size // 4096) * 4096 for p in store.rglob("*") if p.is_file())
        subprocess.run(["mount", "-o", f"remount,size={used + 2**17 + free}", str(place)], check=True)
    process = start(
        store, corpora, 2 if kind in ("cluster", "worker", "raylet") else 1, errors, obedient=kind == "denied"
    )
    done = f"{free >> 10} KB free" if kind == "full" else "it had ended"
    if kind != "full" and wait_for(process, store, chance.randrange(0, 40)):
        done = strike(kind, process, store, chance)
    status = end(process)
    if status > 0 and done == "it had ended":  # by itself: a machine without room for a Ray, say
        done += f" ({(errors.read_text().splitlines() or ['silent'])[-1]:.300})"
    if kind == "full":
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
    for path in store.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    check(Catalog(store, "demo"), (before, expected), corpora, expected)
    return f"{kind}: {done}, exit status {status}"


def check(
    catalog: Catalog, allowed: Sequence[str | None], corpora: Sequence[CorpusConfig], expected: str
) -> None:
    """The laws after a fault."""
    assert catalog.current() in allowed, catalog.current()
    catalog.open().verify()
    report = build(corpora, CONFIG, catalog)
    assert report.version == catalog.current() == expected
    assert report.num_read == report.num_kept + sum(report.rejects.values())
    catalog.open().verify()
    left = [path for path in catalog.root.rglob("*") if path.name.endswith(".tmp")]
    assert not left and not (catalog.root / "work").exists(), left
    again = build(corpora, CONFIG, catalog)
    assert again.shards_written == again.inspected == 0


def prepare(root: Path) -> tuple[tuple[CorpusConfig, ...], Path, str]:
    """Corpora with a fault of their own, a store that serves a part of them, and the version of all."""
    corpora = demo.write(WORLD, root / "world")
    broken = min((root / "world" / "images" / "train").iterdir())
    broken.write_bytes(broken.read_bytes()[:-100])
    build(corpora[:2], CONFIG, Catalog(root / "served", "demo"))
    return corpora, root / "served", build(corpora, CONFIG, Catalog(root / "clean", "demo")).version


def run(kinds: Sequence[str], trials: int, seed: int) -> Counter[str]:
    """Print a line a trial; how many there were of each kind. Raises `AssertionError`."""
    chance, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        corpora, served, expected = prepare(root)
        for number in range(trials):
            kind, place = kinds[number % len(kinds)], root / f"trial-{number}"
            if kind == "full":
                with disk(place, 1024) as mounted:
                    said = trial(kind, mounted, served, corpora, expected, chance)
            else:
                place.mkdir()
                said = trial(kind, place, served, corpora, expected, chance)
                shutil.rmtree(place)
            counts[kind] += 1
            print(f"{number + 1} of {trials}, {said}: whole, finished, verified", flush=True)
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    print(dict(run(options.kinds, options.trials, options.seed)))


if __name__ == "__main__":
    main()
