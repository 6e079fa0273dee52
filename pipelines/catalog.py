"""Versions of a dataset: publish, list, open, verify, compare, roll back, prune.

    <store>/datasets/<name>/shards/        content-addressed tars, shared by all versions
                           /versions/<id>/ manifest.parquet samples.parquet rejects.parquet dataset.json
                                           checksums.json
                           /current.json   which version is served, and which one before it
                           /cache/         what the next build need not find out again; safe to delete
                           /work/          while a build runs

The id of a version is a digest of its content. A version appears in one rename, and the pointer moves last,
so whatever kills a build leaves the previous version served. What goes into a version is decided in
build.py.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipelines.atomic import sweep, sync_folder, write_atomically
from pipelines.changes import Diff, compare
from pipelines.shards import file_sha256
from schemas.records import SAMPLES, Record, Split
from schemas.taxonomy import Category, Taxonomy

CHECKSUMS = "checksums.json"  # sha256 of the tables and of the card
_TABLES = ("manifest", "samples", "rejects")
_HASHES: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])
_ROWS_AT_ONCE = 10_000  # as Python objects, for the digest; part of the id of every version


class CatalogError(ValueError):
    """A dataset or a version that is absent, damaged or in use. The message says what to do."""


class BeingBuilt(CatalogError):
    """Another process builds this dataset; the same will do later."""


class SourceCard(Record):
    """A corpus that was read, with the sha256 of each of its annotation files."""

    corpus: str
    format: str
    split: str
    licence: str
    files: dict[str, str]


class Counts(Record):
    """What one split holds: samples, and annotations of each kind."""

    samples: int = 0
    segments: int = 0
    referring: int = 0
    captions: int = 0
    questions: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: number + getattr(other, name) for name, number in self})


class DatasetCard(Record):
    """dataset.json: what this version is, where it came from and what it knows of its labels.

    taxonomies    by corpus; a category is `seen` where a training mask has it
    answers       of the training questions, most frequent first
    """

    dataset: str
    version: str
    schema_version: int
    code_version: str
    sources: tuple[SourceCard, ...]
    num_read: int
    num_kept: int
    rejects: dict[str, int]
    counts: dict[str, Counts]
    taxonomies: dict[str, Taxonomy]
    answers: tuple[str, ...]


class Pruned(Record):
    """A version, and why it stays; empty where it goes."""

    version: str
    kept_because: str


class Pointer(Record):
    """current.json."""

    version: str
    previous: str | None


class _Lease:
    """While it lives, `prune` of this or another process leaves the version alone. Local to a process."""

    def __init__(self, card: Path) -> None:
        self._file: BinaryIO | None = card.open("rb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError:  # a file system without locks, or read-only: then nobody prunes it from here
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": None}


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """An opened version: its card, and tables of schemas.records.MANIFEST, SAMPLES (by key) and REJECTS.

    folder    of the card and the tables; `lease` keeps them from being pruned
    """

    id: str
    card: DatasetCard
    manifest: pa.Table
    samples: pa.Table
    rejects: pa.Table
    shards_root: Path
    folder: Path
    lease: _Lease | None = field(default=None, repr=False, compare=False)

    def taxonomy(self, seen_only: bool = False) -> Taxonomy:
        """The classes of all corpora in order, each name once; `seen_only` leaves those with training masks.

        Raises `CatalogError` where no corpus has classes.
        """
        merged: dict[str, Category] = {}
        for taxonomy in self.card.taxonomies.values():
            for category in taxonomy.categories:
                known = merged.get(category.name, category)
                merged[category.name] = known.model_copy(update={"seen": known.seen or category.seen})
        kept = tuple(c for c in merged.values() if c.seen or not seen_only)
        if not kept:
            raise CatalogError(
                f"dataset {self.card.dataset!r} {self.id} has no classes: add a corpus with segments"
            )
        return Taxonomy(name=self.card.dataset, categories=kept)

    def profile(self) -> dict[str, dict[str, int]]:
        """What it holds, by split and annotation."""
        return {split: counts.model_dump() for split, counts in self.card.counts.items()}

    def verify(self) -> int:
        """Read every byte of the version again. Returns how many of shards.

        Raises `CatalogError` that names every file that is missing or is not what was written.
        """
        rows = self.manifest.to_pylist()
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            problems = [p for p in pool.map(self._problem, rows) if p]
        problems += _damaged_files(self.folder)
        if content_id(self.card, self.manifest, self.samples, self.rejects) != self.id:
            problems.append("the tables and the card are not those that were published")
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            raise CatalogError(
                f"dataset {self.card.dataset!r} {self.id} is damaged; rebuild to repair the shards:{lines}"
            )
        return sum(row["size_bytes"] for row in rows)

    def _problem(self, row: Mapping[str, str]) -> str:
        path = self.shards_root / row["shard"]
        try:
            return "" if file_sha256(path) == row["sha256"] else f"{path}: its bytes changed"
        except OSError as error:
            return f"{path}: {error.strerror}"


class Catalog:
    """The versions of one dataset under a store."""

    def __init__(self, store: Path, dataset: str) -> None:
        self.dataset = dataset
        self.root = Path(store).absolute() / "datasets" / dataset
        self.shards_root = self.root / "shards"
        self.cache = self.root / "cache"

    def versions(self) -> tuple[str, ...]:
        """Ids, oldest first."""
        found = [p for p in (self.root / "versions").glob("*") if (p / "dataset.json").is_file()]
        return tuple(p.name for p in sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name)))

    def current(self) -> str | None:
        """The id of the version that is served; None before the first build."""
        pointer = self._pointer()
        return pointer.version if pointer else None

    def open(self, version: str = "current", *, split: Split | None = None) -> DatasetVersion:
        """With `split`, of the samples only those, and without the hashes by which versions are compared.

        Raises `CatalogError` where there is no such version, or it cannot be read.
        """
        wanted = self.current() if version == "current" else version
        if wanted is None:
            raise CatalogError(
                f"no dataset {self.dataset!r} in {self.root.parents[1]}; build it with: "
                f"python -m jobs jobs/rebuild.yaml dataset={self.dataset}"
            )
        if wanted not in self.versions():
            raise CatalogError(
                f"dataset {self.dataset!r} has no version {wanted!r}; it has {list(self.versions())}"
            )
        folder = self.root / "versions" / wanted
        try:
            card = DatasetCard.model_validate_json((folder / "dataset.json").read_bytes())
            tables = {name: _read(folder, name, split) for name in _TABLES}
        except (OSError, ValidationError, pa.ArrowException) as error:
            raise CatalogError(f"{folder} cannot be read: {error}; roll back, or rebuild") from None
        return DatasetVersion(
            id=wanted,
            card=card,
            shards_root=self.shards_root,
            folder=folder,
            lease=_Lease(folder / "dataset.json"),
            **tables,
        )

    def publish(self, card: DatasetCard, manifest: pa.Table, samples: pa.Table, rejects: pa.Table) -> bool:
        """Make a version whose shards are all written the current one. Returns whether the version is new.

        Where it exists and is current already, nothing is written.
        """
        folder = self.root / "versions" / card.version
        new = not (folder / "dataset.json").is_file()
        if new:
            staging = folder.with_name(f".{card.version}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, table in zip(_TABLES, (manifest, samples, rejects), strict=True):
                pq.write_table(table, staging / f"{name}.parquet")
            write_atomically(staging / "dataset.json", card.model_dump_json(indent=1).encode())
            hashes = {path.name: file_sha256(path) for path in sorted(staging.iterdir())}
            write_atomically(staging / CHECKSUMS, json.dumps(hashes).encode())
            sync_folder(staging)
            staging.rename(folder)
            sync_folder(folder.parent)
        self._point(card.version)
        return new

    def serve(self, version: str) -> None:
        """Make a version that is there the current one. Where it is, nothing is written."""
        self._point(version)

    def files(self, version: str) -> list[Path]:
        """What a version consists of, beside its shards."""
        return sorted((self.root / "versions" / version).iterdir())

    def rollback(self) -> str:
        """Serve the previous version again, and return its id. A second call undoes the first.

        Raises `CatalogError` where there is no previous version.
        """
        pointer = self._pointer()
        if pointer is None or pointer.previous is None:
            raise CatalogError(
                f"dataset {self.dataset!r} has no previous version; it has {list(self.versions())}"
            )
        self.open(pointer.previous)
        self._point(pointer.previous)
        return pointer.previous

    def diff(self, a: str, b: str) -> Diff:
        """What changes from version `a` to version `b`; "current" is allowed. Raises `CatalogError`."""
        return compare(self.open(a), self.open(b))

    def prunable(self, needed: Mapping[str, str], keep: int) -> tuple["Pruned", ...]:
        """Every version and what `prune` would do with it, oldest first.

        needed    ids of versions that something outside needs, and what
        keep      so many of the newest stay in any case
        """
        pointer, versions, folder = self._pointer(), self.versions(), self.root / "versions"
        why = dict.fromkeys(versions[max(0, len(versions) - keep) :], f"one of the newest {keep}")
        if pointer is not None:
            why |= {pointer.previous: "rollback leads to it"} if pointer.previous else {}
            why[pointer.version] = "it is served"
        why |= {version: reason for version, reason in needed.items() if version in versions}
        why |= {v: "a process has it open" for v in versions if v not in why and _in_use(folder / v)}
        return tuple(Pruned(version=version, kept_because=why.get(version, "")) for version in versions)

    def prune(self, needed: Mapping[str, str], keep: int) -> int:
        """Remove the versions that nothing needs, and all shards that no version holds. Returns bytes freed.

        Raises `CatalogError` where a build runs, or a version that stays cannot be read.
        """
        with self.building():
            unneeded = [row.version for row in self.prunable(needed, keep) if not row.kept_because]
            for version in unneeded:
                self._remove(version)
            kept = [self.open(version) for version in self.versions()]
            return self._remove_shards({name for v in kept for name in v.manifest["shard"].to_pylist()})

    def _remove(self, version: str) -> None:
        """Out of sight first: a version is whole or absent; and back where somebody has just opened it."""
        folder = self.root / "versions" / version
        hidden = folder.with_name(f".{version}.tmp")
        folder.rename(hidden)
        if _in_use(hidden):
            hidden.rename(folder)
        else:
            shutil.rmtree(hidden)

    def _remove_shards(self, wanted: set[str]) -> int:
        """All but these; a shard before its receipt, so that what is left is never trusted."""
        freed = 0
        for path in sorted(self.shards_root.glob("*.tar*")):
            if path.name.removesuffix(".json") not in wanted:
                freed += path.stat().st_size
                path.unlink()
        return freed

    @contextmanager
    def building(self) -> Iterator[None]:
        """Keep other builds out, and clear what killed ones left. The lock dies with the process.

        Raises `BeingBuilt` where another build holds it.
        """
        self.shards_root.mkdir(parents=True, exist_ok=True)
        with (self.root / "build.lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BeingBuilt(
                    f"dataset {self.dataset!r} is being built by another process; wait for it"
                ) from None
            sweep(self.shards_root)
            yield

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """An empty folder for what a build needs while it runs. Only inside `building`."""
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.cache.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _pointer(self) -> Pointer | None:
        path = self.root / "current.json"
        try:
            return Pointer.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise CatalogError(
                f"{path} is damaged ({error.error_count()} problems); rebuild to write it anew"
            ) from None

    def _point(self, version: str) -> None:
        pointer = self._pointer()
        if pointer is None or pointer.version != version:
            moved = Pointer(version=version, previous=pointer.version if pointer else None)
            write_atomically(self.root / "current.json", moved.model_dump_json().encode())


def _read(folder: Path, table: str, split: Split | None) -> pa.Table:
    path = folder / f"{table}.parquet"
    if table != "samples" or split is None:
        return pq.read_table(path)
    columns = [name for name in SAMPLES.names if not name.endswith("_hash")]
    return pq.read_table(path, columns=columns, filters=[("split", "=", split)])


def _in_use(folder: Path) -> bool:
    """Whether a process holds a lease of the version in this folder."""
    with (folder / "dataset.json").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _damaged_files(folder: Path) -> list[str]:
    """The tables and the card, byte by byte against the list that was written beside them."""
    try:
        hashes = _HASHES.validate_json((folder / CHECKSUMS).read_bytes())
    except (OSError, ValidationError):
        return [f"{folder / CHECKSUMS}: missing or damaged"]
    names = {path.name for path in folder.iterdir()} - {CHECKSUMS}
    problems = [f"{folder / name}: not one of the files that were written" for name in names - hashes.keys()]
    for name, expected in hashes.items():
        if name not in names:
            problems.append(f"{folder / name}: missing")
        elif file_sha256(folder / name) != expected:
            problems.append(f"{folder / name}: its bytes changed")
    return sorted(problems)


def content_id(card: DatasetCard, manifest: pa.Table, samples: pa.Table, rejects: pa.Table) -> str:
    """The id of a version, 16 hex digits, from its content alone: no code, time, machine or absolute path."""
    said = [
        card.schema_version,
        [(name, taxonomy.model_dump(mode="json")) for name, taxonomy in card.taxonomies.items()],
        card.answers,
    ]
    total = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    # a detail may hold the absolute path of a file, a record the number of its line
    for table in (manifest, samples, rejects.select(["corpus", "split", "reason"])):
        for start in range(0, len(table), _ROWS_AT_ONCE):
            rows = table.slice(start, _ROWS_AT_ONCE).to_pylist()
            total.update(json.dumps(rows, sort_keys=True).encode())
    return total.hexdigest()[:16]
