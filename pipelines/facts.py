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


def facts_of(
    wanted: Iterable[tuple[str, str]], folder: Path, prefix: str, max_pixels: int
) -> tuple[Files, int]:
    """Facts of every (kind, place), remembered for the part `prefix`; and how many had to be found out.

    Raises `OSError` where the cache cannot be written.
    """
    stamps = {file: _stamp(*file) for file in wanted}
    cached = _cached(folder, prefix)
    facts: dict[tuple[str, str], Facts] = {}
    found_out = 0
    for (kind, place), now in stamps.items():
        then, known = cached.get((kind, place), ((), None))
        if known is None or not now or then != now:
            known, found_out = inspect(kind, place, max_pixels), found_out + 1
        facts[kind, place] = known
    kept = {file: known for file, known in facts.items() if stamps[file]}
    if found_out or not (folder / f"{prefix}.parquet").is_file() or len(cached) != len(kept):
        rows = [row | {"stamp": stamps[row["kind"], row["path"]]} for row in rows_of(kept)]
        with appearing(folder / f"{prefix}.parquet", durable=False) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_CACHED), file)
    return facts, found_out


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
