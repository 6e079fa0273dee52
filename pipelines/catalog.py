"""Versions of a dataset: publish, list, open, verify, compare, roll back.

    <store>/datasets/<name>/shards/        content-addressed tars, shared by all versions
                           /versions/<id>/ manifest.parquet samples.parquet rejects.parquet dataset.json
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
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines.atomic import sweep, sync_folder, write_atomically
from pipelines.shards import file_sha256
from schemas.records import Record
from schemas.taxonomy import Category, Taxonomy

_TABLES = ("manifest", "samples", "rejects")
_ROWS_AT_ONCE = 10_000  # as Python objects, for the digest; part of the id of every version


class CatalogError(ValueError):
    """A dataset or a version that is absent, damaged or in use. The message says what to do."""


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


class Pointer(Record):
    """current.json."""

    version: str
    previous: str | None


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What changes from one version to another: keys of samples, names of shards."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    shards_added: tuple[str, ...]
    shards_removed: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetVersion:
    """An opened version: its card, and tables of schemas.records.MANIFEST, SAMPLES (by key) and REJECTS."""

    id: str
    card: DatasetCard
    manifest: pa.Table
    samples: pa.Table
    rejects: pa.Table
    shards_root: Path

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

    def verify(self) -> int:
        """Hash every shard, and the tables. Returns the bytes read.

        Raises `CatalogError` that names every shard that is missing or is not what was written.
        """
        rows = self.manifest.to_pylist()
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            problems = [p for p in pool.map(self._problem, rows) if p]
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

    def open(self, version: str = "current") -> DatasetVersion:
        """Raises `CatalogError` where there is no such version, or it cannot be read."""
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
            tables = {name: pq.read_table(folder / f"{name}.parquet") for name in _TABLES}
        except (OSError, ValidationError, pa.ArrowException) as error:
            raise CatalogError(f"{folder} cannot be read: {error}; roll back, or rebuild") from None
        return DatasetVersion(id=wanted, card=card, shards_root=self.shards_root, **tables)

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
        old, new = (
            {row["key"]: row["sha256"] for row in self.open(v).samples.select(["key", "sha256"]).to_pylist()}
            for v in (a, b)
        )
        before, after = (set(self.open(v).manifest["shard"].to_pylist()) for v in (a, b))
        return Diff(
            added=tuple(sorted(new.keys() - old.keys())),
            removed=tuple(sorted(old.keys() - new.keys())),
            changed=tuple(sorted(k for k in old.keys() & new.keys() if old[k] != new[k])),
            shards_added=tuple(sorted(after - before)),
            shards_removed=tuple(sorted(before - after)),
        )

    @contextmanager
    def building(self) -> Iterator[None]:
        """Keep other builds out, and clear what killed ones left. The lock dies with the process.

        Raises `CatalogError` where another build holds it.
        """
        self.shards_root.mkdir(parents=True, exist_ok=True)
        with (self.root / "build.lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CatalogError(
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
