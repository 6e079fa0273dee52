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

A catalog may be published at a URI: the same names below it, but `shards/<name>-<hash>.tar`, so that what is
there is never written over. Then versions and pointer are those there, and the folder is where versions are
built and where tables that were opened are kept. The lock and the leases are the folder's: of two builds on
two machines, which jobs/locks.py keeps apart, both would publish whole versions.
"""

import fcntl
import hashlib
import json
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from pipelines.atomic import sweep, sync_folder, write_atomically
from pipelines.cache import LocalShards, RemoteShards, Shards
from pipelines.changes import Diff, compare
from pipelines.remote import Remote, at_once
from pipelines.shards import Member, file_sha256, receipt_path
from schemas.records import MANIFEST, REJECTS, SAMPLES, Record, Split
from schemas.taxonomy import Category, Taxonomy

log = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"  # sha256 of the tables and of the card
CARD = "dataset.json"  # a version whose card is there is whole
INPUTS = "inputs.json"  # in the cache: what the last build read, and the files that it made of it
_TABLES = {"manifest": MANIFEST, "samples": SAMPLES, "rejects": REJECTS}
_UPLOADS = 8  # at a time; chosen by us
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
    remote    of the dataset, where it is published at a URI; its shards are read there
    """

    id: str
    card: DatasetCard
    manifest: pa.Table
    samples: pa.Table
    rejects: pa.Table
    shards_root: Path
    folder: Path
    remote: Remote | None = None
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

    def source(self) -> RemoteShards:
        """Its shards, to be read from several threads, hashed or fetched."""
        if self.remote is None:
            return RemoteShards(Remote.at(str(self.shards_root)))
        return RemoteShards(self.remote / "shards", names_there(self.manifest))

    def shards(self) -> Shards:
        """Where samples are read, unless by way of a cache."""
        return LocalShards(self.shards_root) if self.remote is None else self.source()

    def verify(self) -> int:
        """Read every byte of the version again. Returns how many of shards.

        Raises `CatalogError` that names every file that is missing or is not what was written.
        """
        names, digests = (self.manifest[column].to_pylist() for column in ("shard", "sha256"))
        source, members = self.source(), _by_shard(self.samples)

        def problem(name: str, digest: str) -> str:
            return source.problem(name, digest, members(name))

        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            found = {name: p for name, p in zip(names, pool.map(problem, names, digests), strict=True) if p}
        problems = list(found.values())
        tables = Remote.at(str(self.folder.parent)) if self.remote is None else self.remote / "versions"
        problems += _damaged_files(tables / self.id)
        if content_id(self.card, self.manifest, self.samples, self.rejects) != self.id:
            problems.append("the tables and the card are not those that were published")
        if problems:
            lines = "".join(f"\n  {problem}" for problem in problems)
            remedy = "delete these there and rebuild, which uploads what is missing"
            if self.remote is None:
                remedy = _distrust(self.shards_root.parent, found)
            raise CatalogError(f"dataset {self.card.dataset!r} {self.id} is damaged; {remedy}:{lines}")
        return sum(self.manifest["size_bytes"].to_pylist())


