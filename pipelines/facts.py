"""Facts of files, remembered from build to build: what did not change is not decoded again.

    <dataset>/cache/facts-<code>/<part>.parquet     facts of the files that the part's rows name, with stamps

A stamp is size and times of change, as the directory tells them. The cache holds what the last build asked
for and nothing else; losing it costs time only. Another version of the code, or another limit, has another
folder.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import labels, places
from pipelines.atomic import appearing
from pipelines.inspection import FACTS, Facts, facts_by_file, inspect, rows_of
from pipelines.labels import Runs

_CACHED = FACTS.append(pa.field("stamp", pa.list_(pa.int64())))
Files = Mapping[tuple[str, str], Facts]  # by ("image" or "labels", place)


def stamp(path: str) -> tuple[int, ...]:
    """What changes when a file is written or replaced: size, and both times of change. Raises `OSError`."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def code_digest() -> str:
    """16 hex digits of the code that inspects and reads, of the decoder's version too."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256(version("pillow").encode())
    for path in sorted(p for package in ("pipelines", "schemas") for p in (root / package).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            total.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return total.hexdigest()[:16]


def inspection_digest(max_pixels: int) -> str:
    """16 hex digits: facts that were found out under another one are not those of today."""
    return hashlib.sha256(f"{code_digest()} {max_pixels}".encode()).hexdigest()[:16]


class Known:
    """Facts of the files that are asked for, remembered for the part `prefix`.

    files            all that were asked for
    num_inspected    how many of them had to be found out
    """

    def __init__(self, folder: Path, prefix: str, max_pixels: int) -> None:
        self.files: dict[tuple[str, str], Facts] = {}
        self.num_inspected = 0
        self._path, self._max_pixels = folder / f"{prefix}.parquet", max_pixels
        self._cached = _cached(folder, prefix)
        self._stamps: dict[tuple[str, str], tuple[int, ...]] = {}

    def ask(self, kind: str, place: str) -> Runs | None:
        """Have a file in `files`; the pixels of a label map that is decoded for it."""
        if (kind, place) in self.files:
            return None
        now, runs = _stamp(kind, place), None
        then, facts = self._cached.get((kind, place), ((), None))
        if facts is None or not now or then != now:
            facts, runs = inspect(kind, place, self._max_pixels)
            self.num_inspected += 1
        self.files[kind, place], self._stamps[kind, place] = facts, now
        return runs

    def save(self) -> None:
        """Remember what was asked for, and forget the rest. Raises `OSError`."""
        kept = {file: facts for file, facts in self.files.items() if self._stamps[file]}
        if self.num_inspected or not self._path.is_file() or len(self._cached) != len(kept):
            rows = [row | {"stamp": self._stamps[row["kind"], row["path"]]} for row in rows_of(kept)]
            with appearing(self._path, durable=False) as file:
                pq.write_table(pa.Table.from_pylist(rows, schema=_CACHED), file)


def forget_others(cache: Path, folder: Path, parts: Iterable[str]) -> None:
    """Delete what a build with this folder and these parts did not ask for. Only under the dataset's lock."""
    wanted = {folder / f"{prefix}.parquet" for prefix in parts}
    for path in cache.glob("facts-*/*"):
        if path not in wanted:
            path.unlink(missing_ok=True)
    for other in cache.glob("facts-*"):
        if other != folder:
            other.rmdir()


def _stamp(kind: str, place: str) -> tuple[int, ...]:
    """Of the files that hold something; empty where it cannot be told, so that nothing is remembered."""
    holders = labels.holders(place) if kind == "labels" else (place,)
    try:
        stamps = [stamp(places.holder(holder)) for holder in holders]
    except OSError:
        return ()
    return (len(stamps), *(number for one in stamps for number in one))


def _cached(folder: Path, prefix: str) -> dict[tuple[str, str], tuple[tuple[int, ...], Facts]]:
    """What this part, or the parts that it was or will be split into, knew."""
    known: dict[tuple[str, str], tuple[tuple[int, ...], Facts]] = {}
    for path in folder.glob("*.parquet"):
        if not (path.stem.startswith(prefix) or prefix.startswith(path.stem)):
            continue
        try:
            table = pq.read_table(path, schema=_CACHED)
        except (OSError, pa.ArrowException):
            continue  # damaged: it is found out again
        stamps = table["stamp"].to_pylist()
        facts = facts_by_file(table.drop_columns(["stamp"]))
        known |= {file: (tuple(s), f) for (file, f), s in zip(facts.items(), stamps, strict=True)}
    return known