class Catalog:
    """The versions of one dataset under a store; `remote` is the dataset at a URI, if it is published."""

    def __init__(self, store: Path, dataset: str, remote: Remote | None = None) -> None:
        self.dataset, self.remote = dataset, remote
        self.root = Path(store).absolute() / "datasets" / dataset
        self.shards_root = self.root / "shards"
        self.cache = self.root / "cache"

    def versions(self) -> tuple[str, ...]:
        """Ids, oldest first."""
        if self.remote is not None:
            there = self.remote.list("versions").items()
            cards = [(file.mtime_ns, name.partition("/")[0]) for name, file in there if name.endswith(CARD)]
            return tuple(version for _, version in sorted(cards))
        found = [p for p in (self.root / "versions").glob("[!.]*") if (p / CARD).is_file()]
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
                f"no dataset {self.dataset!r} in {self.remote or self.root.parents[1]}; build it with: "
                f"python -m jobs jobs/rebuild.yaml dataset={self.dataset}"
            )
        if wanted not in self.versions():
            raise CatalogError(
                f"dataset {self.dataset!r} has no version {wanted!r}; it has {list(self.versions())}"
            )
        folder = self.root / "versions" / wanted
        if self.remote is not None and not (folder / CARD).is_file():
            self._fetch(self.remote / "versions" / wanted, folder)
        try:
            card = DatasetCard.model_validate_json((folder / CARD).read_bytes())
            tables = {name: _read(folder, name, split) for name in _TABLES}
        except (OSError, ValueError) as error:
            remedy = f"roll back, or {_distrust(self.root, [])}"
            if self.remote is not None:
                remedy = "delete it, and it is fetched again"
            raise CatalogError(f"{folder} cannot be read: {error}; {remedy}") from None
        return DatasetVersion(
            id=wanted,
            card=card,
            shards_root=self.shards_root,
            folder=folder,
            remote=self.remote,
            lease=_Lease(folder / CARD),
            **tables,
        )

    def publish(self, card: DatasetCard, manifest: pa.Table, samples: pa.Table, rejects: pa.Table) -> bool:
        """Make a version whose shards are all written the current one. Returns whether the version is new.

        Where it exists, is whole and is current already, nothing is written.
        """
        folder = self.root / "versions" / card.version
        new = not (folder / CARD).is_file()
        if new or _damaged_files(Remote.at(str(folder))):
            staging = folder.with_name(f".{card.version}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for name, table in zip(_TABLES, (manifest, samples, rejects), strict=True):
                pq.write_table(table, staging / f"{name}.parquet")
            write_atomically(staging / CARD, card.model_dump_json(indent=1).encode())
            hashes = {path.name: file_sha256(path) for path in sorted(staging.iterdir())}
            write_atomically(staging / CHECKSUMS, json.dumps(hashes).encode())
            sync_folder(staging)
            damaged = folder.with_name(f".{card.version}.damaged.tmp")
            shutil.rmtree(damaged, ignore_errors=True)  # of a build that was killed here
            if not new:
                folder.rename(damaged)
            staging.rename(folder)
            shutil.rmtree(damaged, ignore_errors=True)
            sync_folder(folder.parent)
        new_there = self.serve(card.version)
        return new if self.remote is None else new_there

    def serve(self, version: str) -> bool:
        """Make a version that lies in the folder the current one, at the URI too, if it is published there.

        Where it is, nothing is written. Returns whether it is new at the URI.
        """
        new = self.remote is not None and self._upload(version, self.remote)
        self._point(version)
        return new

    def _upload(self, version: str, remote: Remote) -> bool:
        """What is not there yet, the card last. Whatever ends it, the next one goes on. Returns whether the
        version is new there.

        Raises `RemoteError`, and `CatalogError` where a file of the folder is not what was written.
        """
        here = self.root / "versions" / version
        try:
            manifest = _read(here, "manifest", None)
        except CatalogError as error:
            raise CatalogError(f"{error}; {_distrust(self.root, [])}") from None
        names, there = names_there(manifest), remote.list("shards")
        sent = [
            (self.shards_root / row["shard"], f"shards/{names[row['shard']]}", row["sha256"])
            for row in manifest.to_pylist()
            if (file := there.get(names[row["shard"]])) is None or file.size != row["size_bytes"]
        ]
        if sent:
            log.info("%d of %d shards are not yet at %s", len(sent), len(names), remote)
        for _ in at_once(_UPLOADS, partial(_send, remote, self.root), sent):
            pass
        hashes = _HASHES.validate_json((here / CHECKSUMS).read_bytes())
        hashes[CHECKSUMS] = file_sha256(here / CHECKSUMS)
        tables = remote.list(f"versions/{version}")
        for name in sorted(hashes, key=lambda name: name == CARD) if hashes.keys() - tables else ():
            _send(remote, self.root, (here / name, f"versions/{version}/{name}", hashes[name]))
        return CARD not in tables

    def _fetch(self, there: Remote, folder: Path) -> None:
        """A version's tables and card, whole; several processes may do so at a time."""
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        staging.mkdir(parents=True)
        try:
            for name in there.list():
                there.download(name, staging / name)
            if problems := _damaged_files(Remote.at(str(staging))):
                raise CatalogError(f"{there} is damaged; roll back, or rebuild: {'; '.join(problems)}")
            with suppress(OSError):  # another process was first
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

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
        opened = [v for v in versions if (folder / v).is_dir() and v not in why and _in_use(folder / v)]
        why |= dict.fromkeys(opened, "a process has it open")
        return tuple(Pruned(version=version, kept_because=why.get(version, "")) for version in versions)

    def prune(self, needed: Mapping[str, str], keep: int, before: float = math.inf) -> int:
        """Remove the versions that nothing needs, and all shards that no version holds. Returns bytes freed.

        before    at a URI shards go only if they are older (seconds since the epoch): another machine may
                  be publishing those that no version holds yet
        Raises `CatalogError` where a build runs, or a version that stays cannot be read.
        """
        with self.building():
            unneeded = [row.version for row in self.prunable(needed, keep) if not row.kept_because]
            for version in unneeded:
                self._remove(version)
            manifests = [self.open(version).manifest for version in self.versions()]
            freed = self._remove_shards({n for m in manifests for n in m["shard"].to_pylist()})
            return freed if self.remote is None else _remove_there(self.remote / "shards", manifests, before)

    def _remove(self, version: str) -> None:
        """Out of sight first: a version is whole or absent; and back where somebody has just opened it."""
        folder = self.root / "versions" / version
        if self.remote is not None:
            there = self.remote / "versions" / version
            for name in sorted(there.list(), key=lambda name: name != CARD):
                there.delete(name)
            shutil.rmtree(folder, ignore_errors=True)
            return
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

        Raises `BeingBuilt` where another build holds it, `RemoteError` where a URI cannot be reached: that is
        better known before hours of work than after them.
        """
        self.versions()
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
        path: Any = f"{self.remote}/current.json" if self.remote else self.root / "current.json"
        try:
            data = self.remote.read("current.json") if self.remote else path.read_bytes()
            return Pointer.model_validate_json(data)
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
            data = moved.model_dump_json().encode()
            if self.remote is not None:
                self.remote.write("current.json", data)
            else:
                write_atomically(self.root / "current.json", data)


def _read(folder: Path, name: str, split: Split | None) -> pa.Table:
    """A table with its columns and whole texts: Parquet promises UTF-8 and does not check it."""
    path, columns, filters = folder / f"{name}.parquet", _TABLES[name].names, None
    if name == "samples" and split is not None:
        columns = [column for column in columns if not column.endswith("_hash")]
        filters = [("split", "=", split)]
    try:
        table = pq.read_table(path, columns=columns, filters=filters)
        table.validate(full=True)
        return table.select(columns).cast(pa.schema([_TABLES[name].field(column) for column in columns]))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CatalogError(f"{path}: {error!s:.300}") from None


def _distrust(root: Path, shards: Iterable[str]) -> str:
    """Forget that these shards and the last build are whole, so that the next one repairs. Returns how."""
    try:
        (root / "cache" / INPUTS).unlink(missing_ok=True)
        for name in shards:
            receipt_path(root / "shards" / name).unlink(missing_ok=True)
    except OSError:  # whoever may write there must say so
        return f"delete {root / 'cache'} and rebuild to repair it"
    return "rebuild to repair it"


def _by_shard(samples: pa.Table) -> Callable[[str], list[Member]]:
    """Of samples.parquet, what lies in a shard: objects are made of one shard at a time."""
    encoded = samples["shard"].combine_chunks().dictionary_encode()
    order = np.argsort(encoded.indices.to_numpy(), kind="stable")
    starts = np.cumsum([0, *np.bincount(encoded.indices.to_numpy(), minlength=len(encoded.dictionary))])
    numbers = {name: i for i, name in enumerate(encoded.dictionary.to_pylist())}
    columns = samples.select(list(Member.model_fields))

    def members(name: str) -> list[Member]:
        if name not in numbers:
            return []
        rows = order[starts[numbers[name]] : starts[numbers[name] + 1]]
        return [Member(**row) for row in columns.take(pa.array(rows)).to_pylist()]

    return members


def _in_use(folder: Path) -> bool:
    """Whether a process holds a lease of the version in this folder."""
    with (folder / CARD).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _damaged_files(folder: Remote) -> list[str]:
    """The tables and the card, byte by byte against the list that was written beside them."""
    try:
        hashes = _HASHES.validate_json(folder.read(CHECKSUMS))
    except (OSError, ValidationError):
        return [f"{folder}/{CHECKSUMS}: missing or damaged"]
    names = set(folder.list()) - {CHECKSUMS}
    problems = [f"{folder}/{name}: not one of the files that were written" for name in names - hashes.keys()]
    for name, expected in hashes.items():
        if name not in names:
            problems.append(f"{folder}/{name}: missing")
        elif folder.sha256(name) != expected:
            problems.append(f"{folder}/{name}: its bytes changed")
    return sorted(problems)


def names_there(manifest: pa.Table) -> dict[str, str]:
    """What each shard is called at a URI: the same samples may have other bytes, with another PNG encoder."""
    rows = zip(manifest["shard"].to_pylist(), manifest["sha256"].to_pylist(), strict=True)
    return {shard: f"{shard.removesuffix('.tar')}-{digest[:16]}.tar" for shard, digest in rows}


def _send(remote: Remote, root: Path, file: tuple[Path, str, str]) -> None:
    path, name, digest = file
    if remote.upload(path, name) != digest:
        remote.delete(name)
        raise CatalogError(f"{path} is not what was written; {_distrust(root, [path.name])}")


def _remove_there(shards: Remote, manifests: Sequence[pa.Table], before: float) -> int:
    wanted = {name for manifest in manifests for name in names_there(manifest).values()}
    freed = 0
    for name, file in shards.list().items():
        if name not in wanted and file.mtime_ns < before * 1e9:
            shards.delete(name)
            freed += file.size
    return freed


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
